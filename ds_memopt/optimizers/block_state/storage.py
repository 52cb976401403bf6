"""How states, and the masters of bf16 weights, are kept: in fp32, or in fewer bits by `ds_memopt.kernels.codes`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch

from ds_memopt.blocks import Contiguous, ParamBlocks, Tiled
from ds_memopt.kernels import CODES, GROUP, STATE_PROBE, Packing, Segment, Segments
from ds_memopt.optimizers.base.hyper_parameters import AdamHyperParameters, choice, hyper_parameter
from ds_memopt.optimizers.block_state.block_index import BlockIndex
from ds_memopt.optimizers.probes.noise import name_hash
from ds_memopt.shards import Interval, is_first_rank, numel_of

logger = logging.getLogger("ds_memopt")

REMAINDER = "master_remainder"
"""Key of what masters have beyond bf16 weights."""

MASTERS = {"fp32": torch.int16, "remainder16": torch.int16, "remainder8": torch.int8}
"""What remainders of bf16 weights are kept in."""


@dataclass(frozen=True, kw_only=True)
class StorageHyperParameters(AdamHyperParameters):
    """Those of AdamW, and two that tell how states and masters are kept."""

    state_dtype: Literal["fp32", "bf16", "int8"] = hyper_parameter(
        "fp32",
        choice("fp32", "bf16", "int8", remedy="'fp32' is exact."),
        "How states of one entry per element or wavelet group are kept: 'bf16' takes 2 bytes for each, 'int8' 1.03. "
        "The step itself is computed in fp32.",
    )
    masters: Literal["fp32", "remainder16", "remainder8"] = hyper_parameter(
        "fp32",
        choice(*MASTERS, remedy="'fp32' is exact."),
        "What bf16 weights lack to be fp32 masters, in 2 bytes or 1 per parameter, where the optimizer is handed the "
        "bf16 weights themselves: 'remainder16' makes the steps of fp32 masters, and is what 'fp32' does there; "
        "'remainder8' rounds them at random.",
    )


class StateLayout(NamedTuple):
    """What a state has: `width` numbers for each block of a structure, block after block.

    A structure of None means one number for each element, laid like the parameter itself. code: whether the numbers
    may be kept in fewer bits, and whether they have a sign.
    """

    structure: str | None
    width: int = 1
    code: Literal["signed", "unsigned"] | None = None


ELEMENT = StateLayout(None)
MOMENT = StateLayout(None, code="signed")
SECOND_MOMENT = StateLayout(None, code="unsigned")


class Kept(NamedTuple):
    """A tensor that is kept of a state. dtype: None for that of the step's arithmetic."""

    layout: StateLayout
    dtype: torch.dtype | None = None


def kept_of(states: Mapping[str, StateLayout], hyper: Any) -> dict[str, Kept]:
    """By key, what is kept of the states; `REMAINDER` of bf16 weights only."""
    kept: dict[str, Kept] = {}
    state_dtype = getattr(hyper, "state_dtype", "fp32")
    for key, layout in states.items():
        if layout.code is None or state_dtype == "fp32":
            kept[key] = Kept(layout)
        elif state_dtype == "bf16":
            kept[key] = Kept(layout, torch.bfloat16)
        else:
            kept[code_key(key)] = Kept(layout, CODES[layout.code])
            kept[scale_key(key)] = Kept(StateLayout(scale_key(key)))
    if hasattr(hyper, "masters"):
        kept[REMAINDER] = Kept(ELEMENT, MASTERS[hyper.masters])
    return kept


def check_masters(kept: Mapping[str, Kept], hyper: Any, tensors: Sequence[torch.Tensor], found: str) -> None:
    """Raise ValueError where remainders are asked for and no tensor is in bf16. found: what there is instead."""
    if REMAINDER in kept and hyper.masters != "fp32" and not any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise ValueError(
            f"masters={hyper.masters!r} is for bf16 weights that the optimizer updates itself, but {found}. Leave it "
            'out; or train a model in bf16, with DeepSpeed by "bf16": {"enabled": true, '
            '"bf16_master_weights_and_grads": true, "bf16_optimizer_states": true}.'
        )


@functools.cache
def tell_of_remainders(masters: str) -> None:
    """Say once that masters are bf16 weights and remainders."""
    if is_first_rank():
        bits = 8 * MASTERS[masters].itemsize
        logger.info("No fp32 masters of bf16 weights: what they lack is kept in %d bits, masters=%r.", bits, masters)


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Copies, in a form that does not depend on how they are kept, of what one tensor keeps in fewer bits.

    values: by key; of a remainder in int16, whatever it is kept in.
    """

    values: dict[str, torch.Tensor]
    packings: Mapping[str, Packing]
    remainder: torch.Tensor | None

    @classmethod
    def of(cls, packings: Mapping[str, Packing], remainder: torch.Tensor | None) -> Self:
        values = {key: packing.unpack()[0] for key, packing in packings.items()}
        if remainder is not None:
            unit = 1 if remainder.dtype == torch.int16 else 2**8
            values[REMAINDER] = remainder.to(torch.int16) * unit
        return cls(values, packings, remainder)

    def take_back(self, missing: Collection[str]) -> None:
        """Keep what the copies hold now, to nearest. missing: keys of which nothing was copied: scales follow from the
        values, and masters are the weights."""
        for key, packing in self.packings.items():
            if packing.scales is not None and scale_key(key) in missing:
                packing.scales[0].copy_(packing.measure({0: self.values[key]})[0])
            packing.keep_exactly({0: self.values[key]})
        if self.remainder is not None:
            rest = self.values[REMAINDER].int() * (REMAINDER not in missing)
            eight_bits = self.remainder.dtype == torch.int8
            self.remainder.copy_((rest + 2**7 >> 8).clamp(max=2**7 - 1) if eight_bits else rest)


def code_key(key: str) -> str:
    """Another key than the state's: what reads the state by its own key must not take codes for it."""
    return f"{key}_code"


