"""Triton kernels of GWT: a row of a tile is a group; `BackEnd.gwt` in ../back_ends.py has the formulas.

Arguments as in adam_kernels.py; the third address of a tensor is that of M, the fourth that of v or denominators.
Groups are added up by halves, as the plain formula does, so that their sums do not depend on alignment.
"""

import triton
import triton.language as tl

from ds_memopt.kernels.gpu.adam_kernels import (
    BLOCK,
    BLOCK_STRIDE,
    COUNT,
    DECAY,
    EPS,
    INVERSE_ROOT,
    NUM_FIELDS,
    OFFSET,
    PROGRAM,
    REST1,
    REST2,
    ROW_STRIDE,
    ROWS,
    SIZE,
    SLOT,
    STEP_SIZE,
    TENSOR,
    TILE,
    VECTOR,
    WIDTH,
    pointer,
    scalar,
)
from ds_memopt.kernels.work import FIELDS

OUTER = tl.constexpr(FIELDS.index("outer"))
OUTER_STRIDE = tl.constexpr(FIELDS.index("outer_stride"))
MATRIX = tl.constexpr(FIELDS.index("matrix"))
INVERSE_CORRECTION = tl.constexpr(6)
LANES = tl.constexpr(128)  # rows of the table that a program takes where a piece is one run
SHARES = tl.constexpr(1024)  # shares that are added up at once


