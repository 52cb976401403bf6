"""What a method calls: each function goes to the back end that computes it fastest where its tensors lie.

A fused back end sums the squares of blocks that ranks share first; while these sums travel it updates the blocks that
lie on this rank as a whole, each in one pass, and then the shared ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from ds_memopt.kernels import plain
from ds_memopt.kernels.back_ends import back_end_of
from ds_memopt.kernels.descriptors import Table
from ds_memopt.kernels.plain import AdamScalars, Tensors
from ds_memopt.kernels.work import Work


class Blocks(Protocol):
    """The blocks that the tensors of one call hold on this rank, and how sums over shared ones are completed."""

    pieces: Table
    work: Work | None

    def mean_squares(self, values: Tensors) -> dict[int, torch.Tensor]:
        """This rank's part of the mean square of each block."""

    def complete(self, *quantities: dict[int, torch.Tensor]) -> None:
        """Add to the values of shared blocks what other ranks hold of them."""

    def new_slots(self, width: int) -> torch.Tensor:
        """Zeros, `width` for each shared block."""

    def begin_sum(self, slots: torch.Tensor) -> Callable[[], None]:
        """Begin to sum slots over the ranks, in place; returns what waits."""


def adam_mini(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
) -> None:
    """Adam with one second moment per block. A collective where ranks share blocks."""
    fused = back_end_of(blocks.work, parameters, gradients, moments, second_moments)
    if fused is None:
        mean_squares = blocks.mean_squares(gradients)
        blocks.complete(mean_squares)
        plain.adam_mini(parameters, gradients, moments, second_moments, mean_squares, blocks.pieces, scalars)
        return
    tensors = parameters, gradients, moments, second_moments
    slots = blocks.new_slots(1)
    fused.add_mean_squares(gradients, blocks.work.cut, slots)
    wait = blocks.begin_sum(slots)
    fused.adam_mini(*tensors, blocks.work.whole, scalars, None)
    wait()
    fused.adam_mini(*tensors, blocks.work.cut, scalars, slots)


def adam_by_element(
    parameters: Tensors,
    gradients: Tensors,
    moments: Tensors,
    second_moments: Tensors,
    blocks: Blocks,
    scalars: Mapping[int, AdamScalars],
) -> None:
    """Adam as it is: one second moment per element. Each block of `blocks` is one element."""
    fused = back_end_of(blocks.work, parameters, gradients, moments, second_moments)
    if fused is None:
        plain.adam_by_element(parameters, gradients, moments, second_moments, blocks.pieces, scalars)
    else:
        fused.adam_by_element(parameters, gradients, moments, second_moments, blocks.work.whole, scalars)
