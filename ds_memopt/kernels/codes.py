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

_SQUARES, _FOURTH_POWERS = 127.0**2, 255.0**4


def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values, fp32. scales: fp32, of each entry."""
    code = codes.float()
    if codes.dtype == torch.uint8:
        square = (code / 255).square()
        return square * square * scales
    return code * code.abs() / _SQUARES * scales


def encode(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor | None) -> torch.Tensor:
    """The codes of fp32 values. dtype: of `CODES`. scales: of each entry, none smaller than its magnitude.

    bits: 8 random ones for each entry, in int32; None: to the nearest code, which gives back what `decode` was given.
    An entry above zero keeps a code above zero: a second moment of zero would be divided by.
    """
    unsigned = dtype == torch.uint8
    share = torch.where(scales > 0, values.abs() / scales, 0)
    power = share * (_FOURTH_POWERS if unsigned else _SQUARES)
    root = power.sqrt().sqrt() if unsigned else power.sqrt()
    if bits is None:
        code = root.round()
    else:
        code = root.floor()
        low, high = _power(code, unsigned), _power(code + 1, unsigned)
        code = code + (_uniform(bits) * (high - low) < power - low)
    if unsigned:
        code = torch.where(share > 0, code.clamp(min=1), code)
    return (code if unsigned else code * values.sign()).to(dtype)


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


def _power(code: torch.Tensor, unsigned: bool) -> torch.Tensor:
    square = code.square()
    return square.square() if unsigned else square


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """In (0, 1)."""
    return (bits.float() + 0.5) / 256