@triton.jit
def group_sums(rows, num_rows, addresses, slots, slots_width, period, G: tl.constexpr, SQUARES: tl.constexpr):
    """Each run's sum / period, and its share in the mean square, to its slot."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row = rows + lane * NUM_FIELDS
    tensor = tl.load(row + TENSOR, mask=lane < num_rows, other=0)
    values = tl.load(addresses + tensor * 4 + 1, mask=lane < num_rows, other=0)
    alive = values != 0
    width = tl.load(row + WIDTH, mask=alive, other=0)
    first = tl.cast(values, tl.pointer_type(G)) + tl.load(row + OFFSET, mask=alive, other=0)
    total, squares = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for i in range(0, period):
        x = tl.load(first + i, mask=alive & (i < width), other=0.0).to(tl.float32)
        total += x
        squares += x * x
    target = slots + tl.load(row + SLOT, mask=alive, other=0) * slots_width
    tl.store(target, tl.load(target, mask=alive) + total / period, mask=alive)
    if SQUARES:
        size = tl.load(row + SIZE, mask=alive, other=1).to(tl.float32)
        tl.store(target + 1, tl.load(target + 1, mask=alive) + squares / size, mask=alive)


@triton.jit
def _sums(x, GROUPS: tl.constexpr, K: tl.constexpr):
    """[GROUPS, K] -> [GROUPS]"""
    if K == 32:
        x = _halved(x, GROUPS, 16)
    if K >= 16:
        x = _halved(x, GROUPS, 8)
    if K >= 8:
        x = _halved(x, GROUPS, 4)
    if K >= 4:
        x = _halved(x, GROUPS, 2)
    low, high = tl.split(x)
    return low + high


@triton.jit
def _halved(x, GROUPS: tl.constexpr, HALF: tl.constexpr):
    low, high = tl.split(tl.reshape(x, (GROUPS, HALF, 2)))
    return low + high


@triton.jit
def _step(
    row, addresses, scalars, sums, sums_width, growth, element, block, line, alive,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BY_BLOCK: tl.constexpr, LIMITED: tl.constexpr,
    ADVANCE: tl.constexpr, APPLY: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """A tile of groups, which begin at `element` each; MULTIPLE > 1: side by side, all of K elements.

    Returns what they add to their matrix's sum of squares.
    """
    GROUPS: tl.constexpr = TILE // K
    tensor, width, size = tl.load(row + TENSOR), tl.load(row + WIDTH), tl.load(row + SIZE).to(tl.float32)
    slot = tl.load(row + SLOT)
    g, m = pointer(addresses, tensor, 1, G, MULTIPLE), pointer(addresses, tensor, 2, tl.float32, MULTIPLE)
    values = pointer(addresses, tensor, 3, tl.float32, MULTIPLE)
    at = element[:, None] + tl.arange(0, K)[None, :]
    mask = tl.broadcast_to(alive[:, None], (GROUPS, K))
    if MULTIPLE == 1:
        mask = mask & (tl.arange(0, K)[None, :] < width)
    x = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    if slot >= 0:
        mean = tl.zeros([GROUPS], tl.float32) + tl.load(sums + slot * sums_width)
        square = tl.zeros([GROUPS], tl.float32) + tl.load(sums + slot * sums_width + sums_width - 1)
    else:
        mean = _sums(x, GROUPS, K) * (1.0 / K)
        square = _sums(x * x, GROUPS, K) / size
    moment = tl.load(m + block, mask=alive, other=0.0)
    if BY_BLOCK:
        outer = tl.load(row + OUTER) + line * tl.load(row + OUTER_STRIDE)
        denominator = tl.load(values + outer, mask=alive, other=1.0)
    else:
        v = tl.load(values + block, mask=alive, other=1.0)
        if ADVANCE:
            v += scalar(scalars, tensor, REST2) * (square - v)
            tl.store(values + block, v, mask=alive)
        denominator = tl.sqrt_rn(v) * scalar(scalars, tensor, INVERSE_ROOT) + scalar(scalars, tensor, EPS)
    if ADVANCE:
        moment += scalar(scalars, tensor, REST1) * (mean - moment)
        tl.store(m + block, moment, mask=alive)
    shift = moment * scalar(scalars, tensor, INVERSE_CORRECTION) - mean
    if APPLY:
        p = pointer(addresses, tensor, 0, P, MULTIPLE)
        factor = tl.div_rn(scalar(scalars, tensor, STEP_SIZE) / growth, denominator)
        weight = tl.load(p + at, mask=mask, other=0.0).to(tl.float32) * scalar(scalars, tensor, DECAY)
        weight -= factor[:, None] * (x + shift[:, None])
        tl.store(p + at, weight.to(P), mask=mask)
    share = 0.0
    if LIMITED and ADVANCE:
        squares = square + shift * shift + shift * mean * (2.0 * K) / size
        share = tl.sum(tl.where(alive, squares / (denominator * denominator), 0.0)) * width
    return share


@triton.jit
def gwt(
    rows, programs, addresses, scalars, sums, sums_width, norms, shares,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BY_BLOCK: tl.constexpr, LIMITED: tl.constexpr,
    ADVANCE: tl.constexpr, APPLY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = TILE // K
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(programs + 2 * program).to(tl.int64) * NUM_FIELDS
    first = tl.load(programs + 2 * program + 1).to(tl.int64) * (PROGRAM // K)
    offset, block, width = tl.load(row + OFFSET), tl.load(row + BLOCK), tl.load(row + WIDTH)
    count, lines, tensor = tl.load(row + COUNT), tl.load(row + ROWS), tl.load(row + TENSOR)
    last = tl.minimum(first + PROGRAM // K, lines * count)
    share = 0.0
    if tl.load(addresses + tensor * 4) != 0:
        growth = 1.0
        if LIMITED and APPLY:
            growth = tl.load(norms + tl.load(row + MATRIX))
        # Lines lie in different blocks of denominators.
        one_by_one = (tl.load(row + ROW_STRIDE) == count * width) & (tl.load(row + BLOCK_STRIDE) == count)
        end_to_end = (lines == 1) | one_by_one
        if ALIGNED and end_to_end and width == K and (offset | block | last) % VECTOR == 0:
            last = last // VECTOR * VECTOR  # which tells the compiler so, here and below
            for start in range(first, last, GROUPS):
                run = start + tl.arange(0, GROUPS)
                elements, blocks = offset // VECTOR * VECTOR + run * K, block // VECTOR * VECTOR + run
                share += _step(
                    row, addresses, scalars, sums, sums_width, growth, elements, blocks, run // count, run < last,
                    P, G, K, BY_BLOCK, LIMITED, ADVANCE, APPLY, VECTOR,
                )  # fmt: skip
        else:
            for start in range(first, last, GROUPS):
                run = start + tl.arange(0, GROUPS)
                line = run // count
                column = run - line * count
                elements = offset + line * tl.load(row + ROW_STRIDE) + column * width
                blocks = block + line * tl.load(row + BLOCK_STRIDE) + column
                share += _step(
                    row, addresses, scalars, sums, sums_width, growth, elements, blocks, line, run < last,
                    P, G, K, BY_BLOCK, LIMITED, ADVANCE, APPLY, 1,
                )  # fmt: skip
    if LIMITED and ADVANCE:
        tl.store(shares + program, share)


@triton.jit
def add_shares(matrices, shares, norms):
    """norms[matrix] += sum of its programs' shares / numel; see `Shares`."""
    matrix = matrices + tl.program_id(0).to(tl.int64) * 4
    total = tl.zeros([SHARES], tl.float32)
    for start in range(tl.load(matrix + 1), tl.load(matrix + 2), SHARES):
        at = start + tl.arange(0, SHARES)
        total += tl.load(shares + at, mask=at < tl.load(matrix + 2), other=0.0)
    norm = norms + tl.load(matrix)
    tl.store(norm, tl.load(norm) + tl.sum(total) / tl.load(matrix + 3).to(tl.float32))


@triton.jit
def growths(rows, num_rows, addresses, norms, limiter):
    """Each row is one run: a matrix, or this rank's part of it."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row = rows + lane * NUM_FIELDS
    tensor = tl.load(row + TENSOR, mask=lane < num_rows, other=0)
    values = tl.load(addresses + tensor * 4, mask=lane < num_rows, other=0)
    alive = values != 0
    place = norms + tl.load(row + MATRIX, mask=alive, other=0)
    previous = tl.cast(values, tl.pointer_type(tl.float32)) + tl.load(row + BLOCK, mask=alive, other=0)
    norm = tl.sqrt_rn(tl.maximum(tl.load(place, mask=alive, other=0.0), 0.0))
    last = tl.load(previous, mask=alive, other=1.0)
    growth = tl.maximum(tl.div_rn(norm, tl.maximum(last, 1.0)), limiter) / limiter
    tl.store(previous, tl.div_rn(norm, growth), mask=alive)
    tl.store(place, growth, mask=alive)
