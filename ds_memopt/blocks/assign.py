"""From a model, or from names and shapes alone, to the blocks of each of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from torch import Tensor, nn

from ds_memopt.blocks import families
from ds_memopt.blocks.names import bare_modules, bare_parameters
from ds_memopt.blocks.rules import Context, Shape, ValueBlocks, blocks_of, key_of
from ds_memopt.blocks.structure import ParamBlocks


def full_shape(p: Tensor) -> Shape:
    """The logical shape of a parameter: of the whole tensor where ZeRO-3 or FSDP2 keep only a part of it here."""
    return tuple(getattr(p, "ds_shape", p.shape))


def assign_blocks(model: nn.Module, value_blocks: ValueBlocks = "rows") -> dict[str, ParamBlocks]:
    """Cut every parameter of `model` into the blocks of Adam-mini.

    Embedding and lm_head: one block per token row. Query and key: per head, head_dim x C elements. Value, attention
    output, MLP, experts, convolutions: per output neuron. Norm weights: whole, or per row where they have rows. Biases
    and unknown vectors: elementwise. Fused query-key-value matrices: each part by its own rule. LoRA factors and every
    matrix that is not recognised: per row, never one block for a whole matrix. Head sizes come from the attention
    module, else from the nearest configuration above it (its own, the submodel's, the model's); where none is found or
    none fits, the rule falls back to rows and says so.

    Source: Adam-mini, arXiv 2406.16793, Algorithm 3; package adam-mini 1.1.1, which keeps biases elementwise.

    Args:
        model: any module; parameters may be sharded or not yet gathered, only shapes are read (see `full_shape`).
        value_blocks: "rows", or "whole" for one block per value matrix (adam-mini with empty `wv_names`). In a fused
            matrix the value part becomes one block; latent attention's kv_b_proj stays by row.

    Returns:
        The blocks by the names of `bare_parameters(model)`, a tied weight once, under its first name.

    Raises:
        ValueError: `value_blocks` is neither word, or is "whole" for a fused matrix that interleaves queries, keys
            and values (GPT-NeoX, Bloom): their value rows are not contiguous, so one block cannot hold them.
    """
    _check(value_blocks)
    modules = bare_modules(model)
    shapes = {name: full_shape(p) for name, p in bare_parameters(model).items()}
    return {n: blocks_of(n, shape, _context(n, shapes, modules), value_blocks) for n, shape in shapes.items()}


def assign_blocks_by_name(
    shapes: Mapping[str, Shape], head_dim: int | None = None, value_blocks: ValueBlocks = "rows"
) -> dict[str, ParamBlocks]:
    """Cut parameters of which only names and shapes are known; the rules are those of `assign_blocks`.

    Prefer `assign_blocks`: names do not tell a vision tower's head size from the text model's, nor where the parts of
    a fused query-key-value matrix lie unless it has as many key as query heads (R = 3C); such a matrix is cut by row.

    Args:
        shapes: full logical shapes by parameter name.
        head_dim: rows per attention head, the same for queries and keys of every layer.
        value_blocks: as in `assign_blocks`.

    Raises:
        ValueError: query or key matrices are present and `head_dim` is missing or not positive; or as `assign_blocks`.
    """
    _check(value_blocks)
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim={head_dim}: must be at least 1.")
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    stored_in_out = any(key_of(n) == "c_attn" and len(s) == 2 and s[1] == 3 * s[0] for n, s in shapes.items())
    assignment, headless = {}, []
    for name, shape in shapes.items():
        conv1d = stored_in_out and key_of(name) in families.CONV1D_KEYS and len(shape) == 2
        context = Context(kind="conv1d" if conv1d else "", head_dim=head_dim)
        assignment[name] = blocks_of(name, shape, context, value_blocks)
        if head_dim is None and assignment[name].role in ("query", "key", "qkv"):
            headless.append(name)
    if headless:
        listed = ", ".join(headless[:4]) + (f" and {len(headless) - 4} more" if len(headless) > 4 else "")
        raise ValueError(
            f"Queries and keys are cut by attention head, but names and shapes do not tell a head's size: {listed}. "
            "Pass head_dim=..., or build the optimizer with AdamMini.from_model(model, ...), which reads it."
        )
    return assignment


def _check(value_blocks: str) -> None:
    if value_blocks not in get_args(ValueBlocks):
        raise ValueError(f"value_blocks={value_blocks!r}: must be 'rows' or 'whole'.")


def _context(name: str, shapes: Mapping[str, Shape], modules: Mapping[str, nn.Module]) -> Context:
    """What the module tree says about the parameter `name`."""
    above = _ancestors(name, modules)
    owner, shape, key = above[0], shapes[name], key_of(name)
    attention = next((m for m in above if "Attention" in _class_name(m)), owner)
    sources = list(_sources(above))
    head_dim, num_heads = _heads(sources)
    query_rows = None
    if key in families.QUERY_BESIDE:
        before, _, after = name.rpartition(key)
        query_rows = shapes.get(before + families.QUERY_BESIDE[key] + after, shape)[0]
    return Context(
        kind=_kind(owner, shape),
        attention=_class_name(attention),
        cross_attention=getattr(attention, "is_cross_attention", False) is True,
        multi_query=getattr(attention, "multi_query_attention", False) is True,
        head_dim=head_dim,
        num_heads=num_heads,
        query_rows=query_rows,
        experts="expert" in _class_name(owner).lower(),
        transposed=_transposed(owner, key, shape, sources),
    )


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # fully_shard swaps in a subclass of this name


def _ancestors(name: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The module that owns the parameter, then those around it, up to the model."""
    paths = name.split(".")[:-1]
    return [modules[".".join(paths[:depth])] for depth in range(len(paths), -1, -1)]


