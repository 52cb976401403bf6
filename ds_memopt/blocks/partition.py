"""Which parameters train together where only one block of the model trains at a time, as BAdam does.

A block here is a set of whole parameters, a layer for instance; `assign` cuts single parameters into smaller blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from torch import nn

from ds_memopt.blocks.assign import assign_blocks, full_shape
from ds_memopt.blocks.names import bare_modules, bare_parameters
from ds_memopt.blocks.patterns import are_patterns, matching


@dataclass(frozen=True)
class Partition:
    """Each trainable parameter once, by its name in the bare model, in the order of the model.

    blocks: parameter names by block name, from input to output.
    always_active: trained together with every block.
    never_trained: trainable parameters that no block holds.
    """

    blocks: Mapping[str, tuple[str, ...]]
    always_active: tuple[str, ...]
    never_trained: tuple[str, ...]


def partition_into_blocks(
    model: nn.Module,
    trainable: Iterable[str],
    blocks: str | Sequence[Sequence[str]] = "layer",
    include_embedding: bool = False,
    include_lm_head: bool = False,
    always_active: Sequence[str] = (),
) -> Partition:
    """Divide the parameters to train into the blocks that take turns.

    The layers are the members of the list with most elements to train, and of all with at least half as many (encoder
    and decoder of T5); a list inside another, such as the experts of a layer, does not count. A list is an
    nn.ModuleList; or an nn.ModuleDict or nn.Sequential, but its members are layers only if their names end with a
    number and they have submodules and siblings of their class. Smaller towers, a vision tower for instance, are never
    trained: name them in explicit blocks or in `always_active`.

    Args:
        model, trainable: any module, and the bare names of its parameters to train, for instance those of LoRA alone.
        blocks: "layer", "sublayer" for attention and MLP in turn, or a list of regular expressions for each block.
        include_embedding: begin with a block of token and position embeddings and what belongs to them.
        include_lm_head: end with a block of norms outside the layers and everything behind the last layer. An output
            matrix tied to the embedding is one parameter with it, which then makes the block "embedding".
        always_active: regular expressions; what they match is in no block and trains with every one.

    Raises:
        ValueError: an option of the wrong type or an unknown word, fewer than two blocks; a name that the model does
            not have; a pattern that is wrong or matches nothing; a parameter in two explicit blocks; include_embedding
            or include_lm_head with explicit blocks; no list of layers; no parameter left for the blocks.
    """
    _check_options(blocks, include_embedding, include_lm_head, always_active)
    wanted = set(trainable)
    names = [name for name in bare_parameters(model) if name in wanted]
    if unknown := sorted(wanted.difference(names)):
        raise ValueError(f"trainable: the model has no {unknown[0]!r}. Use the names of the bare model.")
    active = {name for pattern in always_active for name in matching("always_active", pattern, names)}
    rest = [name for name in names if name not in active]
    if not rest:
        raise ValueError(f"always_active={always_active!r} leaves none of {len(names)} parameters. Match fewer.")
    if isinstance(blocks, str):
        found = _by_structure(model, rest, blocks == "sublayer", include_embedding, include_lm_head)
    else:
        found = _by_patterns(blocks, rest)
    ordered = ((title, tuple(name for name in rest if name in block)) for title, block in found.items())
    return Partition(
        blocks={title: block for title, block in ordered if block},
        always_active=tuple(name for name in names if name in active),
        never_trained=tuple(name for name in rest if not any(name in block for block in found.values())),
    )


def _check_options(blocks: Any, include_embedding: Any, include_lm_head: Any, always_active: Any) -> None:
    explicit = isinstance(blocks, list | tuple) and len(blocks) > 1 and all(b and are_patterns(b) for b in blocks)
    choice = '"layer", "sublayer" or a list of regular expressions for each of at least two blocks. Try "layer"'
    for name, value, valid, limit in (
        ("blocks", blocks, explicit or (isinstance(blocks, str) and blocks in ("layer", "sublayer")), choice),
        ("include_embedding", include_embedding, isinstance(include_embedding, bool), "true or false. Try false"),
        ("include_lm_head", include_lm_head, isinstance(include_lm_head, bool), "true or false. Try false"),
        ("always_active", always_active, are_patterns(always_active), 'a list of regular expressions. Try ["norm"]'),
    ):
        if not valid:
            raise ValueError(f"{name}={value!r} is out of range: it must be {limit}.")
        if explicit and value is True:
            raise ValueError(f"{name}=True does not go with explicit blocks. List its parameters as a pattern there.")


def _by_patterns(blocks: Sequence[Sequence[str]], rest: Sequence[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for number, patterns in enumerate(blocks):
        title = f"block {number} ({patterns[0]})"
        block = {name for pattern in patterns for name in matching("blocks", pattern, rest)}
        for other, taken in found.items():
            if both := sorted(block & taken):
                raise ValueError(f"{both[0]!r} is in {other!r} and in {title!r}. Make the patterns of one narrower.")
        found[title] = block
    return found


def _by_structure(
    model: nn.Module, rest: Sequence[str], sublayers: bool, include_embedding: bool, include_lm_head: bool
) -> dict[str, set[str]]:
    layers, elsewhere = _find_layers(model, rest)
    roles = {name: cut.role for name, cut in assign_blocks(model).items()}
    embedding, head = _find_ends(model, elsewhere, roles)
    tied = embedding & head if include_lm_head else set()
    found = {"embedding": embedding if include_embedding else tied}
    for layer, names in layers.items():
        # Frozen ones too: a frozen matrix tells which sublayer the LoRA factors beside it belong to.
        for name, sublayer in _sublayers(layer, names, roles):
            found.setdefault(f"{layer}.{sublayer}" if sublayers else layer, set()).add(name)
    return found | {"lm_head": head - embedding if include_lm_head else set()}


def _find_layers(model: nn.Module, rest: Iterable[str]) -> tuple[dict[str, list[str]], set[str]]:
    """All parameters of each layer by its path; and all that are in a layer or in another tower."""
    modules, names = bare_modules(model), bare_parameters(model)
    home: dict[str, tuple[str, str]] = {}  # by parameter: the outermost list around it, and the member it is in
    for name in names:
        lists = (pair for pair in pairwise(["", *_paths(name)]) if pair[1] in modules and _is_layer(*pair, modules))
        if outermost := next(lists, None):
            home[name] = outermost
    holders = Counter(path for path, _ in {home[name] for name in rest if name in home})
    sizes: Counter[str] = Counter()
    for name in rest:
        if name in home and holders[home[name][0]] > 1:
            sizes[_numberless(home[name][0])] += prod(full_shape(names[name]))
    if not sizes:
        raise ValueError(
            "The model has no nn.ModuleList, nn.ModuleDict or nn.Sequential of two or more layers to train. Set blocks "
            'to patterns, one list per block, such as [["stem", "stage1"], ["stage2", "head"]].'
        )
    layers: dict[str, list[str]] = {}
    for name, (path, member) in home.items():
        if 2 * sizes[_numberless(path)] >= max(sizes.values()):
            layers.setdefault(member, []).append(name)
    # A tower is all that surrounds a list without layers, up to the module that it shares with the layers.
    around_layers = {path for layer in layers.values() for name in layer for path in _paths(name)}
    towers = {path for name in home for path in _paths(name)} - around_layers
    return layers, {name for name in names if name in home or not towers.isdisjoint(_paths(name))}


def _is_layer(path: str, member: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module `member` is one of the layers that the module `path` is a list of."""
    parent, child = modules[path], modules[member]
    if isinstance(parent, nn.ModuleList):
        return True
    if not isinstance(parent, nn.ModuleDict | nn.Sequential) or not member[-1].isdigit():
        return False
    siblings = [modules[f"{path}.{word}".lstrip(".")] for word, _ in parent.named_children()]
    return sum(type(sibling) is type(child) for sibling in siblings) > 1 and any(child.children())


