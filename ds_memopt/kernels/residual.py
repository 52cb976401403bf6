"""The half of an fp32 number that rounding to bf16 drops, kept in 16 bits: bf16 weights plus it are an fp32 master."""

from __future__ import annotations

import torch


def residual_of(master: torch.Tensor) -> torch.Tensor:
    """int16: how many units in the last place of fp32 `master` lies beyond its own rounding to bf16.

    Rounding moves a number by at most 2^15 units. Of that range only +2^15 does not fit (an exact tie that rounds
    towards zero): such a number comes back one unit smaller.
    """
    difference = master.view(torch.int32) - master.bfloat16().float().view(torch.int32)
    return difference.clamp_(max=2**15 - 1).to(torch.int16)


def add_residual_(rounded: torch.Tensor, residual: torch.Tensor) -> None:
    """Turn fp32 numbers that are exact in bf16 back into the masters that `residual_of` was given."""
    rounded.view(torch.int32).add_(residual.to(rounded.device, torch.int32))
