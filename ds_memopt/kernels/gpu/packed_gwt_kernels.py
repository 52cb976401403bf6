"""Triton kernels of GWT on weights and states as a `Storage` keeps them; `GWTCall` in ../back_ends.py has the formulas.

A tile is whole groups of codes: 128 entries each, which stand for as many wavelet groups. A span is the part of a
matrix that a tensor has, see `GROUP_SPAN_FIELDS`; its pieces are rows of `Runs`, which tell where the elements of each
entry lie. Nothing is kept before the last launch: those before it find the size of the update, and the largest new
states of groups that ranks share.
"""

import triton
import triton.language as tl

from ds_memopt.kernels.gpu.adam_kernels import (
    ADDRESSES,
    BLOCK,
    BLOCK_STRIDE,
    COUNT,
    DECAY,
    INVERSE_CORRECTION,
    NUM_FIELDS,
    OFFSET,
    REST1,
    REST2,
    ROW_STRIDE,
    ROWS,
    SIZE,
    SLOT,
    STEP_SIZE_OF_GROUPS,
    WIDTH,
    denominator_of,
    pointer,
    scalar,
)
from ds_memopt.kernels.gpu.codes_kernels import (
    GROUP,
    decode,
    encode,
    join,
    magnitude_bits,
    rounding_bits_at,
    split,
    to_bf16,
)
from ds_memopt.kernels.gpu.gwt_kernels import OUTER, OUTER_STRIDE, limit, sums_of_groups
from ds_memopt.kernels.gpu.packed_kernels import REMAINDER_PROBE, REMAINDERS, STEP

GROUP_SPAN_FIELDS = (
    "tensor", "first", "last", "row", "shift", "to_scale", "key_low", "key_high", "first_group", "last_group",
    "first_slot", "last_slot", "first_piece", "last_piece", "to_place", "even", "matrix", "interval",
)  # fmt: skip
"""Entries [first, last) of a state lie at entry + shift of a tensor; groups begin anew after `row` entries, the scale
of group i lies at i + to_scale. An element's place in the parameter is to_place more than that in the tensor. even: if
wavelet groups are whole, and they and each fourth entry begin where words of random bits may."""

NUM_GROUP_SPAN_FIELDS = tl.constexpr(len(GROUP_SPAN_FIELDS))
(
    TENSOR, FIRST, LAST, ROW, SHIFT, TO_SCALE, KEY_LOW, KEY_HIGH, FIRST_GROUP, LAST_GROUP, FIRST_SLOT, LAST_SLOT,
    FIRST_PIECE, LAST_PIECE, TO_PLACE, EVEN, MATRIX, INTERVAL,
) = map(tl.constexpr, range(len(GROUP_SPAN_FIELDS)))  # fmt: skip

APPROXIMATION = tl.constexpr(8)
SCALES_OF_APPROXIMATION = tl.constexpr(9)
SECOND_MOMENT = tl.constexpr(10)
SCALES_OF_SECOND_MOMENT = tl.constexpr(11)
"""Places of addresses, after those of packed_kernels.py."""


@triton.jit
def _runs(span, pieces, entry, alive):
    """Where the elements of entries begin, how many there are here and in all, the slot of their sum and the block that
    they lie in."""
    offset, slot, outer = tl.zeros_like(entry), tl.zeros_like(entry) - 1, tl.zeros_like(entry)
    width, size = tl.zeros_like(entry).to(tl.int32), tl.zeros_like(entry).to(tl.float32) + 1.0
    for number in range(tl.load(span + FIRST_PIECE), tl.load(span + LAST_PIECE)):
        piece = pieces + number * NUM_FIELDS
        count, rows = tl.load(piece + COUNT), tl.load(piece + ROWS)
        each = tl.where(rows == 1, count, tl.load(piece + BLOCK_STRIDE))
        run = entry - tl.load(piece + BLOCK)
        line = run // each
        column = run - line * each
        inside = alive & (run >= 0) & (line < rows) & (column < count)
        length = tl.load(piece + WIDTH)
        begin = tl.load(piece + OFFSET) + line * tl.load(piece + ROW_STRIDE) + column * length
        offset = tl.where(inside, begin, offset)
        width = tl.where(inside, length.to(tl.int32), width)
        size = tl.where(inside, tl.load(piece + SIZE).to(tl.float32), size)
        slot = tl.where(inside, tl.load(piece + SLOT), slot)
        outer = tl.where(inside, tl.load(piece + OUTER) + line * tl.load(piece + OUTER_STRIDE), outer)
    return offset, width, size, slot, outer


