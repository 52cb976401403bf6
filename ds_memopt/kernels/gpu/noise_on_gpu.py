"""Noise and the steps of stored weights in Triton, see noise_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton.language as tl

from ds_memopt.kernels.gpu import noise_kernels
from ds_memopt.kernels.gpu.launches import address, launch
from ds_memopt.kernels.noise_formulas import FORMULAS, WORD, NoiseSource
from ds_memopt.kernels.stored_weights import Moved, Step

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
TILE = noise_kernels.TILE.value


def add_noise(out: torch.Tensor, weights: torch.Tensor | None, source: NoiseSource, start: int, scale: float) -> None:
    values, skip, size = weights is None, start % source.per_counter, out.nbytes
    numbers = skip, len(out), address(out), 0 if values else address(weights)
    launch(
        noise_kernels.add_noise, _programs(len(out), skip), out, out if values else weights, len(out), start,
        source.step, source.probe, source.key & WORD, source.key >> 32, float(scale),
        GAUSSIAN=source.kind == "gaussian", VALUES=values, ALIGNED=_are_aligned(*numbers),
        moved=lambda: (0 if values else size, size),
    )  # fmt: skip


def move(steps: Sequence[Step]) -> Moved:
    """One launch for each combination of dtypes, of what is aligned and what is not."""
    launches: dict[tuple, list[Step]] = {}
    for step in steps:
        if len(step.weights):
            launches.setdefault(_constants(step), []).append(step)
    moved = Moved(0.0, 0.0)
    for constants, of_launch in launches.items():
        moved += _move(of_launch, *constants)
    return moved


def _constants(step: Step) -> tuple:
    """Dtypes of weights and gradient, what is kept, whether noise is Gaussian, and whether the step is aligned."""
    weights, gradient, kept = step.weights, step.gradient, step.kept
    kinds = {source.kind for source, _ in step.sources}
    assert len(kinds) <= 1, "a run has one kind of noise"
    gaussian = kinds != {"rademacher"}
    word = "none" if kept is None else "residual" if kept.dtype == torch.int16 else "fp32"
    aligned = _are_aligned(step.start % _per_counter(gaussian), len(weights), *_addresses(step))
    return weights.dtype, None if gradient is None else gradient.dtype, word, gaussian, aligned


def _move(
    steps: list[Step],
    weights_dtype: torch.dtype,
    gradient_dtype: torch.dtype | None,
    kept: str,
    gaussian: bool,
    aligned: bool,
) -> Moved:
    device = steps[0].weights.device
    parts, noises, factors, programs = [], [], [], 0
    for step in steps:
        terms, count = step.sources, len(step.weights)
        parts.append((*_addresses(step), count, step.start, programs, len(factors), len(terms)))
        noises += [(source.key & WORD, source.key >> 32, source.step, source.probe) for source, _ in terms]
        factors += [factor for _, factor in terms]
        programs += _programs(count, step.start % _per_counter(gaussian))
    sums = torch.empty(programs, 2, device=device)
    sizes = (steps[0].weights, steps[0].kept, steps[0].gradient)
    weights_size, kept_size, gradient_size = (0 if tensor is None else tensor.itemsize for tensor in sizes)
    total = sum(len(step.weights) for step in steps)
    launch(
        noise_kernels.move, programs, _upload(parts, np.int64, device), len(parts), _scalars(steps, device),
        _upload(noises, np.int64, device), _upload(factors, np.float32, device), sums,
        W=DTYPES[weights_dtype], KEPT=kept, G=DTYPES.get(gradient_dtype), GAUSSIAN=gaussian, ALIGNED=aligned,
        moved=lambda: (total * (weights_size + kept_size + gradient_size), total * (weights_size + kept_size)),
    )  # fmt: skip
    return Moved(*sums.sum(0, dtype=torch.float64))


def _scalars(steps: list[Step], device: torch.device) -> torch.Tensor:
    """decay, lr and share of each step; rates that are tensors stay on the device."""
    rows = [[0.0 if isinstance(value, torch.Tensor) else value for value in _row(step)] for step in steps]
    table = _upload(rows, np.float32, device)
    for number, step in enumerate(steps):
        if isinstance(step.lr, torch.Tensor):
            table[number, :2].copy_(torch.stack([step.decay, step.lr]))
    return table


def _row(step: Step) -> tuple:
    return step.decay, step.lr, step.share


def _addresses(step: Step) -> list[int]:
    return [0 if tensor is None else address(tensor) for tensor in (step.weights, step.kept, step.gradient)]


def _are_aligned(skip: int, *numbers: int) -> bool:
    """See `_places` of noise_kernels.py."""
    return skip == 0 and all(number % 16 == 0 for number in numbers)


def _per_counter(gaussian: bool) -> int:
    return FORMULAS["gaussian" if gaussian else "rademacher"][1]


def _programs(count: int, skip: int) -> int:
    return -(-(count + skip) // TILE) if count else 0


def _upload(rows: list, dtype: type, device: torch.device) -> torch.Tensor:
    """Copied in the order of the stream, without waiting for it."""
    table = torch.from_numpy(np.array(rows, dtype=dtype))
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
