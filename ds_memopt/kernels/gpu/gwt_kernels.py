"""Triton kernels of GWT: a row of a tile is a group; `GWTCall` in ../back_ends.py has the formulas.

Arguments as in adam_kernels.py; a tensor's first four addresses are those of Adam on what is not transformed.
Groups are added up by halves, as the plain formula does, so that their sums do not depend on alignment.
"""

import triton
import triton.language as tl

from ds_memopt.kernels.gpu import launches
from ds_memopt.kernels.gpu.adam_kernels import (
    ADDRESSES,
    BLOCK,
    BLOCK_STRIDE,
    COUNT,
    DECAY,
    INVERSE_CORRECTION,
    NUM_FIELDS,
    OFFSET,
    PROGRAM,
    REST1,
    REST2,
    ROW_STRIDE,
    ROWS,
    SIZE,
    SLOT,
    STEP_SIZE_OF_GROUPS,
    TENSOR,
    TILE,
    VECTOR,
    WIDTH,
    by_block,
    by_element,
    denominator_of,
    pointer,
    scalar,
)
from ds_memopt.kernels.work import FIELDS

OUTER = tl.constexpr(FIELDS.index("outer"))
OUTER_STRIDE = tl.constexpr(FIELDS.index("outer_stride"))
MATRIX = tl.constexpr(FIELDS.index("matrix"))
INTERVAL = tl.constexpr(FIELDS.index("interval"))
LANES = tl.constexpr(128)  # slots that a program takes
SHARES = tl.constexpr(1024)  # shares that are added up at once

BLOCK_SECOND_MOMENT = tl.constexpr(3)
UPDATE_NORM = tl.constexpr(4)
APPROXIMATION = tl.constexpr(5)
SECOND_MOMENT = tl.constexpr(6)

NUM_MATRIX_FIELDS = tl.constexpr(len(launches.MATRIX_FIELDS))
OF_MATRIX_TENSOR = tl.constexpr(launches.MATRIX_FIELDS.index("tensor"))
OF_MATRIX_INTERVAL = tl.constexpr(launches.MATRIX_FIELDS.index("interval"))
NUMEL = tl.constexpr(launches.MATRIX_FIELDS.index("numel"))
FIRST_SHARE = tl.constexpr(launches.MATRIX_FIELDS.index("first_share"))
LAST_SHARE = tl.constexpr(launches.MATRIX_FIELDS.index("last_share"))
FIRST_CUT = tl.constexpr(launches.MATRIX_FIELDS.index("first_cut"))
LAST_CUT = tl.constexpr(launches.MATRIX_FIELDS.index("last_cut"))


