"""The back end for a GPU: Triton kernels, compiled at first use. See `BackEnd` for the functions.

It computes in fp32 and covers parameters, gradients and first moments in fp32, bf16 and fp16, in any mixture, and for
AdamMini and AdamW whatever a `Storage` keeps: tensors of other dtypes than the rest go into a launch of their own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence

import torch
import triton

from ds_memopt.kernels.back_ends import GWTCall
from ds_memopt.kernels.codes import CODES
from ds_memopt.kernels.gpu import adam_kernels, gwt_kernels
from ds_memopt.kernels.gpu.launches import (
    DTYPES,
    TILE,
    Matrices,
    Tables,
    adam_scalars,
    holders_of,
    launch,
    launches_of,
    launches_that_fill,
    matrices_of,
    moved_by,
    schedule_of,
    tables_of,
)
from ds_memopt.kernels.gpu.noise_on_gpu import add_noise, move
from ds_memopt.kernels.gpu.packed_gwt_on_gpu import adam_of, finish_as_kept, measure_groups
from ds_memopt.kernels.gpu.packed_on_gpu import adam_by_element_as_kept, adam_mini_as_kept
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.plain_gwt import GWTScalars
from ds_memopt.kernels.work import Runs, Tensors

__all__ = ["adam_by_element_as_kept", "adam_mini_as_kept", "add_noise", "move", "finish_as_kept"]

GROUP_STATES = "update_norm", "approximation", "second_moment"
"""Their addresses follow those of Adam on what is not transformed, as gwt_kernels.py has them."""


def check() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    try:
        triton.runtime.driver.active.get_current_target()  # it builds what starts kernels, by a C compiler
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"Triton cannot start kernels: {error}") from error


def reason_against(tensors: list[torch.Tensor]) -> str:
    for dtype in {tensor.dtype for tensor in tensors} - {*DTYPES, *CODES.values()}:
        return f"{str(dtype).removeprefix('torch.')} on a GPU"
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        return "tensors that are not contiguous"
    return "tensors of several devices in one call" if len({tensor.device for tensor in tensors}) > 1 else ""


def sum_cut_squares(gradients: Tensors, runs: Runs, slots: torch.Tensor) -> None:
    for first, (numbers, (g,), device) in launches_that_fill(slots, [runs], gradients):
        schedule, holders = schedule_of(runs, "blocks", device), holders_of(runs, len(slots), device)
        tables = tables_of([runs], numbers, ({}, gradients), {}, adam_scalars, device)
        tiles = first * -(-len(slots) // TILE)
        launch(
            adam_kernels.cut_squares, len(runs) + tiles, schedule.rows, len(runs), tables.addresses, holders, slots,
            len(slots), G=DTYPES[g], FIRST=first,
            moved=moved_by(runs, numbers, g.itemsize, 0, 0, 4, fixed=first * slots.nbytes),
        )  # fmt: skip


def advance_second_moments(
    gradients: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    mean_squares: torch.Tensor | None,
) -> None:
    _adam_by_block({}, gradients, {}, second_moments, runs, scalars, mean_squares)


def adam_mini(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    mean_squares: torch.Tensor | None,
) -> None:
    _adam_by_block(parameters, gradients, moments, second_moments, runs, scalars, mean_squares)


def _adam_by_block(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    slots: torch.Tensor | None,
) -> None:
    """Without parameters and moments the second moments alone advance."""
    own, move = slots is None, bool(parameters)
    moving = parameters, gradients, moments
    for numbers, dtypes, device in launches_of([runs], *(moving if move else [gradients]), moving=scalars):
        p, g, m = dtypes if move else (*dtypes,) * 3
        schedule = schedule_of(runs, "blocks", device)
        tables = tables_of([runs], numbers, (*moving, second_moments), scalars, adam_scalars, device)
        written = move * (p.itemsize + m.itemsize)
        read = written + (own or move) * g.itemsize
        launch(
            adam_kernels.adam_by_block, len(schedule.programs), schedule.rows, schedule.programs, tables.addresses,
            tables.scalars, tables.scalars if own else slots,
            P=DTYPES[p], G=DTYPES[g], M=DTYPES[m], SUMS="own" if own else "slots", MOVE=move, ALIGNED=tables.aligned,
            moved=moved_by(runs, numbers, read, written, 4, 4, again=g.itemsize if own and move else 0),
        )  # fmt: skip


def adam_by_element(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
) -> None:
    tensors = parameters, gradients, moments, second_moments
    for numbers, (p, g, m), device in launches_of([runs], *tensors[:3], moving=scalars):
        schedule = schedule_of(runs, "elements", device)
        tables = tables_of([runs], numbers, tensors, scalars, adam_scalars, device)
        launch(
            adam_kernels.adam_by_element, len(schedule.programs), schedule.rows, schedule.programs, tables.addresses,
            tables.scalars, P=DTYPES[p], G=DTYPES[g], M=DTYPES[m], ALIGNED=tables.aligned,
            moved=moved_by(runs, numbers, p.itemsize + g.itemsize + m.itemsize + 4, p.itemsize + m.itemsize + 4),
        )  # fmt: skip


def sum_cut_groups(call: GWTCall) -> None:
    runs, slots, period = call.groups.cut, call.sums, call.rule.period
    for first, (numbers, (_, g, _), device) in launches_that_fill(slots, [runs], *_typed(call), moving=call.scalars):
        schedule, holders = schedule_of(runs, "groups", device, period), holders_of(runs, len(slots), device)
        programs = -(-len(slots) // gwt_kernels.LANES.value)
        launch(
            gwt_kernels.cut_groups, programs, schedule.rows, _tables_of(call, numbers, device).addresses, holders,
            slots, *slots.shape, period, G=DTYPES[g], SQUARES=slots.shape[1] > 1, FIRST=first,
            moved=moved_by(runs, numbers, g.itemsize, 0, 0, 4 * slots.shape[1], fixed=first * slots.nbytes),
        )  # fmt: skip


def step_whole_groups(call: GWTCall) -> None:
    if call.storage is None:
        _step(call, call.groups.whole, call.dense, advance=True, apply=call.norms is None)


def step_cut_groups(call: GWTCall) -> None:
    if call.storage is not None:
        if call.norms is not None:
            measure_groups(call)
        return
    if call.norms is None:
        _step(call, call.groups.cut, None, advance=True, apply=True)
        return
    runs = [call.groups.all]
    for first, (numbers, (_, g, _), device) in launches_that_fill(call.norms, runs, *_typed(call), moving=call.scalars):
        tables, matrices = _tables_of(call, numbers, device), _matrices_of(call, device)
        of_groups = 4 if call.by_block else 8
        launch(
            gwt_kernels.matrix_norms, len(call.norms), matrices.table, matrices.cut, tables.addresses, tables.scalars,
            call.sums, call.sums.shape[1], call.norms, matrices.previous, matrices.shares,
            G=DTYPES[g], K=call.rule.period, BY_BLOCK=call.by_block, FIRST=first,
            moved=moved_by(
                call.groups.cut, numbers, g.itemsize, 0, of_groups, of_groups,
                fixed=matrices.shares.nbytes + matrices.table.nbytes + call.norms.nbytes,
            ),
        )  # fmt: skip


def apply_groups(call: GWTCall) -> None:
    _step(call, call.groups.all, None, advance=False, apply=True)


def _step(call: GWTCall, runs: Runs, dense: Runs | None, *, advance: bool, apply: bool) -> None:
    """A launch of groups, and of what is not transformed; `dense` None: of groups alone."""
    period, limited, by_block = call.rule.period, call.norms is not None, call.by_block
    together = [runs] if dense is None else [runs, dense]
    for numbers, (p, g, m), device in launches_of(together, *_typed(call), moving=call.scalars):
        schedule, tables = schedule_of(runs, "groups", device, period), _tables_of(call, numbers, device)
        of_dense = schedule if dense is None else schedule_of(dense, "blocks" if by_block else "elements", device)
        num_dense = 0 if dense is None else len(of_dense.programs)
        matrices = _matrices_of(call, device) if limited else None
        launch(
            gwt_kernels.gwt, num_dense + len(schedule.programs), schedule.rows, schedule.programs, of_dense.rows,
            of_dense.programs, num_dense, tables.addresses, tables.scalars, call.sums, call.sums.shape[1],
            call.norms if limited else call.sums, matrices.previous if limited else call.sums,
            matrices.shares if limited else call.sums, call.rule.limiter or 0.0,
            P=DTYPES[p], G=DTYPES[g], M=DTYPES[m], K=period, BY_BLOCK=by_block, LIMITED=limited, ADVANCE=advance,
            APPLY=apply, DENSE=dense is not None, ALIGNED=tables.aligned,
            moved=_moved_by_step(call, runs, dense, numbers, (p, g, m), advance=advance, apply=apply),
        )  # fmt: skip


def _moved_by_step(
    call: GWTCall,
    runs: Runs,
    dense: Runs | None,
    numbers: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    advance: bool,
    apply: bool,
) -> Callable[[], tuple[int, int]]:
    p, g, m = (dtype.itemsize for dtype in dtypes)
    of_group, of_element = (4, 0) if call.by_block else (8, 4)
    of_groups = moved_by(runs, numbers, g + apply * p, apply * p, of_group, advance * of_group)
    if dense is None:
        return of_groups
    of_dense = moved_by(dense, numbers, p + g + m + of_element, p + m + of_element, 4 * call.by_block)
    return lambda: tuple(map(sum, zip(of_groups(), of_dense(), strict=True)))


def _typed(call: GWTCall) -> tuple[Tensors, Tensors, Tensors]:
    """The tensors whose dtypes a launch has in common."""
    return call.parameters, call.gradients, call.states["exp_avg"]


def _tables_of(call: GWTCall, numbers: Sequence[int], device: torch.device) -> Tables:
    """The same for all launches of a call."""
    if call.storage is not None:
        return adam_of(call).tables(numbers, device)
    key = tuple(numbers), device
    if key not in call.kept:
        states = (call.states.get(name, {}) for name in GROUP_STATES)
        second = call.states["block_exp_avg_sq" if call.by_block else "exp_avg_sq"]
        tensors = *_typed(call), second, *states
        call.kept[key] = tables_of([call.groups.all, call.dense], numbers, tensors, call.scalars, _gwt, device)
    return call.kept[key]


def _matrices_of(call: GWTCall, device: torch.device) -> Matrices:
    return matrices_of(call.groups, len(call.norms), device, call.rule.period)


def _gwt(step: GWTScalars) -> tuple[float, ...]:
    """In the order of adam_kernels.py."""
    return *adam_scalars(step.dense), 1 / step.correction, step.step_size
