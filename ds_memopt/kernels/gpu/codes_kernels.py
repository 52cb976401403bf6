"""Triton functions of ../codes.py, to the bit, and the random bits that it rounds by."""

import triton
import triton.language as tl

from ds_memopt.kernels import codes
from ds_memopt.kernels.gpu.noise_kernels import philox
from ds_memopt.kernels.noise_formulas import FORMULAS, ROUNDS_OF_ROUNDING

GROUP = tl.constexpr(codes.GROUP)
PER_COUNTER = tl.constexpr(FORMULAS["rounding"][1])
ROUNDS = tl.constexpr(ROUNDS_OF_ROUNDING)
SMALLEST_SCALE = tl.constexpr(codes.SMALLEST_SCALE)
SQUARES = tl.constexpr(127.0**2)
INVERSE_SQUARES = tl.constexpr(1 / 127.0**2)
INVERSE_FOURTH_POWERS = tl.constexpr(1 / 255.0**4)
FOURTH_POWERS = tl.constexpr(255.0**4)
NO_NUMBER = tl.constexpr(0x7FC0)
"""In bf16."""


@triton.jit
def rounding_bits(group, step, probe, key_low, key_high, GROUPS: tl.constexpr):
    """8 random bits for each entry of the groups from number `group` of a parameter on, int32 [GROUPS, GROUP]."""
    counters = group * (GROUP // PER_COUNTER) + tl.arange(0, GROUPS * (GROUP // PER_COUNTER))
    w0, w1, w2, w3 = philox(counters, step, probe, key_low, key_high, ROUNDS)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    of_bytes = (words[:, None] >> (8 * tl.arange(0, 4)).to(tl.uint32)[None, :]) & 0xFF
    return tl.reshape(of_bytes, [GROUPS, GROUP]).to(tl.int32)


@triton.jit
def rounding_bits_at(place, step, probe, key_low, key_high, TOGETHER: tl.constexpr):
    """8 random bits for each of TOGETHER entries, 1, 2 or 4, from a multiple of it on: [N] -> [N, TOGETHER]."""
    w0, w1, w2, w3 = philox(place // PER_COUNTER, step, probe, key_low, key_high, ROUNDS)
    word = (place // 4) % 4
    chosen = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    byte = (place % 4).to(tl.uint32)[:, None] + tl.arange(0, TOGETHER).to(tl.uint32)[None, :]
    return ((chosen[:, None] >> (8 * byte)) & 0xFF).to(tl.int32)


@triton.jit
def magnitude_bits(values):
    """As integers magnitudes have the same order, and what is no number is the largest."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def decode(kept, scales):
    """Codes, int8 or uint8, as fp32."""
    code = kept.to(tl.float32)
    if kept.dtype.is_uint8():
        square = code * code
        share = square * square * INVERSE_FOURTH_POWERS
    else:
        share = code * tl.abs(code) * INVERSE_SQUARES
    return share * _clamped(scales)


@triton.jit
def _clamped(scales):
    """What is no number stays so."""
    return tl.where(scales < SMALLEST_SCALE, SMALLEST_SCALE, scales)


@triton.jit
def encode(values, scales, bits, DTYPE: tl.constexpr):
    """The codes of fp32 values, int8 or uint8."""
    UNSIGNED: tl.constexpr = DTYPE.is_uint8()
    factors = tl.div_rn(1.0, _clamped(scales)) * (FOURTH_POWERS if UNSIGNED else SQUARES)
    power = tl.abs(values) * factors
    uniform = (bits.to(tl.float32) + 0.5) * 0.00390625
    if UNSIGNED:
        power = tl.maximum(power, 1.0)
        code = tl.floor(tl.sqrt_rn(tl.sqrt_rn(power)))
        square, step = code * code, 2.0 * code + 1.0
        gap = step * (2.0 * square + step)  # to the next fourth power
        code += tl.where(uniform * gap < power - square * square, 1.0, 0.0)
    else:
        down = 1.0 - uniform
        code = tl.floor(tl.sqrt_rn(tl.maximum(power + (down * down - down), 0.0)) + down)
        code = tl.where(values < 0, -code, code)
    return tl.where(scales > 0, code, 0.0).to(tl.int32).to(DTYPE)


@triton.jit
def to_bf16(values, bits):
    """fp32 to bf16, up or down at random."""
    raw = values.to(tl.int32, bitcast=True)
    finite = magnitude_bits(values) < 0x7F800000
    rounded = tl.where(finite, raw + (bits << 8) + 0x80, raw) >> 16
    rounded = tl.where(values == values, rounded, NO_NUMBER)
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def join(weights, remainders):
    """The fp32 masters of bf16 weights, both as integers, with remainders in int16 or int8."""
    rest = remainders.to(tl.int32)
    if remainders.dtype.is_int8():
        rest = rest << 8
    return ((weights.to(tl.int32) << 16) + rest).to(tl.float32, bitcast=True)


@triton.jit
def split(masters, bits, R: tl.constexpr):
    """fp32 masters as bf16 weights, in int16, and remainders in R, int16 or int8; bits: for int8.

    The nearest weight; of two the one above, as a remainder of 2^15 does not fit: remainders are the low halves.
    """
    raw = masters.to(tl.int32, bitcast=True)
    weights = tl.where(masters == masters, (raw + 0x8000) >> 16, NO_NUMBER)
    rest = (raw << 16) >> 16
    if R.is_int8():
        rest = tl.minimum((rest + bits) >> 8, 127)
    return weights.to(tl.int16), rest.to(R)
