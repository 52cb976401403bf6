"""Which back end computes a call: `plain` (PyTorch), `cpp` (CPU) or `triton` (GPU)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from ds_memopt.kernels.plain import AdamScalars, Tensors
from ds_memopt.kernels.work import Runs, Work


class BackEnd(Protocol):
    """What a fused back end offers; every function is one launch.

    Tensors are this rank's elements, 1-D and contiguous, by their number in the call; runs of a tensor that is not
    among them are left alone. slots: [slots, width], what ranks share of cut blocks, see `Runs`.
    """

    def reason_against(self, tensors: list[torch.Tensor]) -> str:
        """Why it does not cover a call on these tensors; "" if it does."""

    def add_mean_squares(self, gradients: Tensors, runs: Runs, slots: torch.Tensor) -> None:
        """slots[slot, 0] += (sum of a run's squares) / size."""

    def adam_mini(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
        mean_squares: torch.Tensor | None,
    ) -> None:
        """Adam with one second moment per block. mean_squares: slots of cut blocks; None: each run is a whole block."""

    def adam_by_element(
        self,
        parameters: Tensors,
        gradients: Tensors,
        moments: Tensors,
        second_moments: Tensors,
        runs: Runs,
        scalars: Mapping[int, AdamScalars],
    ) -> None:
        """Adam with one second moment per element, at the runs' entries."""


def back_end_of(work: Work | None, *tensors: Tensors) -> BackEnd | None:
    """The fused back end for a call, or None for plain PyTorch."""
    return None
