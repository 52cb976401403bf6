"""Steps of GWT on weights and states as a `Storage` keeps them, in Triton, see packed_gwt_kernels.py.

Launches find what ranks share, and the size of the update if it is limited; only the last two keep anything: that of
groups, and the step of Adam on what is not transformed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl

from ds_memopt.kernels.back_ends import GWTCall
from ds_memopt.kernels.codes import GROUP
from ds_memopt.kernels.gpu import gwt_kernels, packed_gwt_kernels, packed_on_gpu
from ds_memopt.kernels.gpu.launches import (
    MATRIX_FIELDS,
    PROGRAM,
    adam_scalars,
    kept_with,
    launch,
    launches_of,
    launches_that_fill,
    moved_by,
)
from ds_memopt.kernels.gpu.packed_gwt_kernels import GROUP_SPAN_FIELDS
from ds_memopt.kernels.gpu.packed_on_gpu import KINDS, by_interval, segment_at, slots_of
from ds_memopt.kernels.noise_formulas import WORD
from ds_memopt.kernels.packed import Maxima, Segment, Storage
from ds_memopt.kernels.plain_gwt import GWTScalars
from ds_memopt.kernels.work import FIELDS, Runs, Work

STATES = "approximation", "second_moment"
NOTHING = Runs.of([])

TILE = 2**10
"""Elements that a program takes at once, if a group of codes has no more."""


class GroupSpans(NamedTuple):
    """What of packed_gwt_kernels.py lies on a device; programs, holders: as in `packed_on_gpu.Spans`.

    table: as in `Matrices`, of these programs; shares: of each of them.
    """

    spans: torch.Tensor
    programs: torch.Tensor
    pieces: torch.Tensor
    holders: torch.Tensor
    table: torch.Tensor
    shares: torch.Tensor
    previous: torch.Tensor


def adam_of(call: GWTCall) -> packed_on_gpu.Call:
    """Its step on what is not transformed, whose tables all launches share."""
    if "adam" not in call.kept:
        storage, second = call.storage, call.states["block_exp_avg_sq" if call.by_block else "exp_avg_sq"]
        scales = [storage.coded[key].scales if key in storage.coded else {} for key in STATES]
        states = [call.states.get(key, {}) for key in ("update_norm", *STATES)]
        beside = states[0], states[1], scales[0], states[2], scales[1]
        call.kept["adam"] = packed_on_gpu.Call(
            call.parameters, call.gradients, call.states["exp_avg"], second,
            Work(call.dense, NOTHING), {n: _scalars(s, storage.steps[n]) for n, s in call.scalars.items()},
            storage, call.by_block, packed_on_gpu.new_maxima(storage), beside, [call.groups.all],
        )  # fmt: skip
    return call.kept["adam"]


def _scalars(step: GWTScalars, number: int) -> tuple[float, ...]:
    return *adam_scalars(step.dense), 1 / step.correction, step.step_size, number


def measure_groups(call: GWTCall) -> None:
    """Of all groups, once `sums` are complete: norms <- this rank's part."""
    adam = adam_of(call)
    _launch(call, apply=False)
    for first, (numbers, (_, g, *_), device) in launches_that_fill(
        call.norms, [call.groups.all], *adam.typed, moving=call.scalars
    ):
        tables, spans = adam.tables(numbers, device), _spans_of(call, device)
        tabled = spans.shares.nbytes + spans.table.nbytes + call.norms.nbytes
        launch(
            gwt_kernels.matrix_norms, len(call.norms), spans.table, spans.pieces, tables.addresses, tables.scalars,
            call.sums, call.sums.shape[1], call.norms, spans.previous, spans.shares,
            G=KINDS[g], K=call.rule.period, BY_BLOCK=call.by_block, FIRST=first,
            moved=moved_by(call.groups.cut, (), 0, 0, fixed=tabled),
        )  # fmt: skip


def finish_as_kept(call: GWTCall) -> None:
    adam = adam_of(call)
    _measure_maxima(call)
    packed_on_gpu.sums_and_maxima(adam, None)
    for wait in packed_on_gpu.begin_maxima(call.storage, adam.maxima):
        wait()
    _launch(call, apply=True)
    packed_on_gpu.step(adam)


def _measure_maxima(call: GWTCall) -> None:
    adam, groups = adam_of(call), _groups_of(call.storage)
    if groups is None or not groups.num_slots:
        return
    memory = [adam.maxima[key] for key in STATES if key in adam.maxima]
    for first, (numbers, (_, g, *_), device) in launches_that_fill(
        memory[0], [call.groups.all], *adam.typed, moving=call.scalars
    ):
        tables, spans = adam.tables(numbers, device), _spans_of(call, device)
        m, v = _kinds(call, numbers)
        launch(
            packed_gwt_kernels.maxima_of_groups, groups.num_slots, spans.spans, spans.holders, spans.pieces,
            tables.addresses, tables.scalars, call.sums, call.sums.shape[1], memory[0], memory[-1],
            G=KINDS[g], M=m, V=v, K=call.rule.period, BY_BLOCK=call.by_block, FIRST_LAUNCH=first,
            moved=moved_by(call.groups.cut, (), 0, 0, fixed=groups.num_slots * (8 + 4 * len(memory))),
        )  # fmt: skip


