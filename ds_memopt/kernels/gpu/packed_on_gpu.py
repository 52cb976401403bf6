"""Steps of Adam on weights and states as a `Storage` keeps them, in Triton, see packed_kernels.py.

Nothing is unpacked to memory. Second moments of blocks advance first, in a launch that reads the gradients; then one
launch makes the step, whose programs take whole groups of codes, whatever blocks these lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl

from ds_memopt.kernels.codes import CODES, GROUP
from ds_memopt.kernels.gpu import adam_kernels, packed_kernels
from ds_memopt.kernels.gpu.launches import (
    DTYPES,
    PROGRAM,
    TILE,
    Tables,
    adam_scalars,
    holders_of,
    kept_with,
    launch,
    launches_of,
    launches_that_fill,
    moved_by,
    schedule_of,
    tables_of,
)
from ds_memopt.kernels.gpu.packed_kernels import PIECE_FIELDS, SPAN_FIELDS
from ds_memopt.kernels.noise_formulas import WORD
from ds_memopt.kernels.packed import Maxima, Segment, Segments, Storage
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.work import FIELDS, Blocks, Runs, Tensors, Work

KINDS = DTYPES | {CODES["signed"]: tl.int8, CODES["unsigned"]: tl.uint8, torch.int16: tl.int16}
STATES = "exp_avg", "exp_avg_sq"
"""First and second moments."""


class Spans(NamedTuple):
    """What of packed_kernels.py lies on a device. programs: [programs, 2], int32, span and number within it.

    holders: as `sums_and_maxima` has them.
    """

    spans: torch.Tensor
    programs: torch.Tensor
    pieces: torch.Tensor
    holders: torch.Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A step of Adam. by_block: second moments are those of blocks, which other launches advance.

    scalars: as a row of `Tables`. maxima: for each state in codes memory of its slots. beside: tensors that other
    launches need besides, whose `runs` these are. kept: tables, for the launches that follow.
    """

    parameters: Tensors
    gradients: Tensors
    moments: Tensors
    second_moments: Tensors
    work: Work
    scalars: Mapping[int, tuple[float, ...]]
    storage: Storage
    by_block: bool
    maxima: Mapping[str, torch.Tensor]
    beside: Sequence[Tensors] = ()
    runs: Sequence[Runs] = ()
    kept: dict[tuple[int, ...], Tables] = field(default_factory=dict)

    @property
    def typed(self) -> tuple[Tensors, ...]:
        """What launches are told apart by."""
        return self.parameters, self.gradients, self.moments, self.second_moments, self.storage.remainders

    def tables(self, numbers: Sequence[int], device: torch.device) -> Tables:
        """The same for all launches, so that they are copied once."""
        key = tuple(numbers)
        if key not in self.kept:
            scales = (self.storage.coded[state].scales if state in self.maxima else {} for state in STATES)
            norms, *others = self.beside or [{}]
            tensors = *self.typed[:4], norms, self.storage.remainders, *scales, *others
            self.kept[key] = tables_of([self.work.all, *self.runs], numbers, tensors, self.scalars, tuple, device)
        return self.kept[key]

    def spans(self, device: torch.device) -> Spans:
        return kept_with(
            self.work.whole, ("spans", device), lambda: _spans(self.work, self.storage, self.groups, device)
        )

    @property
    def groups(self) -> Maxima | None:
        """Those of codes: all states have the same."""
        return next((self.storage.coded[key].groups for key in STATES if key in self.storage.coded), None)

    def slots_of(self, key: str, otherwise: torch.Tensor) -> torch.Tensor:
        """The maxima of a state, or what a kernel is given in their place."""
        return self.maxima.get(key, otherwise)


def adam_mini_as_kept(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
    storage: Storage,
) -> None:
    tensors, maxima = (parameters, gradients, moments, second_moments), new_maxima(storage)
    call = Call(*tensors, blocks.work, _scalars(scalars, storage), storage, True, maxima)
    sums = blocks.new_slots(1)
    sums_and_maxima(call, sums)
    waits = [blocks.begin_sum(sums), *begin_maxima(storage, maxima)]
    _advance(call, blocks.work.whole, None)
    for wait in waits:
        wait()
    _advance(call, blocks.work.cut, sums)
    step(call)


