"""A step of the weights that are stored themselves, where no engine keeps fp32 masters of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from ds_memopt.kernels.residual import add_residual_, residual_of

PIECE = 2**20
"""Elements that are updated at once, so that temporary memory stays small."""


class NoiseSum(Protocol):
    """A sum of noise terms, which is made anew for any part of a parameter."""

    def add_(self, direction: torch.Tensor, weights: torch.Tensor, start: int) -> None:
        """Add it to the direction of elements [start, start + len(direction)), which hold these weights."""


class Moved(NamedTuple):
    """How far weights went: `realised`, the movement along what was intended, and `intended`, that along itself."""

    realised: torch.Tensor | float
    intended: torch.Tensor | float


def move(
    weights: torch.Tensor,
    kept: torch.Tensor | None,
    lr: float | torch.Tensor,
    weight_decay: float,
    moved: Moved,
    *,
    gradient: torch.Tensor | None = None,
    share: float = 1.0,
    noise: NoiseSum | None = None,
) -> Moved:
    """theta <- theta * (1 - lr * weight_decay) - lr * (share * gradient + noise), in fp32 or better.

    weights: 1-D, of 16, 32 or 64 bits. kept: of 16-bit weights what rounding drops, int16, or fp32 masters, or None.
    lr: a number, or a tensor without dimensions. moved: by earlier calls. gradient: of the same elements.
    Returns the sum of `moved` and of what this call moved.
    """
    realised, intended = moved
    for start in range(0, len(weights), PIECE):
        piece = slice(start, start + PIECE)
        stored, beside = weights[piece], kept[piece] if kept is not None else None
        before = masters(stored, beside)
        direction = torch.zeros_like(before)
        if gradient is not None:
            direction.add_(gradient[piece], alpha=share)
        if noise is not None:
            noise.add_(direction, stored, start)
        after = before * (1 - lr * weight_decay) - lr * direction
        stored.copy_(after)
        if beside is not None:
            beside.copy_(residual_of(after) if beside.dtype == torch.int16 else after)
        wanted = after - before
        realised = realised + torch.dot(masters(stored, beside) - before, wanted)
        intended = intended + torch.dot(wanted, wanted)
    return Moved(realised, intended)


def masters(weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """A copy of the weights, with what is kept of them, in fp32 or better."""
    if kept is not None and kept.dtype != torch.int16:
        return kept.clone()
    copy = weights.to(torch.float64 if weights.dtype == torch.float64 else torch.float32, copy=True)
    if kept is not None:
        add_residual_(copy, kept)
    return copy