def _sources(above: list[nn.Module]) -> Iterator[object]:
    """Where sizes may be stated, nearest first: the modules up to the first that has a configuration, then that.

    Nothing further out is asked: the text model's heads say nothing about a vision tower's. A linear layer's own
    configuration, as that of torchao's Float8Linear, tells how it multiplies and no size.
    """
    for module in above:
        yield module
        config = getattr(module, "config", None)
        if config is not None and not isinstance(module, nn.Linear):
            yield config
            if getattr(config, "text_config", None) is not None:
                yield config.text_config
            return


def _heads(sources: list[object]) -> tuple[int | None, int | None]:
    """(head_dim, num_heads) of the queries, each from the nearest source that states it.

    Where the nearest source states num_heads only, head_dim stays None: the rows of the query matrix give it.
    """
    head_dim = num_heads = None
    for source in sources:
        if head_dim is None and num_heads is None:
            head_dim = _head_dim(source)
        num_heads = num_heads or _size(source, families.NUM_HEADS)
    return head_dim, num_heads


def _head_dim(source: object) -> int | None:
    latent = _size(source, ("qk_head_dim",))  # latent attention; its head_dim is that of the rotary part alone
    without_position, rotary = _size(source, ("qk_nope_head_dim",)), _size(source, ("qk_rope_head_dim",))
    if latent is None and without_position and rotary:
        latent = without_position + rotary
    return latent or _size(source, families.HEAD_DIM)


def _size(source: object, names: tuple[str, ...]) -> int | None:
    """The first of the attributes `names` that is a positive integer: some configurations hold one per stage."""
    for name in names:
        try:
            value = getattr(source, name, None)
        except RuntimeError:  # transformers: this configuration's layers differ in it, so it states no one value
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _kind(owner: nn.Module, shape: Shape) -> str:
    class_name = _class_name(owner)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(owner, nn.Linear):
        return "linear"
    if isinstance(owner, _CONVOLUTIONS) or ("conv" in class_name.lower() and len(shape) > 2):
        return "conv"
    if class_name == "Conv1D" and len(shape) == 2 and getattr(owner, "nf", None) == shape[1]:
        return "conv1d"
    return "norm" if "norm" in class_name.lower() else "other"


def _transposed(owner: nn.Module, key: str, shape: Shape, sources: list[object]) -> bool | None:
    """Whether a convolution or stacked experts store [in, out]; None if nothing tells."""
    if isinstance(owner, _CONVOLUTIONS):
        return owner.transposed
    stated = getattr(owner, "is_transposed", None)  # set by the experts of transformers 5
    if isinstance(stated, bool):
        return stated
    hidden = next((size for source in sources if (size := _size(source, ("hidden_size",)))), None)
    if len(shape) != 3 or (shape[1] == hidden) == (shape[2] == hidden):
        return None
    if key in families.EXPERT_IN:
        return shape[1] == hidden
    return shape[2] == hidden if key in families.EXPERT_OUT else None