def adam_by_element_as_kept(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
    storage: Storage,
) -> None:
    tensors, maxima = (parameters, gradients, moments, second_moments), new_maxima(storage)
    call = Call(*tensors, blocks.work, _scalars(scalars, storage), storage, False, maxima)
    sums_and_maxima(call, None)
    for wait in begin_maxima(storage, maxima):
        wait()
    step(call)


def _scalars(scalars: Mapping[int, AdamScalars], storage: Storage) -> dict[int, tuple[float, ...]]:
    return {number: (*adam_scalars(of_step), 0.0, 0.0, storage.steps[number]) for number, of_step in scalars.items()}


def new_maxima(storage: Storage) -> dict[str, torch.Tensor]:
    """For each state in codes memory of the slots of groups that ranks share."""
    return {key: packing.groups.new_slots(1) for key, packing in storage.coded.items()}


def begin_maxima(storage: Storage, maxima: Mapping[str, torch.Tensor]) -> list[Callable[[], None]]:
    """Begin to complete them over the ranks; returns what waits."""
    return [storage.coded[key].groups.begin_max(slots) for key, slots in maxima.items()]


def sums_and_maxima(call: Call, sums: torch.Tensor | None) -> None:
    """What ranks share; sums: memory for those of cut blocks' squares."""
    num_sums, num_slots = len(sums) if sums is not None else 0, call.groups.num_slots if call.groups is not None else 0
    memory = [call.maxima[key] for key in STATES if key in call.maxima] + [sums] * (sums is not None)
    if not num_sums + num_slots:
        return
    cut = call.work.cut
    for first, (numbers, (_, g, m, v, _), device) in launches_that_fill(
        memory[0], [call.work.all], *call.typed, moving=call.scalars
    ):
        spans, tables = call.spans(device), call.tables(numbers, device)
        of_sums = len(cut) + first * -(-num_sums // TILE) if num_sums else 0
        of_cut = spans.spans, 0, spans.holders
        if num_sums:
            of_cut = schedule_of(cut, "blocks", device).rows, len(cut), holders_of(cut, num_sums, device)
        of_maxima = -(-num_slots // packed_kernels.GROUPS.value)
        launch(
            packed_kernels.sums_and_maxima, of_sums + of_maxima, *of_cut, memory[-1], num_sums, of_sums, spans.spans,
            spans.holders,
            *(call.slots_of(key, memory[0]) for key in STATES), num_slots, tables.addresses, tables.scalars,
            G=KINDS[g], M=KINDS[m], V=None if call.by_block else KINDS[v], FIRST_LAUNCH=first,
            moved=moved_by(
                cut, numbers, g.itemsize, 0, 0, 4,
                fixed=first * sum(slots.nbytes for slots in memory) + num_slots * (8 + 4 * len(call.maxima)),
            ),
        )  # fmt: skip


def _advance(call: Call, runs: Runs, sums: torch.Tensor | None) -> None:
    """Second moments of blocks."""
    for numbers, (_, g, *_), device in launches_of([runs], *call.typed, moving=call.scalars):
        schedule, tables = schedule_of(runs, "blocks", device), call.tables(numbers, device)
        launch(
            adam_kernels.adam_by_block, len(schedule.programs), schedule.rows, schedule.programs, tables.addresses,
            tables.scalars, tables.scalars if sums is None else sums,
            P=tl.float32, G=KINDS[g], M=tl.float32, SUMS="own" if sums is None else "slots", MOVE=False, ALIGNED=False,
            moved=moved_by(runs, numbers, g.itemsize * (sums is None), 0, 4, 4),
        )  # fmt: skip


def step(call: Call) -> None:
    runs = call.work.all
    for numbers, (p, g, m, v, r), device in launches_of([runs], *call.typed, moving=call.scalars):
        spans, tables = call.spans(device), call.tables(numbers, device)
        kept = p.itemsize + m.itemsize + (r.itemsize if r is not None else 0) + len(call.maxima) * 4 / GROUP
        kept += 0 if call.by_block else v.itemsize
        first, second = (call.storage.states[key].probe if key in call.storage.states else 0 for key in STATES)
        launch(
            packed_kernels.adam, len(spans.programs), spans.spans, spans.programs, spans.pieces, tables.addresses,
            tables.scalars, *(call.slots_of(key, tables.scalars) for key in STATES),
            P=tl.int16 if r is not None else KINDS[p], G=KINDS[g], M=KINDS[m], V=KINDS[v], R=KINDS.get(r),
            BY_BLOCK=call.by_block, PROBE_OF_FIRST=first, PROBE_OF_SECOND=second, ALIGNED=tables.aligned,
            maxnreg=packed_kernels.REGISTERS,
            moved=moved_by(runs, numbers, g.itemsize + kept, kept, 4 * call.by_block),
        )  # fmt: skip


def _spans(work: Work, storage: Storage, groups: Maxima | None, device: torch.device) -> Spans:
    slots = slots_of(groups)
    holders = np.full(groups.num_slots if groups is not None else 0, -1, dtype=np.int64)
    spans, pieces, programs = [], [], []
    for (tensor, _), rows in by_interval(work.all).items():
        assert all(row["rows"] == 1 for row in rows), "runs of blocks lie one after the other"
        offset, count = min(row["offset"] for row in rows), sum(row["count"] * row["width"] for row in rows)
        to_entry = rows[0]["entry"] - rows[0]["offset"]
        part = segment_at(storage.segments, tensor, offset)
        of_state = next((storage.states[key].segments for key in STATES if key in storage.states), None)
        kept = part if of_state is None else segment_at(of_state, tensor, offset + to_entry)
        assert (part.count, part.first) == (kept.count, kept.first) == (count, part.first), "segments are the intervals"
        first, last, shift = part.first, part.first + count, offset - part.first
        ends = first // GROUP, (last - 1) // GROUP
        of_ends = [slots.get((tensor, end - kept.group + kept.scale), -1) for end in ends]
        for end, slot in enumerate(of_ends):
            if slot >= 0:
                holders[slot] = 2 * len(spans) + end
        programs += [(len(spans), number) for number in range(-(-(ends[1] - ends[0] + 1) // (PROGRAM // GROUP)))]
        beside = to_entry, kept.scale - kept.group, part.key & WORD, part.key >> 32, *of_ends
        spans.append((tensor, first, last, shift, *beside, len(pieces), len(pieces) + len(rows)))
        for row in rows:
            begin = row["offset"] - shift
            pieces.append((begin, begin + row["count"] * row["width"], row["width"], row["block"]))
    tables = (spans, np.int64, len(SPAN_FIELDS)), (programs, np.int32, 2), (pieces, np.int64, len(PIECE_FIELDS))
    arrays = *(np.array(table, dtype=dtype).reshape(-1, width) for table, dtype, width in tables), holders
    return Spans(*(torch.from_numpy(array).to(device) for array in arrays))


def by_interval(runs: Runs) -> dict[tuple[int, int], list[dict[str, int]]]:
    """The runs, by tensor and interval."""
    found: dict[tuple[int, int], list[dict[str, int]]] = {}
    for values in runs.rows.tolist():
        row = dict(zip(FIELDS, values, strict=True))
        found.setdefault((row["tensor"], row["interval"]), []).append(row)
    return found


def segment_at(segments: Segments, tensor: int, entry: int) -> Segment:
    return next(part for part in segments[tensor] if part.entry == entry and part.count)


def slots_of(groups: Maxima | None) -> dict[tuple[int, int], int]:
    """Of cut groups, by tensor and place of the scale."""
    if groups is None:
        return {}
    columns = (groups.work.cut.column(name).tolist() for name in ("tensor", "block", "slot"))
    return {(tensor, block): slot for tensor, block, slot in zip(*columns, strict=True)}
