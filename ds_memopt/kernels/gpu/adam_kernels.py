"""Triton kernels of Adam with one second moment per block or per element.

`rows` and `programs` are those of `Schedule`, `addresses` and `scalars` those of `Tables`: addresses of a tensor's
parameters, gradients, first moments, and second moments per block or element; scalars as `_adam` puts them.

Sums have one order, which depends on the block alone: they are loaded without regard to alignment, for the compiler
shares elements out among threads by it.
"""

import triton
import triton.language as tl

from ds_memopt.kernels.gpu import launches
from ds_memopt.kernels.work import FIELDS

PROGRAM = tl.constexpr(launches.PROGRAM)
TILE = tl.constexpr(launches.TILE)
ADDRESSES = tl.constexpr(launches.ADDRESSES)
SCALARS = tl.constexpr(launches.SCALARS)
NUM_FIELDS = tl.constexpr(len(FIELDS))
TENSOR = tl.constexpr(FIELDS.index("tensor"))
OFFSET = tl.constexpr(FIELDS.index("offset"))
ROWS = tl.constexpr(FIELDS.index("rows"))
ROW_STRIDE = tl.constexpr(FIELDS.index("row_stride"))
COUNT = tl.constexpr(FIELDS.index("count"))
WIDTH = tl.constexpr(FIELDS.index("width"))
BLOCK = tl.constexpr(FIELDS.index("block"))
BLOCK_STRIDE = tl.constexpr(FIELDS.index("block_stride"))
ENTRY = tl.constexpr(FIELDS.index("entry"))
SIZE = tl.constexpr(FIELDS.index("size"))
SLOT = tl.constexpr(FIELDS.index("slot"))

REST1 = tl.constexpr(0)
REST2 = tl.constexpr(1)
EPS = tl.constexpr(2)
DECAY = tl.constexpr(3)
STEP_SIZE = tl.constexpr(4)
INVERSE_ROOT = tl.constexpr(5)
INVERSE_CORRECTION = tl.constexpr(6)  # this and the next one: of GWT's groups
STEP_SIZE_OF_GROUPS = tl.constexpr(7)

SHORT = tl.constexpr(16)  # up to so many elements a run is one thread's, so that those of a program fit in its cache
VECTOR = tl.constexpr(8)  # elements, of which 16 bytes or more are loaded at once


@triton.jit
def pointer(addresses, tensor, place: tl.constexpr, dtype: tl.constexpr, MULTIPLE: tl.constexpr = 1):
    """MULTIPLE > 1: the address is a multiple of 16."""
    base = tl.cast(tl.load(addresses + tensor * ADDRESSES + place), tl.pointer_type(dtype))
    if MULTIPLE > 1:
        base = tl.multiple_of(base, 16)  # here, where it is made: the compiler forgets hints on arguments of functions
    return base


@triton.jit
def scalar(scalars, tensor, place: tl.constexpr):
    return tl.load(scalars + tensor * SCALARS + place)


