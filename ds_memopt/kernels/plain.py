"""The arithmetic of whole optimizer calls in plain PyTorch: the reference for any other back end.

Each function takes the tensors of one call by their numbers, this rank's elements of each, 1-D: parameters, gradients
and states of one entry per element, or values of one entry per block. `table` tells which element belongs to which
block. What a rank border cuts takes two calls: sums, which the caller completes over the ranks, then the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch

from ds_memopt.kernels.descriptors import ColumnPiece, Piece, Table
from ds_memopt.kernels.work import Tensors

SHORT = 32
"""Runs of up to so many elements, a power of two, are added up by halves: 0.16 instead of 0.4 ns per element."""


class AdamScalars(NamedTuple):
    """One tensor's step of Adam: m <- m + (1 - beta1) * (g - m), v <- v + (1 - beta2) * (g^2 - v),

    p <- p * decay - step_size * m / (sqrt(v) / root + eps)
    """

    beta1: float
    beta2: float
    eps: float
    decay: float
    step_size: float
    root: float

    @classmethod
    def at(cls, step: float, group: Mapping[str, Any]) -> Self:
        """AdamW's at step 1, 2, ..., with the lr, betas, eps and weight_decay of a param group."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        decay = 1 - lr * group["weight_decay"]
        return cls(beta1, beta2, group["eps"], decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5)

    def denominator(self, v: torch.Tensor) -> torch.Tensor:
        """What m is divided by, a new tensor."""
        root = v.sqrt()
        return (root.div_(self.root) if self.root != 1 else root).add_(self.eps)


def add_means(values: Tensors, table: Table, means: Tensors, size: int) -> None:
    """Add to each block's mean the sum of its elements, divided by `size`. Not for columns."""
    for number, flat in values.items():
        for piece in table[number]:
            runs = _sum_of_runs(piece.elements(flat).to(means[number].dtype))
            piece.blocks(means[number]).add_(runs, alpha=1 / size)


def add_mean_squares(values: Tensors, table: Table, means: Tensors) -> None:
    """Add to each block's mean square the squares of its elements, divided by its size in the whole parameter."""
    for number, flat in values.items():
        for piece in table[number]:
            _add_mean_squares(piece, flat, means[number])


def add_sums_of_blocks(
    sums: Tensors, terms: Sequence[tuple[Tensors, int | None]], table: Table, sizes: Mapping[int, Sequence[int]]
) -> None:
    """Add to the one sum of each interval the values of its blocks, each weighted by its elements. Not for columns.

    Of a block that ranks share each thus adds its part, and together they add it once.

    terms: values per block, and None: each element counts once; or a length: a whole block counts as so many elements,
        however many it has. sizes: by what each interval's sum is divided.
    """
    for number, of_intervals in sums.items():
        for piece in table[number]:
            for values, length in terms:
                share = (length / piece.size if length else 1.0) / sizes[number][piece.interval]
                total = piece.blocks(values[number]).sum() * piece.width
                of_intervals[piece.interval].add_(total, alpha=share)


def divide_blocks(per_block: Tensors, divisors: Tensors, table: Table) -> None:
    """Divide the values of all blocks of an interval by the one number that the interval has. Not for columns."""
    for number, values in per_block.items():
        for piece in table[number]:
            piece.blocks(values).div_(divisors[number][piece.interval])


def multiply_elements(values: Tensors, per_block: Tensors, table: Table) -> None:
    """Multiply each element by the value of its block: with the rows' table and the columns' by an outer product."""
    for number, flat in values.items():
        for piece in table[number]:
            piece.elements(flat).mul_(piece.per_element(per_block[number]))


def adam_mini(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    mean_squares: Tensors,
    table: Table,
    scalars: Mapping[int, AdamScalars],
) -> None:
    """Adam with one second moment per block. mean_squares: of each whole block's gradient."""
    for number, step in scalars.items():
        v = second_moments[number]
        v.mul_(step.beta2).add_(mean_squares[number], alpha=1 - step.beta2)
        denominators = {number: step.denominator(v)}
        adam_by_block(parameters, gradients, moments, denominators, table, {number: step})


def adam_by_block(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    denominators: Tensors,
    table: Table,
    scalars: Mapping[int, AdamScalars],
) -> None:
    """Adam's update with the denominators given, one per block."""
    for number, step in scalars.items():
        for piece in table[number]:
            denominator = piece.per_element(denominators[number])
            _adam(piece, parameters[number], gradients[number], moments[number], denominator, step)


def adam_by_element(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    table: Table,
    scalars: Mapping[int, AdamScalars],
) -> None:
    """Adam as it is: one second moment per element."""
    for number, step in scalars.items():
        for piece in table[number]:
            v = piece.entries(second_moments[number])
            g = piece.elements(gradients[number]).to(v.dtype)
            v.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
            _adam(piece, parameters[number], gradients[number], moments[number], step.denominator(v), step)


def add_scaled_and_shifted(
    parameters: Tensors,
    gradients: Tensors,
    scales: Tensors,
    shifts: Tensors,
    table: Table,
    decays: Mapping[int, float],
    factors: Mapping[int, float],
) -> None:
    """p <- p * decay + factor * (g * scale + shift), with one scale and one shift per block."""
    for number, factor in factors.items():
        for piece in table[number]:
            parameter, scale = piece.elements(parameters[number]), piece.per_element(scales[number])
            if decays[number] != 1:
                parameter.mul_(decays[number])
            parameter.addcmul_(piece.elements(gradients[number]).to(scale.dtype), scale, value=factor)
            parameter.add_(piece.per_element(shifts[number]), alpha=factor)


def _adam(
    piece: Piece,
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    moment: torch.Tensor,
    denominator: torch.Tensor,
    step: AdamScalars,
) -> None:
    """m may be kept in 16 bits; the step is computed in the denominator's dtype."""
    p, g, m = piece.elements(parameter), piece.elements(gradient), piece.entries(moment)
    new_m = m.to(denominator.dtype).lerp_(g.to(denominator.dtype), 1 - step.beta1)
    if new_m.dtype != m.dtype:
        m.copy_(new_m)
    if step.decay != 1:
        p.mul_(step.decay)
    p.addcdiv_(new_m, denominator, value=-step.step_size)


def _add_mean_squares(piece: Piece, flat: torch.Tensor, means: torch.Tensor) -> None:
    elements = piece.elements(flat)
    if isinstance(piece, ColumnPiece):
        squares = torch.linalg.vector_norm(elements, dim=0, dtype=means.dtype).square_()
        # Not index_add_, whose order of sums, and so the result, changes from run to run on a GPU.
        for column, count, width, block, size in piece.runs:
            sums = squares.narrow(0, column, count * width).view(count, width).sum(-1)
            means.narrow(0, block, count).add_(sums, alpha=1 / size)
    elif piece.width <= SHORT:
        piece.blocks(means).add_(_sum_of_runs(elements.to(means.dtype).square()), alpha=1 / piece.size)
    else:
        norms = torch.linalg.vector_norm(elements, dim=-1, dtype=means.dtype)
        piece.blocks(means).addcmul_(norms, norms, value=1 / piece.size)


def _sum_of_runs(values: torch.Tensor) -> torch.Tensor:
    """[rows, count, width] -> [rows, count]. Overwrites nothing of `values`."""
    width = values.shape[-1]
    if width > SHORT or width & (width - 1):
        return values.sum(-1)
    while values.shape[-1] > 1:
        values = values[..., ::2] + values[..., 1::2]
    return values.squeeze(-1)