@triton.jit
def _unpack(kept, entry, alive, scales, scale, KIND: tl.constexpr):
    values = tl.load(kept + entry, mask=alive, other=0)
    if KIND.is_int():
        unpacked = decode(values, tl.load(scales + scale, mask=alive, other=0.0))
    else:
        unpacked = values.to(tl.float32)
    return unpacked


@triton.jit
def _advance(
    span, pieces, start, addresses, scalars, sums, sums_width,
    G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BY_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """The new states of the entries of GROUPS groups from number `start` on, and what they were made of."""
    ENTRIES: tl.constexpr = GROUPS * GROUP
    MULTIPLE: tl.constexpr = K if SIDE_BY_SIDE else 1
    tensor, row = tl.load(span + TENSOR), tl.load(span + ROW)
    lane = tl.arange(0, ENTRIES)
    group = start + lane // GROUP
    line = group // tl.cdiv(row, GROUP)
    within = (group - line * tl.cdiv(row, GROUP)) * GROUP + lane % GROUP
    place = line * row + within
    alive = (within < row) & (place >= tl.load(span + FIRST)) & (place < tl.load(span + LAST))
    entry, scale = place + tl.load(span + SHIFT), group + tl.load(span + TO_SCALE)
    offset, width, size, slot, outer = _runs(span, pieces, entry, alive)
    mask = tl.broadcast_to(alive[:, None], (ENTRIES, K))
    if SIDE_BY_SIDE:
        offset = offset // K * K  # which tells the compiler so
    else:
        mask = mask & (tl.arange(0, K)[None, :] < width[:, None])
    at = offset[:, None] + tl.arange(0, K)[None, :]
    x = tl.load(pointer(addresses, tensor, 1, G, MULTIPLE) + at, mask=mask, other=0.0).to(tl.float32)
    if not SIDE_BY_SIDE:
        x = tl.where(mask, x, 0.0)
    mean, square = sums_of_groups(x, ENTRIES, K) * (1.0 / K), sums_of_groups(x * x, ENTRIES, K) / size
    if not SIDE_BY_SIDE:
        cut = alive & (slot >= 0)
        mean = tl.where(cut, tl.load(sums + slot * sums_width, mask=cut, other=0.0), mean)
        of_ranks = tl.load(sums + slot * sums_width + sums_width - 1, mask=cut, other=0.0)
        square = tl.where(cut, of_ranks, square)
    scales = pointer(addresses, tensor, SCALES_OF_APPROXIMATION, tl.float32)
    moment = _unpack(pointer(addresses, tensor, APPROXIMATION, M), entry, alive, scales, scale, M)
    moment += scalar(scalars, tensor, REST1) * (mean - moment)
    if BY_BLOCK:
        v = tl.load(pointer(addresses, tensor, 3, tl.float32) + outer, mask=alive, other=1.0)
    else:
        scales = pointer(addresses, tensor, SCALES_OF_SECOND_MOMENT, tl.float32)
        v = _unpack(pointer(addresses, tensor, SECOND_MOMENT, V), entry, alive, scales, scale, V)
        v += scalar(scalars, tensor, REST2) * (square - v)
    return x, at, mask, mean, square, width, size, place, entry, alive, moment, v


@triton.jit
def _largest(values, alive, GROUPS: tl.constexpr):
    """The magnitude in each group, as an integer."""
    return tl.max(tl.reshape(tl.where(alive, magnitude_bits(values), 0), (GROUPS, GROUP)), axis=1)


@triton.jit
def _pack(
    kept, entry, alive, values, scales, span, start, slots, place, step, probe, key_low, key_high,
    KIND: tl.constexpr, AT_RANDOM: tl.constexpr, GROUPS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Keep the values of groups from number `start` on, and their new scales."""
    ENTRIES: tl.constexpr = GROUPS * GROUP
    if KIND.is_int() or (AT_RANDOM and KIND.is_bf16()):
        first = tl.min(tl.reshape(place, (ENTRIES // TOGETHER, TOGETHER)), axis=1)
        bits = rounding_bits_at(first, step, probe, key_low, key_high, TOGETHER)
        bits = tl.reshape(bits, (ENTRIES,))
    if KIND.is_int():
        groups = start + tl.arange(0, GROUPS)
        first_group, last_group = tl.load(span + FIRST_GROUP), tl.load(span + LAST_GROUP)
        slot = tl.where(groups == first_group, tl.load(span + FIRST_SLOT), -1)
        slot = tl.where(groups == last_group, tl.load(span + LAST_SLOT), slot)
        of_ranks = magnitude_bits(tl.load(slots + slot, mask=slot >= 0, other=0.0))
        largest = tl.maximum(_largest(values, alive, GROUPS), of_ranks).to(tl.float32, bitcast=True)
        tl.store(scales + groups + tl.load(span + TO_SCALE), largest, mask=groups <= last_group)
        of_entries = tl.reshape(tl.broadcast_to(largest[:, None], (GROUPS, GROUP)), (ENTRIES,))
        tl.store(kept + entry, encode(values, of_entries, bits, KIND), mask=alive)
    elif AT_RANDOM and KIND.is_bf16():
        tl.store(kept + entry, to_bf16(values, bits), mask=alive)
    else:
        tl.store(kept + entry, values.to(KIND), mask=alive)


@triton.jit
def _tiles(
    span, pieces, first_group, stop, addresses, scalars, sums, sums_width, growth, slots_of_first, slots_of_second,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BY_BLOCK: tl.constexpr, APPLY: tl.constexpr, PROBE_OF_FIRST: tl.constexpr, PROBE_OF_SECOND: tl.constexpr,
    GROUPS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
):  # fmt: skip
    """A program's groups. Without APPLY nothing is kept; returns what they add to their matrix's sum of squares."""
    TOGETHER: tl.constexpr = 4 if SIDE_BY_SIDE else 1
    OF_ELEMENTS: tl.constexpr = (4 if K > 4 else K) if SIDE_BY_SIDE else 1
    MULTIPLE: tl.constexpr = K if SIDE_BY_SIDE else 1
    ENTRIES: tl.constexpr = GROUPS * GROUP
    tensor, step = tl.load(span + TENSOR), scalar(scalars, tl.load(span + TENSOR), STEP).to(tl.int64)
    key_low, key_high = tl.load(span + KEY_LOW), tl.load(span + KEY_HIGH)
    share = 0.0
    for start in range(first_group, stop, GROUPS):
        x, at, mask, mean, square, width, size, place, entry, alive, moment, v = _advance(
            span, pieces, start, addresses, scalars, sums, sums_width, G, M, V, K, BY_BLOCK, GROUPS, SIDE_BY_SIDE
        )
        denominator = denominator_of(v, scalars, tensor)
        shift = moment * scalar(scalars, tensor, INVERSE_CORRECTION) - mean
        if APPLY:
            p = pointer(addresses, tensor, 0, P, MULTIPLE)
            factor = tl.div_rn(scalar(scalars, tensor, STEP_SIZE_OF_GROUPS) / growth, denominator)
            weights = tl.load(p + at, mask=mask, other=0)
            if R is not None:
                remainders = pointer(addresses, tensor, REMAINDERS, R, MULTIPLE)
                masters = join(weights, tl.load(remainders + at, mask=mask, other=0))
            else:
                masters = weights.to(tl.float32)
            masters = masters * scalar(scalars, tensor, DECAY) - factor[:, None] * (x + shift[:, None])
            if R is not None:
                bits = 0
                if R.is_int8():
                    first = tl.min(tl.reshape(at, (ENTRIES * K // OF_ELEMENTS, OF_ELEMENTS)), axis=1)
                    first += tl.load(span + TO_PLACE)
                    probe = tl.full([], REMAINDER_PROBE, tl.int64)
                    bits = rounding_bits_at(first, step, probe, key_low, key_high, OF_ELEMENTS)
                    bits = tl.reshape(bits, (ENTRIES, K))
                weights, rests = split(masters, bits, R)
                tl.store(p + at, weights, mask=mask)
                tl.store(remainders + at, rests, mask=mask)
            else:
                tl.store(p + at, masters.to(P), mask=mask)
            _pack(
                pointer(addresses, tensor, APPROXIMATION, M), entry, alive, moment,
                pointer(addresses, tensor, SCALES_OF_APPROXIMATION, tl.float32), span, start, slots_of_first, place,
                step, tl.full([], PROBE_OF_FIRST, tl.int64), key_low, key_high, M, False, GROUPS, TOGETHER,
            )  # fmt: skip
            if not BY_BLOCK:
                _pack(
                    pointer(addresses, tensor, SECOND_MOMENT, V), entry, alive, v,
                    pointer(addresses, tensor, SCALES_OF_SECOND_MOMENT, tl.float32), span, start, slots_of_second,
                    place, step, tl.full([], PROBE_OF_SECOND, tl.int64), key_low, key_high, V, True, GROUPS, TOGETHER,
                )  # fmt: skip
        else:
            squares = square + shift * shift + shift * mean * (2.0 * K) / size
            squares = tl.where(alive, squares / (denominator * denominator), 0.0)
            share += tl.sum(squares * width.to(tl.float32))
    return share


@triton.jit
def packed_gwt(
    spans, programs, pieces, addresses, scalars, sums, sums_width, norms, previous, shares, limiter, slots_of_first,
    slots_of_second,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BY_BLOCK: tl.constexpr, LIMITED: tl.constexpr, APPLY: tl.constexpr, PROBE_OF_FIRST: tl.constexpr,
    PROBE_OF_SECOND: tl.constexpr, EACH: tl.constexpr, GROUPS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Both halves with APPLY, else the size of the update, to `shares`. EACH: groups that a program takes."""
    program = tl.program_id(0).to(tl.int64)
    span = spans + tl.load(programs + 2 * program).to(tl.int64) * NUM_GROUP_SPAN_FIELDS
    tensor = tl.load(span + TENSOR)
    if tl.load(addresses + tensor * ADDRESSES + 1) != 0:
        first = tl.load(span + FIRST_GROUP) + tl.load(programs + 2 * program + 1).to(tl.int64) * EACH
        stop = tl.minimum(first + EACH, tl.load(span + LAST_GROUP) + 1)
        growth = 1.0
        if LIMITED and APPLY:
            matrix, interval = tl.load(span + MATRIX), tl.load(span + INTERVAL)
            growth = limit(addresses, tensor, matrix, interval, norms, previous, limiter)
        if ALIGNED and tl.load(span + EVEN) != 0:
            share = _tiles(
                span, pieces, first, stop, addresses, scalars, sums, sums_width, growth, slots_of_first,
                slots_of_second, P, G, M, V, R, K, BY_BLOCK, APPLY, PROBE_OF_FIRST, PROBE_OF_SECOND, GROUPS, True,
            )  # fmt: skip
        else:
            share = _tiles(
                span, pieces, first, stop, addresses, scalars, sums, sums_width, growth, slots_of_first,
                slots_of_second, P, G, M, V, R, K, BY_BLOCK, APPLY, PROBE_OF_FIRST, PROBE_OF_SECOND, GROUPS, False,
            )  # fmt: skip
        if not APPLY:
            tl.store(shares + program, share)


@triton.jit
def maxima_of_groups(
    spans, holders, pieces, addresses, scalars, sums, sums_width, slots_of_first, slots_of_second,
    G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BY_BLOCK: tl.constexpr,
    FIRST_LAUNCH: tl.constexpr,
):  # fmt: skip
    """For each slot the largest new states of this rank's part of a group. holders: as of `sums_and_maxima`."""
    slot = tl.program_id(0).to(tl.int64)
    holder = tl.load(holders + slot)
    span = spans + tl.maximum(holder, 0) // 2 * NUM_GROUP_SPAN_FIELDS
    gradient = tl.load(addresses + tl.load(span + TENSOR, mask=holder >= 0, other=0) * ADDRESSES + 1)
    if (holder >= 0) & (gradient != 0):
        start = tl.load(span + LAST_GROUP) if holder % 2 == 1 else tl.load(span + FIRST_GROUP)
        _, _, _, _, _, _, _, _, _, alive, moment, v = _advance(
            span, pieces, start, addresses, scalars, sums, sums_width, G, M, V, K, BY_BLOCK, 1, False
        )
        lane = slot + tl.arange(0, 1)
        tl.store(slots_of_first + lane, _largest(moment, alive, 1).to(tl.float32, bitcast=True))
        if not BY_BLOCK:
            tl.store(slots_of_second + lane, _largest(v, alive, 1).to(tl.float32, bitcast=True))
    elif FIRST_LAUNCH:
        tl.store(slots_of_first + slot, 0.0)
        if not BY_BLOCK:
            tl.store(slots_of_second + slot, 0.0)
