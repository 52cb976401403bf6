"""Steps and perturbed copies of the weights that are stored themselves, where no engine keeps fp32 masters of them.

A fused back end gives the bits of plain PyTorch, in one pass over the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ds_memopt.kernels import noise_formulas
from ds_memopt.kernels.back_ends import BackEnd, back_end_for, tell_of_plain
from ds_memopt.kernels.noise_formulas import NoiseSource
from ds_memopt.kernels.residual import add_residual_, residual_of

PIECE = 2**20
"""Elements that plain PyTorch updates at once, so that temporary memory stays small."""

DTYPES = (torch.float32, torch.bfloat16)
"""Of the weights and gradients that fused back ends cover."""


class NoiseSum(Protocol):
    """A sum of noise terms, which is made anew for any part of a parameter."""

    start: int

    def sources(self) -> list[tuple[NoiseSource, float]] | None:
        """The noise of each term and its factor, from element `start` on; None where the sum is something else."""

    def add_(self, direction: torch.Tensor, weights: torch.Tensor, start: int) -> None:
        """Add it to the direction of elements [start, start + len(direction)), which hold these weights."""


@dataclass(frozen=True, eq=False)
class Step:
    """theta <- theta * (1 - lr * weight_decay) - lr * (share * gradient + noise), in fp32 or better.

    weights: 1-D, of 16, 32 or 64 bits. kept: of 16-bit weights what rounding drops, int16, or fp32 masters, or None.
    lr: a number, or a tensor without dimensions. gradient: of the same elements.
    """

    weights: torch.Tensor
    kept: torch.Tensor | None
    lr: float | torch.Tensor
    weight_decay: float
    gradient: torch.Tensor | None = None
    share: float = 1.0
    noise: NoiseSum | None = None

    @property
    def decay(self) -> float | torch.Tensor:
        return 1 - self.lr * self.weight_decay

    @property
    def start(self) -> int:
        """Number of the first element, as the noise counts."""
        return self.noise.start if self.noise is not None else 0

    @functools.cached_property
    def sources(self) -> list[tuple[NoiseSource, float]] | None:
        """Those of the noise. With momentum they are many."""
        return self.noise.sources() if self.noise is not None else []


class Moved(NamedTuple):
    """How far weights went: `realised`, the movement along what was intended, and `intended`, that along itself."""

    realised: torch.Tensor | float
    intended: torch.Tensor | float

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.realised + other.realised, self.intended + other.intended)


def add_noise(
    out: torch.Tensor,
    weights: torch.Tensor | None,
    source: NoiseSource,
    start: int,
    scale: float | torch.Tensor = 1.0,
) -> None:
    """out <- weights + scale * z, for the elements of a parameter from `start` on; without weights out <- z.

    out: 1-D; it may be `weights`. scale * z is rounded to fp32, then the sum to fp32, then to the dtype of `out`.
    scale: a number, or a tensor without dimensions.
    """
    fused = back_end_for(out.device)
    a_number = not isinstance(scale, torch.Tensor)  # to ask a tensor for it would wait for its device
    if fused is not None and a_number and _covers(out, out if weights is None else weights):
        fused.add_noise(out, weights, source, start, scale)
        return
    if weights is not None and weights is not out:
        out.copy_(weights)
    for piece in out.split(noise_formulas.PIECE.get(out.device.type, noise_formulas.PIECE_ELSEWHERE)):
        z = _elements(fused, source, start, len(piece), out.device)
        # Two operations: add_(z, alpha=scale) may contract them to one rounding, depending on the machine.
        piece.copy_(z) if weights is None else piece.add_(z.mul_(scale))
        start += len(piece)


def _covers(*tensors: torch.Tensor) -> bool:
    """Whether tensors are alike, and as fused back ends take them."""
    first = tensors[0]
    return first.dtype in DTYPES and all(
        tensor.dtype == first.dtype and tensor.device == first.device and tensor.is_contiguous() for tensor in tensors
    )


def _elements(
    fused: BackEnd | None, source: NoiseSource, start: int, length: int, device: torch.device
) -> torch.Tensor:
    if fused is None:
        return noise_formulas.elements(source, start, length, device)
    z = torch.empty(length, device=device)
    fused.add_noise(z, None, source, start, 1.0)
    return z


def move(steps: Sequence[Step], moved: Moved) -> Moved:
    """Make the steps. moved: by earlier calls. Returns the sum of it and of what this call moved."""
    fused = back_end_for(steps[0].weights.device) if steps else None
    covered = []
    for step in steps:
        reason = _reason_against(step) if fused is not None else ""
        if fused is not None and not reason:
            covered.append(step)
            continue
        if reason:
            tell_of_plain(reason)
        moved += _move_plainly(step)
    return moved + fused.move(covered) if covered else moved


def _reason_against(step: Step) -> str:
    """What fused back ends lack for it; "" if nothing."""
    weights, gradient, kept = step.weights, step.gradient, step.kept
    beside = [tensor for tensor in (gradient, kept) if tensor is not None]
    for tensor in (weights, gradient) if gradient is not None else (weights,):
        if tensor.dtype not in DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} weights or gradients"
    if any(tensor.device != weights.device or not tensor.is_contiguous() for tensor in (weights, *beside)):
        return "tensors of several devices, and such that are not contiguous"
    if step.sources is None:
        return "noise of low rank, and of some of a matrix's weights"
    return ""


def _move_plainly(step: Step) -> Moved:
    weights, kept, lr = step.weights, step.kept, step.lr
    moved = Moved(0.0, 0.0)
    for start in range(0, len(weights), PIECE):
        piece = slice(start, start + PIECE)
        stored, beside = weights[piece], kept[piece] if kept is not None else None
        before = masters(stored, beside)
        direction = torch.zeros_like(before)
        if step.gradient is not None:
            direction.add_(step.gradient[piece], alpha=step.share)
        if step.noise is not None:
            step.noise.add_(direction, stored, start)
        after = before * step.decay - lr * direction
        stored.copy_(after)
        if beside is not None:
            beside.copy_(residual_of(after) if beside.dtype == torch.int16 else after)
        wanted = after - before
        moved += Moved(torch.dot(masters(stored, beside) - before, wanted), torch.dot(wanted, wanted))
    return moved


def masters(weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """A copy of the weights, with what is kept of them, in fp32 or better."""
    if kept is not None and kept.dtype != torch.int16:
        return kept.clone()
    copy = weights.to(torch.float64 if weights.dtype == torch.float64 else torch.float32, copy=True)
    if kept is not None:
        add_residual_(copy, kept)
    return copy
