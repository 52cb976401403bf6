"""Triton functions of ../codes.py, to the bit, and the random bits that it rounds by."""

import triton
import triton.language as tl

from ds_memopt.kernels import codes
from ds_memopt.kernels.gpu.noise_kernels import philox, random_words
from ds_memopt.kernels.noise_formulas import FORMULAS

GROUP = tl.constexpr(codes.GROUP)
PER_COUNTER = tl.constexpr(FORMULAS["rounding"][1])
SQUARES = tl.constexpr(127.0**2)
FOURTH_POWERS = tl.constexpr(255.0**4)
NO_NUMBER = tl.constexpr(0x7FC0)
"""In bf16."""


@triton.jit
def rounding_bits(group, step, probe, key_low, key_high, GROUPS: tl.constexpr):
    """8 random bits for each entry of the groups from number `group` of a parameter on, int32 [GROUPS, GROUP]."""
    first = group * (GROUP // PER_COUNTER)
    w0, w1, w2, w3 = random_words(first, step, probe, key_low, key_high, GROUPS * (GROUP // PER_COUNTER))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    of_bytes = (words[:, None] >> (8 * tl.arange(0, 4)).to(tl.uint32)[None, :]) & 0xFF
    return tl.reshape(of_bytes, [GROUPS, GROUP]).to(tl.int32)


@triton.jit
def rounding_bits_at(place, step, probe, key_low, key_high, TOGETHER: tl.constexpr):
    """8 random bits for each of TOGETHER entries, 1, 2 or 4, from a multiple of it on: [N] -> [N, TOGETHER]."""
    w0, w1, w2, w3 = philox(place // PER_COUNTER, step, probe, key_low, key_high)
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
        share = tl.div_rn(code, 255.0)
        share *= share
        values = share * share * scales
    else:
        values = tl.div_rn(code * tl.abs(code), SQUARES) * scales
    return values


@triton.jit
def _power(code, UNSIGNED: tl.constexpr):
    square = code * code
    if UNSIGNED:
        square *= square
    return square


@triton.jit
def encode(values, scales, bits, DTYPE: tl.constexpr):
    """The codes of fp32 values, int8 or uint8."""
    UNSIGNED: tl.constexpr = DTYPE.is_uint8()
    positive = scales > 0
    share = tl.where(positive, tl.div_rn(tl.abs(values), tl.where(positive, scales, 1.0)), 0.0)
    if UNSIGNED:
        power = share * FOURTH_POWERS
        code = tl.floor(tl.sqrt_rn(tl.sqrt_rn(power)))
    else:
        power = share * SQUARES
        code = tl.floor(tl.sqrt_rn(power))
    low, high = _power(code, UNSIGNED), _power(code + 1.0, UNSIGNED)
    uniform = (bits.to(tl.float32) + 0.5) * 0.00390625
    code += tl.where(uniform * (high - low) < power - low, 1.0, 0.0)
    code = tl.where(share > 0, tl.maximum(code, 1.0), code) if UNSIGNED else tl.where(values < 0, -code, code)
    return code.to(tl.int32).to(DTYPE)


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