def _numberless(path: str) -> str:
    """The lists `layer1`, `layer2`, ... of a ResNet count as one."""
    return re.sub(r"\d+", "", path)


def _paths(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _find_ends(model: nn.Module, elsewhere: set[str], roles: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """The parameters of the embedding and those of the head; a tied one, which has a name in each, is in both."""
    first_names = {id(p): name for name, p in bare_parameters(model).items()}
    embedding, head = set(), set()
    behind = True  # the last layer: this goes through the model from its end
    for name, p in reversed(bare_parameters(model, remove_duplicate=False).items()):
        behind = behind and name not in elsewhere
        if roles.get(name) in ("embedding", "position embedding") or re.search(r"embed(?!_out)|project_in", name):
            embedding.add(first_names[id(p)])  # embed_out is what GPT-NeoX calls its head
        elif behind or re.search(r"norm|project_out", name):  # OPT registers these ahead of its layers
            head.add(first_names[id(p)])
    return embedding - elsewhere, head - elsewhere


# Told by a parameter's name in its layer, or else its role, which is last: the leftmost word counts. Names go first as
# T5 calls an MLP matrix `wo`; in most families the norm named post_attention_layernorm is the one ahead of the MLP.
_SUBLAYER = re.compile(
    r"(?i)(?P<mlp>post_attention_(layer)?norm|mlp|ffn|\bff\b|feed_?forward|expert|moe|router|intermediate|dense\w+dense"
    r"|(ln|norm)_?2\b|norm_after)"
    r"|(?P<attention>attn|attention|input_layernorm|(ln|norm)_?1\b|\b(query|key|value|qkv|mixer)$)"
)


def _sublayers(layer: str, names: Sequence[str], roles: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each parameter of a layer with its sublayer, "attention" or "mlp": one block if all tell the same, or nothing.

    What does not tell goes with the parameter before it, as a bias with its weight, or at first with the next.
    """
    matches = [_SUBLAYER.search(f"{name.removeprefix(layer)} {roles[name]}") for name in names]
    current = next((match.lastgroup for match in matches if match), "mlp")
    return [(name, current := m.lastgroup if m else current) for name, m in zip(names, matches, strict=True)]
