"""Numbers in fewer bits: states as 8-bit codes or in bf16, fp32 masters as bf16 weights and what rounding drops.

Entries of 8 bits go in groups, each with one scale, the largest magnitude in it. Rounding is random: up or down with
the probabilities that keep the value right on average. It takes its bits from outside, so that the same entry is
rounded alike wherever it lies.

    signed      code c in [-127, 127]: value = scale * c |c| / 127^2
    unsigned    code c in [0, 255]:    value = scale * (c / 255)^4

The square, and the fourth power, put most codes near zero, where most of a group's entries lie.
"""

from __future__ import annotations

import torch

GROUP = 128
"""Entries that have one scale."""

CODES = {"signed": torch.int8, "unsigned": torch.uint8}
"""How a state is coded: by its sign or, where it has none, with more codes; and in what."""

SMALLEST_SCALE = 2.0**-94
"""What a smaller scale counts as: the number that values are multiplied by, 255^4 / scale, stays finite."""


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values, fp32. scales: fp32, of each entry."""
    unsigned, code = codes.dtype == torch.uint8, codes.float()
    power = code.square().square() if unsigned else code * code.abs()
    return power * (1 / _most(unsigned)) * scales.clamp(min=SMALLEST_SCALE)


def encode(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor | None) -> torch.Tensor:
    """The codes of fp32 values. dtype: of `CODES`. scales: of each entry, none smaller than its magnitude.

    bits: 8 random ones for each entry, in int32; None: to the nearest code, which gives back what `decode` was given.
    Of a group that is not all zero every entry without a sign has a code above zero: a second moment of zero would be
    divided by.
    """
    unsigned = dtype == torch.uint8
    factors = scales.clamp(min=SMALLEST_SCALE).reciprocal() * _most(unsigned)
    power = (values.abs() * factors).clamp(min=1 if unsigned else 0)
    root = power.sqrt().sqrt() if unsigned else power.sqrt()
    if bits is None:
        code = root.round()
    elif unsigned:
        code = root.floor()
        square, step = code.square(), 2 * code + 1
        gap = step * (2 * square + step)  # to the next fourth power
        code = code + (_uniform(bits) * gap < power - square.square())
    else:  # c + 1 where u (2c + 1) < power - c^2, solved for c + 1
        down = 1 - _uniform(bits)
        square = (power + (down * down - down)).clamp(min=0)
        code = (square.double().sqrt().float() + down).floor()  # PyTorch's root in fp32 may be off by an ulp
    return torch.where(scales > 0, code if unsigned else code * values.sign(), 0).to(dtype)


def to_bf16(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16, up or down at random by 8 bits for each entry, in int32."""
    words = values.view(torch.int32) + (bits << 8) + 0x80
    return torch.where(values.isfinite(), words >> 16 << 16, values.view(torch.int32)).view(torch.float32).bfloat16()


def split(masters: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 masters as bf16 weights and remainders: units in the last place of fp32 by which a master lies beyond its
    weight, in int16, or multiples of 2^8 of them in int8.

    Weights are the nearest bf16 numbers. Of two that are equally near it is the even one, as everywhere, unless the
    remainder, of -2^15 to 2^15 - 1, forbids it: so 16 bits lose nothing. Those of 8 bits are rounded at random. Where
    an engine rounds the weights, see `residual_of`.
    bits: for int8, 8 random ones for each entry, in int32.
    """
    weights = masters.bfloat16()
    rest = masters.view(torch.int32) - weights.float().view(torch.int32)
    tied = rest == 2**15
    weights = (weights.view(torch.int16) + tied).view(torch.bfloat16)
    rest = torch.where(tied, -(2**15), rest)
    return weights, (rest.to(dtype) if dtype == torch.int16 else (rest + bits >> 8).clamp(max=127).to(dtype))


def join(weights: torch.Tensor, remainders: torch.Tensor) -> torch.Tensor:
    """The fp32 masters that `split` was given; with int8 as near as these tell."""
    unit = 1 if remainders.dtype == torch.int16 else 2**8
    return (weights.float().view(torch.int32) + remainders.int() * unit).view(torch.float32)


def _most(unsigned: bool) -> float:
    """The power of the largest code."""
    return 255.0**4 if unsigned else 127.0**2


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """In (0, 1)."""
    return (bits.float() + 0.5) / 256