@triton.jit
def _own_runs(row, number):
    """The runs [first, last) of a piece that its program `number` takes."""
    each = tl.maximum(tl.full([], PROGRAM, tl.int64) // tl.load(row + WIDTH), 1)
    first = number * each
    return first, tl.minimum(first + each, tl.load(row + ROWS) * tl.load(row + COUNT))


@triton.jit
def _place(row, run):
    """First element and block of a run."""
    count = tl.load(row + COUNT)
    line = run // count
    column = run - line * count
    element = tl.load(row + OFFSET) + line * tl.load(row + ROW_STRIDE) + column * tl.load(row + WIDTH)
    return element, tl.load(row + BLOCK) + line * tl.load(row + BLOCK_STRIDE) + column


@triton.jit
def _squares_of_long(values, first, width):
    lanes = tl.arange(0, TILE)
    squares = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        x = tl.load(values + first + start + lanes, mask=start + lanes < width, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares)


@triton.jit
def _squares_of_short(values, first, width, alive):
    squares = tl.zeros([TILE], tl.float32)
    for i in range(0, width):
        x = tl.load(values + first + i, mask=alive, other=0.0).to(tl.float32)
        squares += x * x
    return squares


@triton.jit
def cut_squares(rows, num_rows, addresses, holders, slots, num_slots, G: tl.constexpr, FIRST: tl.constexpr):
    """Each row's one run's share in its block's mean square, to its slot. FIRST: zeros to all other slots."""
    program = tl.program_id(0).to(tl.int64)
    squares_of_cut_row(program, rows, num_rows, addresses, holders, slots, num_slots, G, FIRST)


@triton.jit
def squares_of_cut_row(
    program, rows, num_rows, addresses, holders, slots, num_slots, G: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    if program < num_rows:
        row = rows + program * NUM_FIELDS
        tensor, width, slot = tl.load(row + TENSOR), tl.load(row + WIDTH), tl.load(row + SLOT)
        if tl.load(addresses + tensor * ADDRESSES + 1) != 0:
            squares = _squares_of_long(pointer(addresses, tensor, 1, G), tl.load(row + OFFSET), width)
            tl.store(slots + slot, squares / tl.load(row + SIZE).to(tl.float32))
        elif FIRST:
            tl.store(slots + slot, 0.0)
    else:
        every = (program - num_rows) * TILE + tl.arange(0, TILE)
        holder = tl.load(holders + every, mask=every < num_slots, other=0)
        tl.store(slots + every, tl.zeros([TILE], tl.float32), mask=holder < 0)


@triton.jit
def denominator_of(v, scalars, tensor):
    return tl.sqrt_rn(v) * scalar(scalars, tensor, INVERSE_ROOT) + scalar(scalars, tensor, EPS)


@triton.jit
def _move(p, g, m, element, entry, mask, denominator, scalars, tensor):
    """Adam's update of elements, with what each is divided by."""
    x = tl.load(g + element, mask=mask, other=0.0).to(tl.float32)
    moment = tl.load(m + entry, mask=mask, other=0.0).to(tl.float32)
    moment += scalar(scalars, tensor, REST1) * (x - moment)
    tl.store(m + entry, moment.to(m.dtype.element_ty), mask=mask)
    weight = tl.load(p + element, mask=mask, other=0.0).to(tl.float32) * scalar(scalars, tensor, DECAY)
    weight -= scalar(scalars, tensor, STEP_SIZE) * tl.div_rn(moment, denominator)
    tl.store(p + element, weight.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _move_long(
    addresses, tensor, first, first_entry, width, denominator, scalars,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Of one run, whose place and width are multiples of MULTIPLE elements."""
    p = pointer(addresses, tensor, 0, P, MULTIPLE)
    g = pointer(addresses, tensor, 1, G, MULTIPLE)
    m = pointer(addresses, tensor, 2, M, MULTIPLE)
    # Which tells the compiler so.
    first, first_entry, width = first // MULTIPLE, first_entry // MULTIPLE, width // MULTIPLE * MULTIPLE
    divisors = tl.zeros([TILE], tl.float32) + denominator
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        element, entry = first * MULTIPLE + at, first_entry * MULTIPLE + at
        _move(p, g, m, element, entry, at < width, divisors, scalars, tensor)


@triton.jit
def adam_by_block(
    rows, programs, addresses, scalars, slots,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SUMS: tl.constexpr, MOVE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    by_block(program, rows, programs, addresses, scalars, slots, P, G, M, SUMS, MOVE, ALIGNED)


@triton.jit
def by_block(
    program, rows, programs, addresses, scalars, slots,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, SUMS: tl.constexpr, MOVE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """SUMS: "own", each run is a block; "slots", mean squares are there; "none", second moments have advanced.

    MOVE: whether parameters and first moments move, too.
    """
    row = rows + tl.load(programs + 2 * program).to(tl.int64) * NUM_FIELDS
    first, last = _own_runs(row, tl.load(programs + 2 * program + 1).to(tl.int64))
    tensor, width, size = tl.load(row + TENSOR), tl.load(row + WIDTH), tl.load(row + SIZE).to(tl.float32)
    to_entry = tl.load(row + ENTRY) - tl.load(row + OFFSET)
    if tl.load(addresses + tensor * ADDRESSES + 1) != 0:
        p, g, m = pointer(addresses, tensor, 0, P), pointer(addresses, tensor, 1, G), pointer(addresses, tensor, 2, M)
        values = pointer(addresses, tensor, 3, tl.float32)
        slot = slots + tl.load(row + SLOT)
        rest2 = scalar(scalars, tensor, REST2)
        if width <= SHORT:
            for start in range(first, last, TILE):
                run = start + tl.arange(0, TILE)
                alive = run < last
                element, block = _place(row, run)
                v = tl.load(values + block, mask=alive, other=1.0)
                if SUMS != "none":
                    total = _squares_of_short(g, element, width, alive) if SUMS == "own" else 0.0
                    mean_square = total / size if SUMS == "own" else tl.load(slot)
                    v += rest2 * (mean_square - v)
                    tl.store(values + block, v, mask=alive)
                if MOVE:
                    denominator = denominator_of(v, scalars, tensor)
                    for i in range(0, width):
                        _move(p, g, m, element + i, element + i + to_entry, alive, denominator, scalars, tensor)
        else:
            bits = tl.load(row + OFFSET) | tl.load(row + ENTRY) | width | tl.load(row + ROW_STRIDE)
            for run in range(first, last):
                element, block = _place(row, run)
                v = tl.load(values + block)
                if SUMS != "none":
                    total = _squares_of_long(g, element, width) if SUMS == "own" else 0.0
                    mean_square = total / size if SUMS == "own" else tl.load(slot)
                    v += rest2 * (mean_square - v)
                    tl.store(values + block, v)
                if MOVE:
                    denominator, entry = denominator_of(v, scalars, tensor), element + to_entry
                    if ALIGNED and bits % VECTOR == 0:
                        _move_long(addresses, tensor, element, entry, width, denominator, scalars, P, G, M, VECTOR)
                    else:
                        _move_long(addresses, tensor, element, entry, width, denominator, scalars, P, G, M, 1)


@triton.jit
def _move_elements(
    addresses, tensor, first, first_entry, length, scalars,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    p = pointer(addresses, tensor, 0, P, MULTIPLE)
    g = pointer(addresses, tensor, 1, G, MULTIPLE)
    m = pointer(addresses, tensor, 2, M, MULTIPLE)
    values = pointer(addresses, tensor, 3, tl.float32, MULTIPLE)
    first, first_entry, length = first // MULTIPLE, first_entry // MULTIPLE, length // MULTIPLE * MULTIPLE
    rest2 = scalar(scalars, tensor, REST2)
    for start in range(0, length, TILE):
        at = start + tl.arange(0, TILE)
        element, entry, mask = first * MULTIPLE + at, first_entry * MULTIPLE + at, at < length
        x = tl.load(g + element, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + entry, mask=mask, other=0.0)
        v += rest2 * (x * x - v)
        tl.store(values + entry, v, mask=mask)
        _move(p, g, m, element, entry, mask, denominator_of(v, scalars, tensor), scalars, tensor)


@triton.jit
def adam_by_element(
    rows, programs, addresses, scalars, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ALIGNED: tl.constexpr
):
    by_element(tl.program_id(0).to(tl.int64), rows, programs, addresses, scalars, P, G, M, ALIGNED)


@triton.jit
def by_element(
    program, rows, programs, addresses, scalars,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = rows + tl.load(programs + 2 * program).to(tl.int64) * NUM_FIELDS
    number, tensor = tl.load(programs + 2 * program + 1).to(tl.int64), tl.load(row + TENSOR)
    if tl.load(addresses + tensor * ADDRESSES + 1) != 0:
        line_length, stride = tl.load(row + COUNT) * tl.load(row + WIDTH), tl.load(row + ROW_STRIDE)
        each = tl.cdiv(line_length, PROGRAM)
        line = number // each
        start = (number - line * each) * PROGRAM
        length = tl.minimum(line_length - start, PROGRAM)
        skipped = line * stride + start
        element, entry = tl.load(row + OFFSET) + skipped, tl.load(row + ENTRY) + skipped
        if ALIGNED and (element | entry | length) % VECTOR == 0:
            _move_elements(addresses, tensor, element, entry, length, scalars, P, G, M, VECTOR)
        else:
            _move_elements(addresses, tensor, element, entry, length, scalars, P, G, M, 1)
