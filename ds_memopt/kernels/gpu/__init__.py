"""The back end for a GPU: Triton kernels, compiled at first use. See `BackEnd` for the functions.

It computes in fp32 and covers parameters, gradients and first moments in fp32, bf16 and fp16, in any mixture: tensors
of other dtypes than the rest go into a launch of their own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ds_memopt.kernels.gpu import adam_kernels, gwt_kernels
from ds_memopt.kernels.gpu.launches import (
    HELD,
    Tables,
    blocks_of,
    elements_of,
    launch,
    num_tensors,
    of_layout,
    schedule_of,
    shares_of,
    tables_of,
)
from ds_memopt.kernels.gpu.noise_on_gpu import add_noise, move
from ds_memopt.kernels.plain import AdamScalars
from ds_memopt.kernels.plain_gwt import GWTScalars
from ds_memopt.kernels.work import Runs, Tensors

__all__ = ["add_noise", "move"]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

TAKES_STORAGE = False


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
    for dtype in {tensor.dtype for tensor in tensors} - DTYPES.keys():
        return f"{str(dtype).removeprefix('torch.')} on a GPU"
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        return "tensors that are not contiguous"
    return "tensors of several devices in one call" if len({tensor.device for tensor in tensors}) > 1 else ""


def add_mean_squares(gradients: Tensors, runs: Runs, slots: torch.Tensor) -> None:
    _mean_squares(gradients, runs, {}, slots)


def add_mean_squares_of_blocks(gradients: Tensors, runs: Runs, mean_squares: Tensors) -> None:
    _mean_squares(gradients, runs, mean_squares, None)


def _mean_squares(gradients: Tensors, runs: Runs, values: Tensors, slots: torch.Tensor | None) -> None:
    for numbers, (g,), device in _launches(runs, gradients):
        schedule = schedule_of(runs, "blocks", device)
        tables = _tables(runs, numbers, ({}, gradients, {}, values), {}, _adam, device)
        to_slots = slots is not None
        launch(
            adam_kernels.mean_squares, len(schedule.programs), schedule.rows, schedule.programs, tables.addresses,
            slots if to_slots else tables.scalars, slots.shape[1] if to_slots else 0,
            G=DTYPES[g], TO_SLOTS=to_slots,
            moved=_moved(runs, numbers, g.itemsize, 0, 4, 4),
        )  # fmt: skip


def adam_mini(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    mean_squares: torch.Tensor | None,
) -> None:
    sums = "own" if mean_squares is None else "slots"
    _adam_by_block(parameters, gradients, moments, second_moments, runs, scalars, mean_squares, sums)


def adam_by_denominator(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    denominators: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
) -> None:
    _adam_by_block(parameters, gradients, moments, denominators, runs, scalars, None, "none")


def _adam_by_block(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    values: Tensors,
    runs: Runs,
    scalars: Mapping[int, AdamScalars],
    slots: torch.Tensor | None,
    sums: str,
) -> None:
    tensors = parameters, gradients, moments, values
    for numbers, (p, g, m), device in _launches(runs, *tensors[:3], moving=scalars):
        schedule = schedule_of(runs, "blocks", device)
        tables = _tables(runs, numbers, tensors, scalars, _adam, device)
        written = 0 if sums == "none" else 4
        launch(
            adam_kernels.adam_by_block, len(schedule.programs), schedule.rows, schedule.programs, tables.addresses,
            tables.scalars, tables.scalars if slots is None else slots,
            P=DTYPES[p], G=DTYPES[g], M=DTYPES[m], SUMS=sums, ALIGNED=tables.aligned,
            moved=_moved(
                runs, numbers, p.itemsize + g.itemsize + m.itemsize, p.itemsize + m.itemsize, 4, written,
                again=g.itemsize if sums == "own" else 0,
            ),
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
    for numbers, (p, g, m), device in _launches(runs, *tensors[:3], moving=scalars):
        schedule = schedule_of(runs, "elements", device)
        tables = _tables(runs, numbers, tensors, scalars, _adam, device)
        launch(
            adam_kernels.adam_by_element, len(schedule.programs), schedule.rows, schedule.programs, tables.addresses,
            tables.scalars, P=DTYPES[p], G=DTYPES[g], M=DTYPES[m], ALIGNED=tables.aligned,
            moved=_moved(runs, numbers, p.itemsize + g.itemsize + m.itemsize + 4, p.itemsize + m.itemsize + 4),
        )  # fmt: skip


def advance_denominators(second_moments: Tensors, mean_squares: Tensors, scalars: Mapping[int, AdamScalars]) -> None:
    lengths = {number: mean_squares[number].numel() for number in scalars}
    if not any(lengths.values()):
        return
    device, total = mean_squares[next(iter(lengths))].device, sum(lengths.values())
    programs = of_layout(tuple(lengths.items()), device)
    steps = {number: _adam(step) for number, step in scalars.items()}
    tables = tables_of(max(lengths) + 1, ({}, {}, second_moments, mean_squares), steps, device)
    launch(
        adam_kernels.advance_denominators, len(programs), programs, tables.addresses, tables.scalars,
        moved=lambda: (8 * total, 8 * total),
    )  # fmt: skip


def add_group_sums(gradients: Tensors, runs: Runs, period: int, slots: torch.Tensor) -> None:
    for numbers, (g,), device in _launches(runs, gradients):
        schedule = schedule_of(runs, "groups", device, period)
        tables = _tables(runs, numbers, ({}, gradients, {}, {}), {}, _gwt, device)
        width = slots.shape[1]
        launch(
            gwt_kernels.group_sums, _programs_of_rows(runs), schedule.rows, len(runs.rows), tables.addresses, slots,
            width, period, G=DTYPES[g], SQUARES=width > 1,
            moved=_moved(runs, numbers, g.itemsize, 0, 4 * width, 4 * width),
        )  # fmt: skip


def gwt(
    parameters: Tensors,
    gradients: Tensors,
    approximations: Tensors,
    second_moments: Tensors | None,
    denominators: Tensors | None,
    runs: Runs,
    period: int,
    scalars: Mapping[int, GWTScalars],
    sums: torch.Tensor,
    norms: torch.Tensor | None,
    *,
    advance: bool,
    apply: bool,
) -> None:
    by_block, limited = denominators is not None, norms is not None
    tensors = parameters, gradients, approximations, denominators if by_block else second_moments
    for numbers, (p, g), device in _launches(runs, *tensors[:2], moving=scalars):
        schedule = schedule_of(runs, "groups", device, period)
        tables = _tables(runs, numbers, tensors, scalars, _gwt, device)
        shares = shares_of(runs, device, period) if limited and advance else None
        of_groups = 4 if by_block else 8
        launch(
            gwt_kernels.gwt, len(schedule.programs), schedule.rows, schedule.programs, tables.addresses, tables.scalars,
            sums, sums.shape[1], norms if limited else sums, shares.values if shares else sums,
            P=DTYPES[p], G=DTYPES[g], K=period, BY_BLOCK=by_block, LIMITED=limited, ADVANCE=advance, APPLY=apply,
            ALIGNED=tables.aligned,
            moved=_moved(
                runs, numbers, g.itemsize + apply * p.itemsize, apply * p.itemsize, of_groups, advance * of_groups
            ),
        )  # fmt: skip
        if shares:
            launch(
                gwt_kernels.add_shares, len(shares.matrices), shares.matrices, shares.values, norms,
                moved=lambda shares=shares: (shares.values.nbytes + shares.matrices.nbytes, 4 * len(shares.matrices)),
            )  # fmt: skip


def turn_into_growths(norms: torch.Tensor, update_norms: Tensors, runs: Runs, limiter: float) -> None:
    for numbers, _, device in _launches(runs, update_norms):
        schedule = schedule_of(runs, "blocks", device)
        tables = _tables(runs, numbers, (update_norms, {}, {}, {}), {}, _gwt, device)
        launch(
            gwt_kernels.growths, _programs_of_rows(runs), schedule.rows, len(runs.rows), tables.addresses, norms,
            limiter, moved=_moved(runs, numbers, 0, 0, 8, 8),
        )  # fmt: skip


def _launches(
    runs: Runs, *tensors: Tensors, moving: Iterable[int] | None = None
) -> Iterator[tuple[list[int], tuple[torch.dtype, ...], torch.device]]:
    """What has runs and moves, by dtypes: numbers of tensors, dtypes of one of `tensors` each, and the device."""
    combinations: dict[tuple, list[int]] = {}
    for number in tensors[0] if moving is None else moving:
        key = tuple(of_call[number].dtype for of_call in tensors), tensors[0][number].device
        combinations.setdefault(key, []).append(number)
    of_runs = set(runs.column("tensor").tolist())
    for (dtypes, device), numbers in combinations.items():
        # All of them, so that the tables of whole and of cut blocks are the same, and are copied once.
        if not of_runs.isdisjoint(numbers):
            yield numbers, dtypes, device


def _tables(
    runs: Runs,
    numbers: Sequence[int],
    tensors: tuple[Tensors, Tensors, Tensors, Tensors],
    scalars: Mapping[int, Any],
    of: Callable[[Any], tuple[float, ...]],
    device: torch.device,
) -> Tables:
    """Of these tensors; kernels leave runs of others alone."""
    count = max(num_tensors(runs), *(number + 1 for number in numbers))
    of_launch = [{number: of_call[number] for number in numbers if number in of_call} for of_call in tensors]
    steps = {number: of(scalars[number]) for number in numbers if number in scalars}
    return tables_of(count, of_launch, steps, device)


def _moved(
    runs: Runs,
    numbers: Sequence[int],
    read: int,
    written: int,
    read_of_blocks: int = 0,
    written_of_blocks: int = 0,
    again: int = 0,
) -> Callable[[], tuple[int, int]]:
    """Bytes of a launch from those of an element and of a block. again: of elements that a program reads anew."""

    def moved() -> tuple[int, int]:
        elements, blocks = elements_of(runs, numbers), blocks_of(runs, numbers)
        once_more = elements_of(runs, numbers, longer_than=HELD) * again
        return (
            elements * read + once_more + blocks * read_of_blocks,
            elements * written + blocks * written_of_blocks,
        )

    return moved


def _programs_of_rows(runs: Runs) -> int:
    return -(-len(runs.rows) // gwt_kernels.LANES.value)


def _adam(step: AdamScalars) -> tuple[float, ...]:
    """In the order of adam_kernels.py."""
    return 1 - step.beta1, 1 - step.beta2, step.eps, step.decay, step.step_size, 1 / step.root


def _gwt(step: GWTScalars) -> tuple[float, ...]:
    """In the order of gwt_kernels.py."""
    dense = step.dense
    rests = 1 - dense.beta1, 1 - dense.beta2
    return *rests, dense.eps, dense.decay, step.step_size, 1 / dense.root, 1 / step.correction
