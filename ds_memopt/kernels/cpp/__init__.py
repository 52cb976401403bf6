"""The back end for the CPU: C++ with OpenMP and vectors, compiled at first use. See `BackEnd` for the functions.

It computes in fp32 and covers parameters, gradients and first moments in fp32 and bf16, in any mixture, and whatever a
`Storage` keeps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ds_memopt.kernels.back_ends import GWTCall
from ds_memopt.kernels.codes import CODES
from ds_memopt.kernels.cpp import schedules
from ds_memopt.kernels.cpp.build import library
from ds_memopt.kernels.cpp.noise_on_cpu import add_noise, move
from ds_memopt.kernels.packed import Segment, Segments, Storage
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.plain_gwt import GWTScalars
from ds_memopt.kernels.work import Blocks, Runs, Tensors

__all__ = ["add_noise", "move"]


DTYPES = {torch.float32, torch.bfloat16, *CODES.values()}

KINDS = {torch.float32: 0, torch.bfloat16: 1, CODES["signed"]: 3, CODES["unsigned"]: 4}
BF16_AT_RANDOM = 2
"""`Kind` of packed.h."""
GROUP_STATES = "approximation", "second_moment", "block_exp_avg_sq", "update_norm"
"""As `Tensor` of gwt.cpp has them."""


class _GWTCall(ctypes.Structure):
    """`Call` of gwt.cpp."""

    _fields_ = [
        ("rows", ctypes.c_void_p), ("tasks", ctypes.c_void_p), ("num_tasks", ctypes.c_int64),
        ("shares", ctypes.c_void_p), ("tensors", ctypes.c_void_p), ("scalars", ctypes.c_void_p),
        ("sums", ctypes.c_void_p), ("width", ctypes.c_int64), ("norms", ctypes.c_void_p), ("limiter", ctypes.c_float),
        ("advance", ctypes.c_int64), ("apply", ctypes.c_int64), ("packed", ctypes.c_void_p),
    ]  # fmt: skip


def check() -> None:
    library()


def reason_against(tensors: list[torch.Tensor]) -> str:
    for dtype in {tensor.dtype for tensor in tensors} - DTYPES:
        return f"{str(dtype).removeprefix('torch.')} on a CPU"
    return "" if all(map(torch.Tensor.is_contiguous, tensors)) else "tensors that are not contiguous"


def sum_cut_squares(gradients: Tensors, runs: Runs, slots: torch.Tensor) -> None:
    schedule = schedules.of_cut_blocks(runs)
    _run("ds_sum_cut_squares", schedule, _table(schedule, {}, gradients, {}, {}), slots.zero_())


def adam_mini(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    mean_squares: torch.Tensor | None,
    storage: Storage | None = None,
) -> None:
    """storage: its `new_scales` hold those of shared groups already, and get the others."""
    schedule = schedules.of_blocks(runs) if mean_squares is None else schedules.of_cut_blocks(runs)
    tensors = _table(schedule, parameters, gradients, moments, second_moments)
    packed = None if storage is None else _packed(storage, parameters, {"exp_avg": moments})
    _run("ds_adam_mini", schedule, tensors, _scalars(schedule, scalars, _adam), mean_squares, packed)


def adam_by_element(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    storage: Storage | None = None,
) -> None:
    schedule = schedules.of_elements(runs)
    tensors = _table(schedule, parameters, gradients, moments, second_moments)
    states = {"exp_avg": moments, "exp_avg_sq": second_moments}
    packed = None if storage is None else _packed(storage, parameters, states)
    _run("ds_adam_by_element", schedule, tensors, _scalars(schedule, scalars, _adam), packed)


def adam_mini_as_kept(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
    storage: Storage,
) -> None:
    tensors, work = (parameters, gradients, moments, second_moments), blocks.work
    slots = blocks.new_slots(1)
    if blocks.num_slots:
        sum_cut_squares(gradients, work.cut, slots)
    wait = blocks.begin_sum(slots)
    parts = [schedules.of_blocks(work.whole), schedules.of_cut_blocks(work.cut)]
    _measure_parts(parts, parameters, gradients, {"exp_avg": moments}, scalars, storage)
    storage.complete_new_scales()
    adam_mini(*tensors, work.whole, scalars, None, storage)
    wait()
    if len(work.cut):
        adam_mini(*tensors, work.cut, scalars, slots, storage)
    storage.keep_new_scales()


def adam_by_element_as_kept(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
    storage: Storage,
) -> None:
    tensors, work = (parameters, gradients, moments, second_moments), blocks.work
    parts, states = [schedules.of_elements(work.whole)], {"exp_avg": moments, "exp_avg_sq": second_moments}
    _measure_parts(parts, parameters, gradients, states, scalars, storage)
    storage.complete_new_scales()
    adam_by_element(*tensors, work.whole, scalars, storage)
    storage.keep_new_scales()


def _measure_parts(
    parts: Sequence[schedules.Schedule],
    parameters: Tensors,
    gradients: Tensors,
    states: Mapping[str, Tensors],
    scalars: Mapping[int, AdamScalars],
    storage: Storage,
) -> None:
    """Raise `storage.new_scales`, zeros, of groups of codes that do not lie in one part of the step that follows."""
    packed = _packed(storage, parameters, states)
    for schedule in parts if storage.new_scales else ():
        tensors = _table(schedule, parameters, gradients, states["exp_avg"], {})
        _run("ds_measure_shared_groups", schedule, tensors, _scalars(schedule, scalars, _adam), packed)


def advance_second_moments(
    gradients: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    mean_squares: torch.Tensor | None,
) -> None:
    schedule = schedules.of_blocks(runs) if mean_squares is None else schedules.of_cut_blocks(runs)
    tensors = _table(schedule, {}, gradients, {}, second_moments)
    _run("ds_advance_second_moments", schedule, tensors, _scalars(schedule, scalars, _adam), mean_squares)


def sum_cut_groups(call: GWTCall) -> None:
    runs, sums = call.groups.cut, call.sums.zero_()
    tensors, _ = _tables_of_groups(call)
    _run("ds_sum_cut_groups", runs.rows, len(runs.rows), tensors, call.rule.period, sums, sums.shape[1], threads=False)


def step_whole_groups(call: GWTCall) -> None:
    _step_dense(call, advance=True, apply=not call.waits_for_scales)
    if call.norms is not None:
        call.norms.zero_()
    _step_groups(call, call.groups.whole, advance=True, apply=not call.in_halves)


def step_cut_groups(call: GWTCall) -> None:
    _step_groups(call, call.groups.cut, advance=True, apply=not call.in_halves)


def apply_groups(call: GWTCall) -> None:
    if call.waits_for_scales:
        _step_dense(call, advance=False, apply=True)
    _step_groups(call, call.groups.all, advance=False, apply=True)


def finish_as_kept(call: GWTCall) -> None:
    call.storage.complete_new_scales()
    if call.in_halves:
        apply_groups(call)
    call.storage.keep_new_scales()


def _step_dense(call: GWTCall, *, advance: bool, apply: bool) -> None:
    """The halves are those of states in codes; others make the step at once."""
    scalars = {number: step.dense for number, step in call.scalars.items()}
    of_elements = call.parameters, call.gradients, call.states["exp_avg"]
    schedule = (schedules.of_blocks if call.by_block else schedules.of_elements)(call.dense)
    states = {key: call.states[key] for key in ("exp_avg", "exp_avg_sq") if key in call.states}
    if advance and not apply:
        _measure_parts([schedule], call.parameters, call.gradients, states, scalars, call.storage)
        return
    packed = None if call.storage is None else _packed(call.storage, call.parameters, states)
    function, key = (
        ("ds_adam_by_second_moment", "block_exp_avg_sq") if call.by_block else ("ds_adam_by_element", "exp_avg_sq")
    )
    tensors = _table(schedule, *of_elements, call.states[key])
    _run(function, schedule, tensors, _scalars(schedule, scalars, _adam), packed)


def _step_groups(call: GWTCall, runs: Runs, *, advance: bool, apply: bool) -> None:
    schedule, limited = schedules.of_groups(runs), call.norms is not None
    tensors, steps = _tables_of_groups(call)
    states = {key: call.states[key] for key in ("approximation", "second_moment") if key in call.states}
    packed = None if call.storage is None else _packed(call.storage, call.parameters, states).ctypes.data
    of_call = _GWTCall(
        schedule.rows, schedule.tasks, schedule.num_tasks, schedule.sums, tensors.ctypes.data, steps.ctypes.data,
        call.sums.data_ptr(), call.sums.shape[1], call.norms.data_ptr() if limited else None, call.rule.limiter or 0,
        advance, apply, packed,
    )  # fmt: skip
    _run("ds_gwt", of_call, call.rule.period)


def _tables_of_groups(call: GWTCall) -> tuple[np.ndarray, np.ndarray]:
    """`Tensor` and `Scalars` of gwt.cpp, for all functions of a call."""
    if not call.kept:
        schedule = schedules.of_groups(call.groups.all)
        states = (call.states.get(key, {}) for key in GROUP_STATES)
        call.kept["tensors"] = _table(schedule, call.parameters, call.gradients, *states)
        call.kept["scalars"] = _scalars(schedule, call.scalars, _gwt)
    return call.kept["tensors"], call.kept["scalars"]


def _table(schedule: schedules.Schedule, *tensors: Tensors) -> np.ndarray:
    """`Tensor` of a C++ file by number: pointers, 0 where there is none, and of the tensors that may be bf16 which are.

    tensors: as the struct has them, the gradients second.
    """
    table = np.zeros((schedule.num_tensors, len(tensors) + 1), dtype=np.uint64)
    numbers = [number for number in schedule.numbers if number in tensors[1]]
    if not numbers:
        return table
    rows = np.array(numbers)
    for place, of_call in enumerate(tensors):
        if numbers[0] in of_call:
            column = [of_call[number] for number in numbers]
            table[rows, place] = list(map(torch.Tensor.data_ptr, column))
            dtypes = [tensor.dtype for tensor in column]
            if torch.bfloat16 in dtypes:
                halves = [dtype is torch.bfloat16 for dtype in dtypes]
                table[rows, -1] += np.array(halves, dtype=np.uint64) << np.uint64(place)
    return table


def _packed(storage: Storage, parameters: Tensors, states: Mapping[str, Tensors]) -> np.ndarray:
    """`Packed` of packed.h by number of tensor, for all launches of a step. states: first moments, and second ones if
    they have as many entries."""
    keys = "cpp", *states
    if keys not in storage.derived:
        numbers, remainders = list(parameters), storage.remainders
        rows, with_remainders = (np.array(list(of), dtype=np.int64) for of in (numbers, remainders))
        table = np.zeros((max(numbers, default=-1) + 1, 19), dtype=np.int64)
        table[rows, 0] = _addresses(parameters, numbers)
        table[rows, 1] = [weights.dtype is torch.bfloat16 for weights in parameters.values()]
        table[with_remainders, 2] = _addresses(remainders, remainders)
        table[with_remainders, 3] = [remainder.itemsize for remainder in remainders.values()]
        for place, (key, tensors) in zip((4, 9), states.items(), strict=False):
            for column, values in enumerate(_kept_state(storage, key, tensors, numbers)):
                table[rows, place + column] = values
        for place, segments in ((14, storage.segments), (16, storage.segments_of(*states))):
            table[rows, place : place + 2] = _segments(segments)[rows] if segments is not None else 0
        table[rows, 18] = [storage.steps[number] for number in numbers]
        storage.derived[keys] = table
    return storage.derived[keys]


def _kept_state(storage: Storage, key: str, tensors: Tensors, numbers: Sequence[int]) -> Iterator[int | list[int]]:
    """Columns of `KeptState` of packed.h; all tensors of a state are kept alike."""
    if not tensors:
        return
    packing, dtype = storage.states.get(key), next(iter(tensors.values())).dtype
    coded = packing is not None and packing.scales is not None
    yield _addresses(tensors, numbers)
    yield BF16_AT_RANDOM if packing is not None and not coded and not packing.nearest else KINDS[dtype]
    yield _addresses(packing.scales, numbers) if coded else 0
    yield _addresses(storage.new_scales[key], numbers) if coded else 0
    yield packing.probe if packing is not None else 0


def _addresses(tensors: Tensors, numbers: Iterable[int]) -> list[int]:
    return [tensors[number].data_ptr() for number in numbers]


def _segments(segments: Segments) -> np.ndarray:
    """`Segments` of packed.h by number of tensor."""
    if "cpp" not in segments.derived:
        parts = [sorted(of_tensor) for of_tensor in segments.by_tensor]
        rows = [(*part[:-1], part.key - 2**64 * (part.key >= 2**63)) for of_tensor in parts for part in of_tensor]
        table = np.array(rows, dtype=np.int64).reshape(-1, len(Segment._fields))
        counts = np.array(list(map(len, parts)))
        first = table.ctypes.data + (counts.cumsum() - counts) * table.strides[0]
        segments.derived["cpp"] = table, np.stack([first, counts], axis=1)
    return segments.derived["cpp"][1]


def _scalars(
    schedule: schedules.Schedule, scalars: Mapping[int, Any], of: Callable[[Any], Sequence[float]]
) -> np.ndarray:
    """`Scalars` by number of tensor."""
    table = np.zeros((schedule.num_tensors, 7), dtype=np.float32)
    alike: dict[Any, list[int]] = {}  # tensors of one step: all of a param group, as a rule
    for number in schedule.numbers:
        if number in scalars:
            alike.setdefault(scalars[number], []).append(number)
    for step, numbers in alike.items():
        table[numbers] = of(step)
    return table


def _adam(step: AdamScalars) -> tuple[float, ...]:
    """`Scalars` of adam.cpp."""
    return step.beta2, step.eps, step.decay, step.step_size, 1 / step.root, 1 - step.beta1, 1 - step.beta2


def _gwt(step: GWTScalars) -> tuple[float, ...]:
    """`Scalars` of gwt.cpp."""
    adam = step.dense
    rests = 1 - adam.beta1, 1 - adam.beta2
    return *rests, adam.eps, adam.decay, step.step_size, 1 / adam.root, 1 / step.correction


def _run(function: str, *arguments: Any, threads: bool = True) -> None:
    """Call a C function, which takes the number of threads last if it has any."""
    of_threads = (ctypes.c_int(torch.get_num_threads()),) if threads else ()
    getattr(library(), function)(*map(_argument, arguments), *of_threads)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value
