"""The rules: from a parameter's name, its shape and what is known of its module to its blocks.

Shape letters: R output rows, C columns, H query heads, K key/value heads, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

from ds_memopt.blocks import families
from ds_memopt.blocks.families import Fused
from ds_memopt.blocks.structure import Columns, Contiguous, ParamBlocks, Section

ValueBlocks = Literal["rows", "whole"]
Shape = tuple[int, ...]
Run = tuple[int, int]  # (w, n): n blocks of w adjacent output neurons
Cut = Callable[..., ParamBlocks]  # (role, rule, *runs) -> the blocks of the weight at hand


@dataclass(frozen=True)
class Context:
    """What is known of a parameter beside its name and shape; the defaults mean unknown.

    kind: of the module that owns it: "embedding", "norm", "conv", "conv1d" (stores [in, out]), "linear", "other";
        "" where only the name is known.
    attention: class name of the attention module around it. cross_attention, multi_query: that module's own flags, the
        second that of ChatGLM2 and later, whose fused matrix is then not interleaved.
    head_dim, num_heads: as the nearest module or configuration states them.
    query_rows: R of the query matrix beside a key matrix.
    experts: the owner holds the stacked matrices of many experts. transposed: it stores them [E, in, out].
    """

    kind: str = ""
    attention: str = ""
    cross_attention: bool = False
    multi_query: bool = False
    head_dim: int | None = None
    num_heads: int | None = None
    query_rows: int | None = None
    experts: bool = False
    transposed: bool | None = None


def words_of(name: str) -> list[str]:
    """The components of a dotted name, without those that wrappers add."""
    return [word for word in name.split(".") if word not in families.ALL_WRAPPER_NAMES]


def key_of(name: str) -> str:
    """The word that a parameter is known by: see `families`."""
    words = words_of(name)
    return words[-2] if words[-1] == "weight" and len(words) > 1 else words[-1]


def blocks_of(name: str, shape: Shape, context: Context, value_blocks: ValueBlocks) -> ParamBlocks:
    """The blocks of one parameter. Raises ValueError where `value_blocks="whole"` cannot be met."""
    numel, key = prod(shape), key_of(name)
    words = words_of(name)

    def cut(role: str, rule: str, *runs: Run) -> ParamBlocks:
        return ParamBlocks(role, rule, shape, _sections(runs, shape, columns=context.kind == "conv1d"))

    def cut_flat(role: str, rule: str, length: int) -> ParamBlocks:
        return ParamBlocks(role, rule, shape, (Contiguous(length, numel // length if length else 0),))

    if "bias" in words[-1]:
        return cut_flat("bias", "elementwise", 1)
    if len(shape) < 2:
        if context.kind == "norm" or any(map(_is_norm_name, words[-2:])):
            return cut_flat("norm", "whole", numel)
        return cut_flat("vector", "elementwise", 1)
    if len(shape) == 2 and (context.kind == "norm" or (not context.kind and _is_norm_name(key))):
        return cut_flat("norm", "per row", shape[1])  # Cohere: a row for each head
    if any(word.startswith("lora_") for word in words):
        return cut_flat("lora", "per row", prod(shape[1:]))
    if context.kind == "conv":
        return cut_flat("conv", f"per {'input' if context.transposed else 'output'} channel", prod(shape[1:]))
    if numel == max(shape) and (len(shape) > 2 or words[-1] != "weight"):  # a class token, a per-channel scale
        return cut_flat("vector", "elementwise", 1)
    if not context.kind and (len(shape) > 3 or (len(shape) == 3 and "conv" in name.lower())):
        return cut_flat("conv", "per row", prod(shape[1:]))
    if len(shape) > 2:
        return _cut_stack(key, words, shape, context)
    if context.kind == "embedding" or (context.kind in ("", "other") and _is_embedding_name(key)):
        return cut_flat("position embedding" if re.search(r"pos|wpe", key) else "embedding", "per row", shape[1])
    if fused := _fused(key, shape, context):
        return _cut_fused(name, fused, shape, context, value_blocks, cut)
    if key in families.QUERY | families.KEY and words[-1] in (key, "weight"):
        return _cut_heads("query" if key in families.QUERY else "key", key, shape, context, cut)
    rows = shape[1] if context.kind == "conv1d" else shape[0]
    if key in families.VALUE:
        return cut("value", "whole", (rows, 1)) if value_blocks == "whole" else cut("value", "per row", (1, rows))
    return cut(_role(words), "per column" if context.kind == "conv1d" else "per row", (1, rows))


def _sections(runs: tuple[Run, ...], shape: Shape, columns: bool) -> tuple[Section, ...]:
    """Sections of a [R, C] weight cut into runs of output neurons, or of one stored [in, out] if `columns`."""
    merged: list[Run] = []
    for width, count in runs:
        if merged and merged[-1][0] == width:
            merged[-1] = (width, merged[-1][1] + count)
        else:
            merged.append((width, count))
    if columns:
        return (Columns(shape[0], tuple(merged)),)
    return tuple(Contiguous(width * shape[1], count) for width, count in merged)


def _cut_heads(role: str, key: str, shape: Shape, context: Context, cut: Cut) -> ParamBlocks:
    """A query or key matrix: one block per head, head_dim x C elements; by row where no head fits."""
    rows = shape[1] if context.kind == "conv1d" else shape[0]
    width = context.head_dim
    if width is None and context.num_heads:
        width = (context.query_rows or rows) // context.num_heads
    if not width:
        return cut(role, "per row (no head size found)", (1, rows))
    if rows % width:
        return cut(role, f"per row (shape does not divide into heads of {width})", (1, rows))
    gated = key == "q_proj" and context.attention.startswith(families.GATED_QUERY_CLASSES)
    if gated and context.num_heads and rows == 2 * context.num_heads * width:
        return cut(role, "per head, its gate per row", *[(width, 1), (1, width)] * context.num_heads)
    return cut(role, f"per head ({width}x{prod(shape) // rows})", (width, rows // width))


def _fused(key: str, shape: Shape, context: Context) -> Fused | None:
    """The order of the parts if this is a matrix that makes queries, keys and values together."""
    if key in families.FUSED and context.cross_attention:
        return families.FUSED_CROSS_ATTENTION
    if key in families.FUSED and context.multi_query:
        return Fused()
    for (attention, exceptional_key), fused in families.FUSED_EXCEPTIONS.items():
        if key == exceptional_key and context.attention.startswith(attention):
            return fused
    return families.FUSED.get(key)


def _cut_fused(
    name: str, fused: Fused, shape: Shape, context: Context, value_blocks: ValueBlocks, cut: Cut
) -> ParamBlocks:
    """A fused matrix: queries and keys per head, values per row or whole. By row where the heads do not add up."""
    inputs, rows = shape if context.kind == "conv1d" else shape[::-1]
    heads = context.num_heads
    if not heads and rows == 3 * inputs and context.head_dim:
        heads = inputs // context.head_dim  # by name alone: as many key heads as query heads
    if not heads:
        return cut("qkv", "per row (number of heads unknown)", (1, rows))
    width = context.head_dim or max(inputs // heads, 1)
    query_heads = heads if "q" in fused.order else 0
    kv_heads = (rows // width - query_heads) // 2
    groups = {"one": 1, "kv_head": kv_heads}.get(fused.groups, fused.groups)
    if kv_heads < 1 or rows != (query_heads + 2 * kv_heads) * width or query_heads % groups or kv_heads % groups:
        return cut("qkv", f"per row (shape does not divide into heads of {width})", (1, rows))
    value_rows = kv_heads // groups * width
    if value_blocks == "whole" and groups > 1:
        raise ValueError(
            f"value_blocks='whole' is not possible for {name!r} {shape}: it holds queries, keys and values in turn, "
            f"{groups} times over, so its values are not one contiguous piece. Use value_blocks='rows'."
        )
    parts = {
        "q": (width, query_heads // groups),
        "k": (width, kv_heads // groups),
        "v": (value_rows, 1) if value_blocks == "whole" else (1, value_rows),
    }
    values = "v whole" if value_blocks == "whole" else "v per row"
    rule = f"{'q, k' if query_heads else 'k'} per head ({width}x{inputs}), {values}"
    return cut("qkv", rule, *[parts[part] for part in fused.order] * groups)


def _cut_stack(key: str, words: list[str], shape: Shape, context: Context) -> ParamBlocks:
    """More than two dimensions, not a convolution: stacked experts, or something that no rule knows."""
    expert = context.experts or any("expert" in word for word in words)
    if expert and len(shape) == 3 and context.transposed:
        columns = Columns(shape[1], ((1, shape[2]),))
        return ParamBlocks("experts", "per column of each expert", shape, (columns,) * shape[0])
    if expert:
        rule = "per row" if context.transposed is False else "per row of the last dimension (storage order unknown)"
        return ParamBlocks("experts", rule, shape, (Contiguous(shape[-1], prod(shape[:-1])),))
    role = "position embedding" if "pos" in key else "other"
    return ParamBlocks(role, "per row of the last dimension", shape, (Contiguous(shape[-1], prod(shape[:-1])),))


def _is_norm_name(key: str) -> bool:
    return "norm" in key.lower() or re.match(r"ln(_|\d|$)", key.lower()) is not None


def _is_embedding_name(key: str) -> bool:
    return re.search(r"embed(?!_out)|embd|wte|wpe|tok_emb", key) is not None


def _role(words: list[str]) -> str:
    """What a matrix is, told by its own name and those of the three modules around it."""
    path = ".".join([word for word in words if word != "weight"][-4:]).lower()
    return next((role for pattern, role in families.ROLES if re.search(pattern, path)), "other")