def is_code(key: str) -> bool:
    return key.endswith("_code")


def is_packed(key: str, layout: StateLayout, kept: Mapping[str, Kept]) -> bool:
    """Whether the step sees a state otherwise than it is kept. Kernels take first moments of each element in bf16."""
    return code_key(key) in kept or (kept[key].dtype == torch.bfloat16 and layout != MOMENT)


def scale_key(key: str) -> str:
    return f"{key}_scale"


def groups_of(blocks: ParamBlocks) -> ParamBlocks:
    """The groups of entries that have one scale each; entries are the blocks of a parameter's only section."""
    (section,) = blocks.sections
    row = section.columns if isinstance(section, Tiled) else section.numel
    length = min(GROUP * section.length, row)
    whole = Contiguous(length, section.numel // length if length else 0)
    cut = whole if not length or row % length == 0 else Tiled(section.numel // row, row, length)
    return ParamBlocks(blocks.role, f"groups of {GROUP} entries", blocks.shape, (cut,))


def element_blocks(blocks: ParamBlocks) -> ParamBlocks:
    """Each element as a block."""
    return ParamBlocks(blocks.role, "per element", blocks.shape, (Contiguous(1, numel_of(blocks.shape)),))


def packings_of(
    states: Mapping[str, StateLayout],
    kept: Mapping[str, Kept],
    tensors: Mapping[int, Mapping[str, torch.Tensor]],
    indexes: Mapping[str, BlockIndex],
    structures: Mapping[str, Mapping[str, ParamBlocks]],
) -> dict[str, Packing]:
    """For each state that the step sees otherwise than it is kept, how it is kept.

    tensors: local ones, 1-D, by number and key; of none, too, maxima are completed.
    """
    packings = {}
    for key, layout in states.items():
        if not is_packed(key, layout, kept):
            continue
        coded = code_key(key) in kept
        groups = indexes[scale_key(key)] if coded else None
        packings[key] = Packing(
            kept={number: of_tensor[code_key(key) if coded else key] for number, of_tensor in tensors.items()},
            segments=segments_of(layout, indexes, structures, groups),
            probe=STATE_PROBE,
            scales={number: of_tensor[scale_key(key)] for number, of_tensor in tensors.items()} if coded else None,
            groups=groups,
            nearest=layout.code == "signed",
        )
    return packings


def segments_of(
    layout: StateLayout,
    indexes: Mapping[str, BlockIndex],
    structures: Mapping[str, Mapping[str, ParamBlocks]],
    scales: BlockIndex | None = None,
) -> Segments:
    """Where the entries of a state lie in the tensors', and, with an index of their groups, where their scales do."""
    first, *_ = indexes.values()
    built = (scales or first).segments
    if layout.structure not in built:
        numbers = range(len(first.intervals))
        built[layout.structure] = Segments([_segments(layout, indexes, structures, n, scales) for n in numbers])
    return built[layout.structure]


def _segments(
    layout: StateLayout,
    indexes: Mapping[str, BlockIndex],
    structures: Mapping[str, Mapping[str, ParamBlocks]],
    number: int,
    scales: BlockIndex | None,
) -> list[Segment]:
    groups = {part.interval.name: part for part in scales.intervals[number]} if scales is not None else {}
    segments = []
    for name, place in _places(layout, indexes, structures, number).items():
        group = groups.get(name)
        beside = (group.first, group.local) if group is not None else (0, 0)
        segments.append(Segment(*place, *beside, name_hash(name)))
    return segments


def _places(
    layout: StateLayout,
    indexes: Mapping[str, BlockIndex],
    structures: Mapping[str, Mapping[str, ParamBlocks]],
    number: int,
) -> dict[str, tuple[int, int, int, int]]:
    """(entry, count, first, row) of each parameter."""
    if layout.structure is not None:
        blocks = structures[layout.structure]
        parts = {part.interval.name: part for part in indexes[layout.structure].intervals[number]}
        return {name: (part.local, part.count, part.first, _row(blocks[name])) for name, part in parts.items()}
    return {
        name: (interval.offset, interval.length, interval.start, numel_of(_shape(name, structures)))
        for name, interval in intervals_of(indexes, number).items()
    }


def _shape(name: str, structures: Mapping[str, Mapping[str, ParamBlocks]]) -> tuple[int, ...]:
    """Of a parameter; each is in one structure at least."""
    return next(structure[name].shape for structure in structures.values() if name in structure)


def intervals_of(indexes: Mapping[str, BlockIndex], number: int) -> dict[str, Interval]:
    """Those of a tensor, by name."""
    return {part.interval.name: part.interval for index in indexes.values() for part in index.intervals[number]}


def _row(blocks: ParamBlocks) -> int:
    """Entries of a row: of the whole parameter, unless rows end with shorter blocks."""
    (section,) = blocks.sections
    return section.blocks_per_row if isinstance(section, Tiled) else section.num_blocks
