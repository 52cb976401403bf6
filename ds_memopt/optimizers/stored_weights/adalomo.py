"""AdaLomo's rule: a factored second moment, and steps relative to the size of a parameter.

Source: Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate" (arXiv 2310.10195), Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ds_memopt.shards import Part

TINY, SMALLEST_SIZE, LARGEST_RMS, DECAY = 1e-30, 1e-3, 1.0, -0.8
"""Added to squares; what a parameter's root mean square counts as at least; what an update's may be; of b_t."""


class Matrices(NamedTuple):
    """A parameter [..., R, C] as B = prod(...) matrices. One of fewer dimensions is not factored: B = R = 0."""

    count: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: Sequence[int]) -> Matrices:
        if len(shape) < 2:
            return cls(0, 0, 0)
        return cls(math.prod(shape[:-2]), shape[-2], shape[-1])


class AdaLomo:
    """At step t, with b = 1 - t^-0.8, for a matrix [R, C] and its gradient g:

        r <- b r + (1 - b) mean_over_columns(g^2),  c <- b c + (1 - b) mean_over_rows(g^2)
        u = g / sqrt(r c^T / mean(r)),  u <- u / max(1, rms(u))
        theta <- theta - lr * max(1e-3, rms(theta)) * u

    and with all of g's squares for what has fewer than two dimensions. A rank needs r and c of the whole matrix, which
    take 4 bytes per row and column and are equal on all ranks; the squares of vectors are sharded as the weights are.
    """

    def new_state(self, part: Part, shape: Sequence[int]) -> dict[str, tuple[int, torch.Tensor]]:
        """Zero state of a part, and for each the number of its first entry in that of the whole parameter."""
        count, rows, columns = Matrices.of(shape)
        dtype = torch.promote_types(part.elements.dtype, torch.float32)
        if not count:
            return {"square": (part.start, torch.zeros_like(part.elements, dtype=dtype))}
        zeros = part.elements.new_zeros
        return {"row": (0, zeros(count * rows, dtype=dtype)), "column": (0, zeros(count * columns, dtype=dtype))}

    def directions(
        self,
        bucket: list[tuple[Part, torch.Tensor]],
        shapes: Sequence[Sequence[int]],
        states: Sequence[dict[str, torch.Tensor]],
        step: int,
        sum_of_parts: Callable[[torch.Tensor], None],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each part and its gradient: u, and by what the learning rate is to be multiplied.

        states: as `new_state` made them; updated in place. step: t, from 1. sum_of_parts: sums over ranks, in place.
        """
        decay = 1 - step**DECAY
        means = []
        for (part, gradient), shape, state in zip(bucket, shapes, states, strict=True):
            dtype = next(iter(state.values())).dtype
            squares, size = gradient.to(dtype).square() + TINY, math.prod(shape)
            sums = [part.elements.to(dtype).square().sum().view(1) / size]
            count, rows, columns = Matrices.of(shape)
            if count:
                row, column = squares.new_zeros(count * rows), squares.new_zeros(count * columns)
                for matrix, first, values in _by_matrix(squares, part.start, shape):
                    row[matrix * rows + first :][: len(values)] = values.sum(1) / columns
                    column[matrix * columns :][:columns] = values.sum(0) / rows
                sums += [row, column]
            else:
                state["square"].lerp_(squares, 1 - decay)
            means.append(torch.cat(sums))
        summed = torch.cat(means)
        sum_of_parts(summed)
        updates, rates = [], []
        for (part, gradient), shape, state, mean in zip(
            bucket, shapes, states, summed.split([len(mean) for mean in means]), strict=True
        ):
            rates.append(mean[0].sqrt().clamp(min=SMALLEST_SIZE))
            count, rows, columns = Matrices.of(shape)
            if not count:
                updates.append(gradient * state["square"].rsqrt())
                continue
            row, column = state["row"], state["column"]
            row.lerp_(mean[1 : 1 + len(row)], 1 - decay)
            column.lerp_(mean[1 + len(row) :], 1 - decay)
            per_row = (row.view(count, rows) / row.view(count, rows).mean(1, keepdim=True)).rsqrt().view(-1)
            pieces = [
                values
                * per_row[matrix * rows + first :][: len(values), None]
                * column[matrix * columns :][:columns].rsqrt()
                for matrix, first, values in _by_matrix(gradient.to(row.dtype), part.start, shape)
            ]
            whole_rows = torch.cat([piece.view(-1) for piece in pieces]) if pieces else gradient.to(row.dtype)
            updates.append(whole_rows[part.start % columns :][: len(gradient)])
        sizes = torch.stack([update.square().sum() for update in updates])
        sum_of_parts(sizes)
        for update, size, shape in zip(updates, sizes, shapes, strict=True):
            update.div_(((size / math.prod(shape)).sqrt() / LARGEST_RMS).clamp(min=1))
        return updates, rates


def _by_matrix(values: torch.Tensor, start: int, shape: Sequence[int]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Of elements of a parameter from `start` on: number of the matrix, first row in it, its rows here [n, C].

    What is missing of the first and the last row counts as zero.
    """
    _, rows, columns = Matrices.of(shape)
    if not len(values):
        return
    end = start + len(values)
    whole = pad(values, (start % columns, -end % columns)).view(-1, columns)
    row = start // columns
    while len(whole):
        here = min(len(whole), rows - row % rows)
        yield row // rows, row % rows, whole[:here]
        row, whole = row + here, whole[here:]