@triton.jit
def cut_groups(
    rows, addresses, holders, slots, num_slots, slots_width, period,
    G: tl.constexpr, SQUARES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Each row's one run's sum / period, and its share in the mean square, to its slot. FIRST: else zeros."""
    slot = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    holder = tl.load(holders + slot, mask=slot < num_slots, other=-1)
    row = rows + holder * NUM_FIELDS
    tensor = tl.load(row + TENSOR, mask=holder >= 0, other=0)
    values = tl.load(addresses + tensor * ADDRESSES + 1, mask=holder >= 0, other=0)
    alive = values != 0
    width = tl.load(row + WIDTH, mask=alive, other=0)
    first = tl.cast(values, tl.pointer_type(G)) + tl.load(row + OFFSET, mask=alive, other=0)
    total, squares = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for i in range(0, period):
        x = tl.load(first + i, mask=alive & (i < width), other=0.0).to(tl.float32)
        total += x
        squares += x * x
    written = slot < num_slots if FIRST else alive
    tl.store(slots + slot * slots_width, total / period, mask=written)
    if SQUARES:
        size = tl.load(row + SIZE, mask=alive, other=1).to(tl.float32)
        tl.store(slots + slot * slots_width + 1, squares / size, mask=written)


@triton.jit
def sums_of_groups(x, GROUPS: tl.constexpr, K: tl.constexpr):
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
    g, m = pointer(addresses, tensor, 1, G, MULTIPLE), pointer(addresses, tensor, APPROXIMATION, tl.float32, MULTIPLE)
    at = element[:, None] + tl.arange(0, K)[None, :]
    mask = tl.broadcast_to(alive[:, None], (GROUPS, K))
    if MULTIPLE == 1:
        mask = mask & (tl.arange(0, K)[None, :] < width)
    x = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    if slot >= 0:
        mean = tl.zeros([GROUPS], tl.float32) + tl.load(sums + slot * sums_width)
        square = tl.zeros([GROUPS], tl.float32) + tl.load(sums + slot * sums_width + sums_width - 1)
    else:
        mean = sums_of_groups(x, GROUPS, K) * (1.0 / K)
        square = sums_of_groups(x * x, GROUPS, K) / size
    moment = tl.load(m + block, mask=alive, other=0.0)
    if BY_BLOCK:
        outer = tl.load(row + OUTER) + line * tl.load(row + OUTER_STRIDE)
        v = tl.load(pointer(addresses, tensor, BLOCK_SECOND_MOMENT, tl.float32) + outer, mask=alive, other=1.0)
    else:
        values = pointer(addresses, tensor, SECOND_MOMENT, tl.float32, MULTIPLE)
        v = tl.load(values + block, mask=alive, other=1.0)
        if ADVANCE:
            v += scalar(scalars, tensor, REST2) * (square - v)
            tl.store(values + block, v, mask=alive)
    denominator = denominator_of(v, scalars, tensor)
    if ADVANCE:
        moment += scalar(scalars, tensor, REST1) * (mean - moment)
        tl.store(m + block, moment, mask=alive)
    shift = moment * scalar(scalars, tensor, INVERSE_CORRECTION) - mean
    if APPLY:
        p = pointer(addresses, tensor, 0, P, MULTIPLE)
        factor = tl.div_rn(scalar(scalars, tensor, STEP_SIZE_OF_GROUPS) / growth, denominator)
        weight = tl.load(p + at, mask=mask, other=0.0).to(tl.float32) * scalar(scalars, tensor, DECAY)
        weight -= factor[:, None] * (x + shift[:, None])
        tl.store(p + at, weight.to(P), mask=mask)
    share = 0.0
    if LIMITED and ADVANCE:
        squares = square + shift * shift + shift * mean * (2.0 * K) / size
        share = tl.sum(tl.where(alive, squares / (denominator * denominator), 0.0)) * width
    return share


@triton.jit
def limit(addresses, tensor, matrix, interval, norms, previous, limiter):
    """By what a matrix's update is divided; the size that it then has is kept."""
    norm = tl.sqrt_rn(tl.maximum(tl.load(norms + matrix), 0.0))
    growth = tl.div_rn(norm, tl.maximum(tl.load(previous + matrix), 1.0))
    growth = tl.div_rn(tl.maximum(growth, limiter), limiter)
    # All programs of a matrix write the same, and none reads it.
    tl.store(pointer(addresses, tensor, UPDATE_NORM, tl.float32) + interval, tl.div_rn(norm, growth))
    return growth


@triton.jit
def gwt(
    rows, programs, dense_rows, dense_programs, num_dense, addresses, scalars, sums, sums_width, norms, previous,
    shares, limiter,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, K: tl.constexpr, BY_BLOCK: tl.constexpr, LIMITED: tl.constexpr,
    ADVANCE: tl.constexpr, APPLY: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Programs of groups, and with DENSE before them those of what is not transformed."""
    program = tl.program_id(0).to(tl.int64)
    if DENSE:
        program -= num_dense
    if program >= 0:
        _groups(
            program, rows, programs, addresses, scalars, sums, sums_width, norms, previous, shares, limiter,
            P, G, K, BY_BLOCK, LIMITED, ADVANCE, APPLY, ALIGNED,
        )  # fmt: skip
    elif DENSE:
        program += num_dense
        if BY_BLOCK:
            by_block(
                program, dense_rows, dense_programs, addresses, scalars, sums, P, G, M, "none", True, ALIGNED
            )  # fmt: skip
        else:
            by_element(program, dense_rows, dense_programs, addresses, scalars, P, G, M, ALIGNED)


@triton.jit
def _groups(
    program, rows, programs, addresses, scalars, sums, sums_width, norms, previous, shares, limiter,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BY_BLOCK: tl.constexpr, LIMITED: tl.constexpr,
    ADVANCE: tl.constexpr, APPLY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = TILE // K
    row = rows + tl.load(programs + 2 * program).to(tl.int64) * NUM_FIELDS
    first = tl.load(programs + 2 * program + 1).to(tl.int64) * (PROGRAM // K)
    offset, block, width = tl.load(row + OFFSET), tl.load(row + BLOCK), tl.load(row + WIDTH)
    count, lines, tensor = tl.load(row + COUNT), tl.load(row + ROWS), tl.load(row + TENSOR)
    last = tl.minimum(first + PROGRAM // K, lines * count)
    if tl.load(addresses + tensor * ADDRESSES + 1) != 0:
        share, growth = 0.0, 1.0
        if LIMITED and APPLY:
            matrix, interval = tl.load(row + MATRIX), tl.load(row + INTERVAL)
            growth = limit(addresses, tensor, matrix, interval, norms, previous, limiter)
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
def matrix_norms(
    table, cut_rows, addresses, scalars, sums, sums_width, norms, previous, shares,
    G: tl.constexpr, K: tl.constexpr, BY_BLOCK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """norms[matrix] = (shares of its whole groups, and of its cut ones, which advance) / numel; see `Matrices`.

    FIRST: zeros where this rank has nothing that moves.
    """
    GROUPS: tl.constexpr = TILE // K
    place = tl.program_id(0).to(tl.int64)
    matrix = table + place * NUM_MATRIX_FIELDS
    tensor = tl.load(matrix + OF_MATRIX_TENSOR)
    if tl.load(addresses + tl.maximum(tensor, 0) * ADDRESSES + 1, mask=tensor >= 0, other=0) != 0:
        total = tl.zeros([SHARES], tl.float32)
        last = tl.load(matrix + LAST_SHARE)
        for start in range(tl.load(matrix + FIRST_SHARE), last, SHARES):
            at = start + tl.arange(0, SHARES)
            total += tl.load(shares + at, mask=at < last, other=0.0)
        norm = tl.sum(total)
        nowhere = tl.zeros([GROUPS], tl.int64)
        for number in range(tl.load(matrix + FIRST_CUT), tl.load(matrix + LAST_CUT)):
            row = cut_rows + number * NUM_FIELDS
            norm += _step(
                row, addresses, scalars, sums, sums_width, 1.0, nowhere + tl.load(row + OFFSET),
                nowhere + tl.load(row + BLOCK), nowhere, tl.arange(0, GROUPS) < 1,
                tl.float32, G, K, BY_BLOCK, True, True, False, 1,
            )  # fmt: skip
        tl.store(norms + place, norm / tl.load(matrix + NUMEL).to(tl.float32))
        update_norm = pointer(addresses, tensor, UPDATE_NORM, tl.float32) + tl.load(matrix + OF_MATRIX_INTERVAL)
        tl.store(previous + place, tl.load(update_norm))
    elif FIRST:
        tl.store(norms + place, 0.0)
