"""Triton kernels of Adam on weights and states as a `Storage` keeps them: a row of a tile is a group of codes.

Groups are counted from a parameter's first element. A span is the part of a parameter that a tensor has, see `SPAN`,
and a program takes whole groups of it. A group that ranks share has its scale by the maxima of all of them, in slots.
`pieces` are those of blocks, see `PIECE`. `addresses` and `scalars` are those of adam_kernels.py, with the addresses
of remainders and scales and the number of the step besides.
"""

import triton
import triton.language as tl

from ds_memopt.kernels import packed
from ds_memopt.kernels.gpu.adam_kernels import (
    ADDRESSES,
    DECAY,
    PROGRAM,
    REST1,
    REST2,
    SCALARS,
    STEP_SIZE,
    VECTOR,
    denominator_of,
    pointer,
    scalar,
    squares_of_cut_row,
)
from ds_memopt.kernels.gpu.codes_kernels import (
    GROUP,
    decode,
    encode,
    join,
    magnitude_bits,
    rounding_bits,
    split,
    to_bf16,
)

SPAN_FIELDS = (
    "tensor", "first", "last", "shift", "to_entry", "to_scale", "key_low", "key_high", "first_slot", "last_slot",
    "first_piece", "last_piece",
)  # fmt: skip
"""Elements [first, last) of a parameter lie at element + shift of a tensor, their states to_entry further on, the scale
of group i at i + to_scale. Slots of the first and the last group, or -1; pieces [first, last)."""

PIECE_FIELDS = "first", "last", "width", "block"
"""Elements [first, last) of a parameter are runs of `width`, of one block each, from `block` of the tensor on."""

NUM_SPAN_FIELDS = tl.constexpr(len(SPAN_FIELDS))
TENSOR = tl.constexpr(SPAN_FIELDS.index("tensor"))
FIRST = tl.constexpr(SPAN_FIELDS.index("first"))
LAST = tl.constexpr(SPAN_FIELDS.index("last"))
SHIFT = tl.constexpr(SPAN_FIELDS.index("shift"))
TO_ENTRY = tl.constexpr(SPAN_FIELDS.index("to_entry"))
TO_SCALE = tl.constexpr(SPAN_FIELDS.index("to_scale"))
KEY_LOW = tl.constexpr(SPAN_FIELDS.index("key_low"))
KEY_HIGH = tl.constexpr(SPAN_FIELDS.index("key_high"))
FIRST_SLOT = tl.constexpr(SPAN_FIELDS.index("first_slot"))
LAST_SLOT = tl.constexpr(SPAN_FIELDS.index("last_slot"))
FIRST_PIECE = tl.constexpr(SPAN_FIELDS.index("first_piece"))
LAST_PIECE = tl.constexpr(SPAN_FIELDS.index("last_piece"))

NUM_PIECE_FIELDS = tl.constexpr(len(PIECE_FIELDS))

REMAINDERS = tl.constexpr(5)
SCALES_OF_FIRST = tl.constexpr(6)
SCALES_OF_SECOND = tl.constexpr(7)
"""Places of addresses, after those of Adam and GWT's update norms."""
STEP = tl.constexpr(8)
"""Place among the scalars."""

REMAINDER_PROBE = tl.constexpr(packed.REMAINDER_PROBE)
GROUPS = tl.constexpr(8)
"""That a program takes at once."""
REGISTERS = 128
"""Of a thread. So many are enough, and let a multiprocessor run two programs at a time; unlimited ones may not."""