def _launch(call: GWTCall, *, apply: bool) -> None:
    adam, limited, runs = adam_of(call), call.norms is not None, call.groups.all
    period, storage = call.rule.period, call.storage
    for numbers, (p, g, _, _, r), device in launches_of([runs], *adam.typed, moving=call.scalars):
        tables, spans = adam.tables(numbers, device), _spans_of(call, device)
        m, v = _kinds(call, numbers)
        first, second = (storage.states[key].probe if key in storage.states else 0 for key in STATES)
        slots = [adam.maxima.get(key, call.sums) for key in STATES]
        weights = (p.itemsize + (r.itemsize if r is not None else 0)) * apply
        of_groups = (m.primitive_bitwidth + (0 if call.by_block else v.primitive_bitwidth)) // 8
        launch(
            packed_gwt_kernels.packed_gwt, len(spans.programs), spans.spans, spans.programs, spans.pieces,
            tables.addresses, tables.scalars, call.sums, call.sums.shape[1], call.norms if limited else call.sums,
            spans.previous, spans.shares, call.rule.limiter or 0.0, *slots,
            P=tl.int16 if r is not None else KINDS[p], G=KINDS[g], M=m, V=v, R=KINDS.get(r), K=period,
            BY_BLOCK=call.by_block, LIMITED=limited, APPLY=apply, PROBE_OF_FIRST=first, PROBE_OF_SECOND=second,
            EACH=_each(period), GROUPS=max(1, TILE // (GROUP * period)), ALIGNED=tables.aligned,
            moved=moved_by(runs, numbers, g.itemsize + weights, weights, of_groups, of_groups * apply),
        )  # fmt: skip


def _each(period: int) -> int:
    """Groups of codes that a program takes."""
    return PROGRAM // (GROUP * period)


def _kinds(call: GWTCall, numbers: Sequence[int]) -> tuple[tl.dtype, tl.dtype]:
    """Of the states of groups."""
    states = [call.states.get(key, {}) for key in STATES]
    kinds = [KINDS[of_call[number].dtype] for of_call in states for number in numbers[:1] if number in of_call]
    return (*kinds, tl.float32, tl.float32)[:2]


def _groups_of(storage: Storage) -> Maxima | None:
    return next((storage.coded[key].groups for key in STATES if key in storage.coded), None)


def _spans_of(call: GWTCall, device: torch.device) -> GroupSpans:
    return kept_with(call.groups.whole, ("group spans", device), lambda: _spans(call, device))


def _spans(call: GWTCall, device: torch.device) -> GroupSpans:
    storage, period = call.storage, call.rule.period
    groups = _groups_of(storage)
    slots, packed = slots_of(groups), next((storage.states[key] for key in STATES if key in storage.states), None)
    holders = np.full(groups.num_slots if groups is not None else 0, -1, dtype=np.int64)
    places = len(call.norms) if call.norms is not None else 0
    table = np.zeros((places, len(MATRIX_FIELDS)), dtype=np.int64)
    table[:, 0] = -1
    spans, pieces, programs = [], [], []
    for (tensor, interval), rows in by_interval(call.groups.all).items():
        offset, begin = (min(row[name] for row in rows) for name in ("offset", "block"))
        count = sum(row["rows"] * row["count"] for row in rows)
        part = Segment(begin, count, begin, begin + count, 0, 0, 0)
        if packed is not None:
            part = segment_at(packed.segments, tensor, begin)
        of_elements = segment_at(storage.segments, tensor, offset)
        assert part.count == count, "segments are those of the intervals"
        to_place, per_row = of_elements.first - offset, -(-part.row // GROUP)
        ends = [
            line * per_row + within // GROUP
            for line, within in (divmod(place, part.row) for place in (part.first, part.first + count - 1))
        ]
        to_scale = part.scale - part.group
        of_ends = [slots.get((tensor, end + to_scale), -1) for end in ends]
        for end, slot in enumerate(of_ends):
            if slot >= 0:
                holders[slot] = 2 * len(spans) + end
        number = -(-(ends[1] - ends[0] + 1) // _each(period))
        if places:
            matrix = rows[0]["matrix"]
            table[matrix] = tensor, interval, rows[0]["numel"], len(programs), len(programs) + number, 0, 0
        programs += [(len(spans), n) for n in range(number)]
        key = of_elements.key & WORD, of_elements.key >> 32
        bounds = part.first, part.first + count, part.row, part.entry - part.first, to_scale
        of_pieces = len(pieces), len(pieces) + len(rows), to_place
        even = _are_even(rows, part, to_place, period)
        spans.append((tensor, *bounds, *key, *ends, *of_ends, *of_pieces, even, rows[0]["matrix"], interval))
        pieces += [[row[name] for name in FIELDS] for row in rows]
    tables = (spans, np.int64, len(GROUP_SPAN_FIELDS)), (programs, np.int32, 2), (pieces, np.int64, len(FIELDS))
    arrays = *(np.array(rows, dtype=dtype).reshape(-1, width) for rows, dtype, width in tables), holders, table
    floats = [torch.empty(count, dtype=torch.float32, device=device) for count in (len(programs), max(places, 1))]
    return GroupSpans(*(torch.from_numpy(array).to(device) for array in arrays), *floats)


def _are_even(rows: Sequence[Mapping[str, int]], part: Segment, to_place: int, period: int) -> bool:
    """Whether words of random bits, and addresses, begin with wavelet groups and with each fourth entry."""
    together = min(period, 4)
    return part.row % 4 == 0 and all(
        row["slot"] < 0
        and row["width"] == period
        and (row["offset"] + to_place) % together == 0
        and row["offset"] % period == row["row_stride"] % period == 0
        for row in rows
    )