@triton.jit
def _lanes_in(lane, begin, first, last, MULTIPLE: tl.constexpr):
    """Which lanes of the tile that begins at place `begin` are in [first, last): by 32 bits, which take half the
    registers."""
    low = (tl.maximum(first - begin, 0) // MULTIPLE * MULTIPLE).to(tl.int32)
    high = (tl.minimum(last - begin, GROUPS * GROUP) // MULTIPLE * MULTIPLE).to(tl.int32)
    return (lane >= low) & (lane < high)


@triton.jit
def _unpack(kept, at, mask, scales, scale, alive, KIND: tl.constexpr):
    """fp32 values of entries, and the scales of their groups, which lie at `scale`, of those that are alive."""
    values = tl.load(kept + at, mask=mask, other=0)
    if KIND.is_int():
        of_groups = tl.load(scales + scale, mask=alive, other=0.0)
        unpacked = decode(values, of_groups[:, None])
    else:
        unpacked = values.to(tl.float32)
    return unpacked


@triton.jit
def _largest(values, mask):
    """The magnitude in each group, as an integer."""
    return tl.max(tl.where(mask, magnitude_bits(values), 0), axis=1)


@triton.jit
def _pack(
    kept, at, mask, values, scales, scale, alive, slots, slot, group, step, probe, key_low, key_high,
    KIND: tl.constexpr, AT_RANDOM: tl.constexpr,
):  # fmt: skip
    """Keep the values of groups from number `group` on, and their new scales. slot: of groups that ranks share."""
    if KIND.is_int():
        of_ranks = tl.load(slots + slot, mask=slot >= 0, other=0.0)
        largest = tl.maximum(_largest(values, mask), magnitude_bits(of_ranks)).to(tl.float32, bitcast=True)
        tl.store(scales + scale, largest, mask=alive)
        bits = rounding_bits(group, step, probe, key_low, key_high, GROUPS)
        packed = encode(values, largest[:, None], bits, KIND)
    elif AT_RANDOM and KIND.is_bf16():
        packed = to_bf16(values, rounding_bits(group, step, probe, key_low, key_high, GROUPS))
    else:
        packed = values.to(KIND)
    tl.store(kept + at, packed, mask=mask)


@triton.jit
def _of_blocks(values, pieces, first_piece, last_piece, start, lane, mask):
    """For each entry of a tile, which begins with group `start`, the value of its block."""
    result = tl.full([GROUPS, GROUP], 1.0, tl.float32)
    within = tl.arange(0, GROUP)[None, :]
    begin = start * GROUP
    for number in range(first_piece, last_piece):
        piece = pieces + number * NUM_PIECE_FIELDS
        first, last, width, block = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2), tl.load(piece + 3)
        if (first < begin + GROUPS * GROUP) & (last > begin):
            # Divisions of 64 bits are slow: one for each group. Before the piece its numbers mean nothing.
            before = begin + GROUP * tl.arange(0, GROUPS) - first
            run = before // width
            rest = before - run * width
            if width >= GROUP:
                to_next = tl.minimum(width - rest, GROUP).to(tl.int32)
                more = (within >= to_next[:, None]).to(tl.int32)
            else:
                more = (rest.to(tl.int32)[:, None] + within) // width.to(tl.int32)
            inside = mask & _lanes_in(lane, begin, first, last, 1)
            of_block = tl.load((values + block + run)[:, None] + more, mask=inside, other=1.0)
            result = tl.where(inside, of_block, result)
    return result


@triton.jit
def adam(
    spans, programs, pieces, addresses, scalars, slots_of_first, slots_of_second,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BY_BLOCK: tl.constexpr,
    PROBE_OF_FIRST: tl.constexpr, PROBE_OF_SECOND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adam's step. BY_BLOCK: second moments are those of blocks, which have advanced. R: None without remainders."""
    program = tl.program_id(0).to(tl.int64)
    span = spans + tl.load(programs + 2 * program).to(tl.int64) * NUM_SPAN_FIELDS
    if tl.load(addresses + tl.load(span + TENSOR) * ADDRESSES + 1) != 0:
        first, last, shift = tl.load(span + FIRST), tl.load(span + LAST), tl.load(span + SHIFT)
        number = tl.load(programs + 2 * program + 1).to(tl.int64)
        group = first // GROUP + number * (PROGRAM // GROUP)
        if ALIGNED and (first | last | shift | tl.load(span + TO_ENTRY)) % VECTOR == 0:
            _adam(
                span, group, first, last, shift, pieces, addresses, scalars, slots_of_first, slots_of_second,
                P, G, M, V, R, BY_BLOCK, PROBE_OF_FIRST, PROBE_OF_SECOND, VECTOR,
            )  # fmt: skip
        else:
            _adam(
                span, group, first, last, shift, pieces, addresses, scalars, slots_of_first, slots_of_second,
                P, G, M, V, R, BY_BLOCK, PROBE_OF_FIRST, PROBE_OF_SECOND, 1,
            )  # fmt: skip


@triton.jit
def _adam(
    span, group, first, last, shift, pieces, addresses, scalars, slots_of_first, slots_of_second,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BY_BLOCK: tl.constexpr,
    PROBE_OF_FIRST: tl.constexpr, PROBE_OF_SECOND: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """A program's groups, from number `group` on. MULTIPLE: as in adam_kernels.py, of places and of their shift."""
    tensor = tl.load(span + TENSOR)
    p, g = pointer(addresses, tensor, 0, P, MULTIPLE), pointer(addresses, tensor, 1, G, MULTIPLE)
    m, v = pointer(addresses, tensor, 2, M, MULTIPLE), pointer(addresses, tensor, 3, V, MULTIPLE)
    scales_of_first = pointer(addresses, tensor, SCALES_OF_FIRST, tl.float32)
    scales_of_second = pointer(addresses, tensor, SCALES_OF_SECOND, tl.float32)
    first_slot, last_slot = tl.load(span + FIRST_SLOT), tl.load(span + LAST_SLOT)
    step = scalar(scalars, tensor, STEP).to(tl.int64)
    key_low, key_high = tl.load(span + KEY_LOW), tl.load(span + KEY_HIGH)
    first, last, shift = first // MULTIPLE * MULTIPLE, last // MULTIPLE * MULTIPLE, shift // MULTIPLE * MULTIPLE
    to_entry = tl.load(span + TO_ENTRY) // MULTIPLE * MULTIPLE
    lane = GROUP * tl.arange(0, GROUPS)[:, None] + tl.arange(0, GROUP)[None, :]
    for start in range(group, tl.minimum(group + PROGRAM // GROUP, tl.cdiv(last, GROUP)), GROUPS):
        groups, begin = start + tl.arange(0, GROUPS), start * GROUP
        mask = _lanes_in(lane, begin, first, last, MULTIPLE)
        at = begin + shift + lane
        entry = begin + shift + to_entry + lane
        alive, scale = groups < tl.cdiv(last, GROUP), groups + tl.load(span + TO_SCALE)
        slot = tl.where(groups == first // GROUP, first_slot, -1)
        slot = tl.where(groups == (last - 1) // GROUP, last_slot, slot)
        x = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        moment = _unpack(m, entry, mask, scales_of_first, scale, alive, M)
        moment += scalar(scalars, tensor, REST1) * (x - moment)
        if BY_BLOCK:
            first_piece, last_piece = tl.load(span + FIRST_PIECE), tl.load(span + LAST_PIECE)
            values = _of_blocks(v, pieces, first_piece, last_piece, start, lane, mask)
        else:
            values = _unpack(v, entry, mask, scales_of_second, scale, alive, V)
            values += scalar(scalars, tensor, REST2) * (x * x - values)
        weights = tl.load(p + at, mask=mask, other=0)
        if R is not None:
            remainders = pointer(addresses, tensor, REMAINDERS, R, MULTIPLE)
            masters = join(weights, tl.load(remainders + at, mask=mask, other=0))
        else:
            masters = weights.to(tl.float32)
        masters *= scalar(scalars, tensor, DECAY)
        masters -= scalar(scalars, tensor, STEP_SIZE) * tl.div_rn(moment, denominator_of(values, scalars, tensor))
        if R is not None:
            bits = 0
            if R.is_int8():
                bits = rounding_bits(start, step, tl.full([], REMAINDER_PROBE, tl.int64), key_low, key_high, GROUPS)
            weights, rests = split(masters, bits, R)
            tl.store(p + at, weights, mask=mask)
            tl.store(remainders + at, rests, mask=mask)
        else:
            tl.store(p + at, masters.to(P), mask=mask)
        _pack(
            m, entry, mask, moment, scales_of_first, scale, alive, slots_of_first, slot, start, step,
            tl.full([], PROBE_OF_FIRST, tl.int64), key_low, key_high, M, False,
        )  # fmt: skip
        if not BY_BLOCK:
            _pack(
                v, entry, mask, values, scales_of_second, scale, alive, slots_of_second, slot, start, step,
                tl.full([], PROBE_OF_SECOND, tl.int64), key_low, key_high, V, True,
            )  # fmt: skip


@triton.jit
def sums_and_maxima(
    rows, num_rows, holders_of_sums, sums, num_sums, num_sum_programs, spans, holders, slots_of_first, slots_of_second,
    num_slots, addresses, scalars,
    G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, FIRST_LAUNCH: tl.constexpr,
):  # fmt: skip
    """What ranks share: cut blocks' shares in mean squares, see `cut_squares`, and largest new states of cut groups.

    V: None where second moments are those of blocks. holders: for each slot of a group 2 * its span, + 1 if it is the
    last of this; or -1.
    """
    program = tl.program_id(0).to(tl.int64)
    if program < num_sum_programs:
        squares_of_cut_row(program, rows, num_rows, addresses, holders_of_sums, sums, num_sums, G, FIRST_LAUNCH)
    else:
        slot = (program - num_sum_programs) * GROUPS + tl.arange(0, GROUPS)
        holder = tl.load(holders + slot, mask=slot < num_slots, other=-1)
        span = spans + (holder >> 1) * NUM_SPAN_FIELDS
        tensor = tl.load(span + TENSOR, mask=holder >= 0, other=0)
        gradients = tl.load(addresses + tensor * ADDRESSES + 1, mask=holder >= 0, other=0)
        alive = gradients != 0
        first, last = tl.load(span + FIRST, mask=alive, other=0), tl.load(span + LAST, mask=alive, other=0)
        group = tl.where((holder & 1) == 1, (last - 1) // GROUP, first // GROUP)
        place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        mask = (place >= first[:, None]) & (place < last[:, None])
        at = place + tl.load(span + SHIFT, mask=alive, other=0)[:, None]
        entry = at + tl.load(span + TO_ENTRY, mask=alive, other=0)[:, None]
        scale = group + tl.load(span + TO_SCALE, mask=alive, other=0)
        x = tl.load(tl.cast(gradients, tl.pointer_type(G))[:, None] + at, mask=mask, other=0.0).to(tl.float32)
        written = slot < num_slots if FIRST_LAUNCH else alive
        of_tensors = addresses + tensor * ADDRESSES
        moment = _unpack_each(of_tensors, 2, SCALES_OF_FIRST, entry, mask, scale, alive, M)
        rest1 = tl.load(scalars + tensor * SCALARS + REST1)[:, None]
        moment += rest1 * (x - moment)
        tl.store(slots_of_first + slot, _largest(moment, mask).to(tl.float32, bitcast=True), mask=written)
        if V is not None:
            values = _unpack_each(of_tensors, 3, SCALES_OF_SECOND, entry, mask, scale, alive, V)
            rest2 = tl.load(scalars + tensor * SCALARS + REST2)[:, None]
            values += rest2 * (x * x - values)
            tl.store(slots_of_second + slot, _largest(values, mask).to(tl.float32, bitcast=True), mask=written)


@triton.jit
def _unpack_each(
    addresses, state: tl.constexpr, of_scales: tl.constexpr, at, mask, scale, alive, KIND: tl.constexpr
):  # fmt: skip
    """As `_unpack`, each group of another tensor."""
    kept = tl.cast(tl.load(addresses + state, mask=alive, other=0), tl.pointer_type(KIND))[:, None]
    scales = tl.cast(tl.load(addresses + of_scales, mask=alive, other=0), tl.pointer_type(tl.float32))
    return _unpack(kept, at, mask, scales, scale, alive, KIND)
