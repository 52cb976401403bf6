"""Triton kernels of `ds_memopt.kernels.noise_formulas` and `stored_weights`, to the bit.

Every operation is one that the plain formulas have, in their order; they are launched without contraction of a * b + c
to one rounding. A program makes TILE elements, which begin where a counter does.
"""

import math

import triton
import triton.language as tl

TILE = tl.constexpr(4096)
HALF_TURN = tl.constexpr(math.pi * 2.0**-31)
LN_2 = tl.constexpr(math.log(2))

PART_FIELDS = (
    "weights", "kept", "gradient", "count", "start", "first_program", "first_term", "terms",
)  # fmt: skip
"""Of a part in `move`: addresses, elements, number of the first one, its first program and its terms."""
FIELDS = tl.constexpr(len(PART_FIELDS))
FIRST_PROGRAM = tl.constexpr(PART_FIELDS.index("first_program"))


@triton.jit
def _random_words(first, step, probe, key_low, key_high, COUNT: tl.constexpr):
    """Philox 4x32-10 of counters [first, first + COUNT)."""
    return philox(first + tl.arange(0, COUNT), step, probe, key_low, key_high, 10)


@triton.jit
def philox(block, step, probe, key_low, key_high, ROUNDS: tl.constexpr):
    """Philox 4x32 of counters, int64."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + step.to(tl.uint32), tl.zeros_like(c0) + probe.to(tl.uint32)
    k0, k1 = tl.zeros_like(c0) + key_low.to(tl.uint32), tl.zeros_like(c0) + key_high.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c1, c3, c0, c2 = c2 * 0xCD9E8D57, c0 * 0xD2511F53, high1 ^ c1 ^ k0, high0 ^ c3 ^ k1
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _log(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - exponent * 8388608).to(tl.float32, bitcast=True) - 1.0
    series = x * 7.0376836292e-2 - 1.1514610310e-1
    series = series * x + 1.1676998740e-1
    series = series * x + -1.2420140846e-1
    series = series * x + 1.4249322787e-1
    series = series * x + -1.6668057665e-1
    series = series * x + 2.0000714765e-1
    series = series * x + -2.4999993993e-1
    series = series * x + 3.3333331174e-1
    xx = x * x
    return xx * x * series - xx * 0.5 + x + exponent.to(tl.float32) * LN_2


@triton.jit
def _box_muller(v, w):
    # v + 1 rounded to fp32: both halves are exact in it, their sum is rounded once.
    halves = (v >> 16).to(tl.int32).to(tl.float32) * 65536.0
    u = (halves + ((v & 0xFFFF) + 1).to(tl.int32).to(tl.float32)) * 2.3283064365386963e-10
    r = tl.sqrt_rn(_log(u) * -2.0)
    r = (r.to(tl.uint32, bitcast=True) ^ (w & 0x80000000)).to(tl.float32, bitcast=True)
    a = ((w & 0x3FFFFFFF).to(tl.int32) - 536870912).to(tl.float32) * HALF_TURN
    aa = a * a
    sine = ((aa * -1.9515295891e-4 + 8.3321608736e-3) * aa - 1.6666654611e-1) * aa * a + a
    cosine = ((aa * 2.443315711809948e-5 - 1.388731625493765e-3) * aa + 4.166664568298827e-2) * aa * aa - aa * 0.5 + 1.0
    sine_first = (w & 0x40000000) != 0
    return r * tl.where(sine_first, sine, cosine), r * tl.where(sine_first, cosine, sine)


@triton.jit
def _noise(first, step, probe, key_low, key_high, GAUSSIAN: tl.constexpr):
    """Elements of counters from `first` on, [TILE] fp32."""
    if GAUSSIAN:
        w0, w1, w2, w3 = _random_words(first, step, probe, key_low, key_high, TILE // 4)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        w0, w1, w2, w3 = _random_words(first, step, probe, key_low, key_high, TILE // 128)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        signs = (words[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) << 31
        z = tl.reshape(signs | 0x3F800000, [TILE]).to(tl.float32, bitcast=True)
    return z


@triton.jit
def _places(first, skip, count, ALIGNED: tl.constexpr):
    """Of a program's elements in the tensors, and which exist: `skip` elements of the first counter come before them.

    ALIGNED: skip is 0, and count and addresses are multiples of 16, so that many elements are loaded at once.
    """
    at = first + tl.arange(0, TILE)
    if ALIGNED:
        mask = at < count // 16 * 16  # the compiler sees that it is a multiple
    else:
        at -= skip
        mask = (at >= 0) & (at < count)
    return at, mask


@triton.jit
def _rounded(values, W: tl.constexpr):
    """To the nearest, to even of two. By integers in bf16, for Triton's interpreter rounds ties away from zero."""
    if W.is_bf16():
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where(values == values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        values = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values


@triton.jit(do_not_specialize=["count", "start", "step", "probe", "key_low", "key_high"])
def add_noise(
    out,
    weights,
    count: tl.int64,
    start: tl.int64,
    step: tl.uint32,
    probe: tl.uint32,
    key_low: tl.uint32,
    key_high: tl.uint32,
    scale,
    GAUSSIAN: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out <- weights + scale * z, or with VALUES z. ALIGNED: as `_places` has it."""
    PER_COUNTER: tl.constexpr = 4 if GAUSSIAN else 128
    first = tl.program_id(0).to(tl.int64) * TILE
    counter = start // PER_COUNTER
    z = _noise(counter + first // PER_COUNTER, step, probe, key_low, key_high, GAUSSIAN)
    at, mask = _places(first, start - counter * PER_COUNTER, count, ALIGNED)
    if not VALUES:
        z = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32) + z * scale
    tl.store(out + at, _rounded(z, out.dtype.element_ty), mask=mask)


@triton.jit
def _part_of(program, parts, num_parts):
    """The last part whose first program is not behind this one."""
    low, high = 0, num_parts
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(parts + middle * FIELDS + FIRST_PROGRAM) <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_parts"])
def move(
    parts,
    num_parts,
    scalars,
    noises,
    factors,
    moved,
    W: tl.constexpr,
    KEPT: tl.constexpr,
    G: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """theta <- theta * decay - lr * (share * gradient + sum of factor * z), for all parts.

    parts: [parts, FIELDS]. scalars: [parts, 3], decay, lr and share. noises: [terms, 4], key, step and probe.
    moved: [programs, 2]. W, G: dtypes, G None without gradients. KEPT: "none", "residual" or "fp32".
    """
    PER_COUNTER: tl.constexpr = 4 if GAUSSIAN else 128
    program = tl.program_id(0).to(tl.int64)
    number = _part_of(program, parts, num_parts)
    part = parts + number * FIELDS
    weights = tl.cast(tl.load(part), tl.pointer_type(W))
    count, start = tl.load(part + 3), tl.load(part + 4)
    first = (program - tl.load(part + FIRST_PROGRAM)) * TILE
    counter = start // PER_COUNTER
    at, mask = _places(first, start - counter * PER_COUNTER, count, ALIGNED)
    if ALIGNED:
        weights = tl.multiple_of(weights, 16)
    direction = tl.zeros([TILE], tl.float32)
    if G is not None:
        gradient = tl.cast(tl.load(part + 2), tl.pointer_type(G))
        if ALIGNED:
            gradient = tl.multiple_of(gradient, 16)
        direction += tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32) * tl.load(scalars + number * 3 + 2)
    first_term = tl.load(part + 6)
    for term in range(first_term, first_term + tl.load(part + 7)):
        noise = noises + term * 4
        key_low, key_high, step, probe = tl.load(noise), tl.load(noise + 1), tl.load(noise + 2), tl.load(noise + 3)
        z = _noise(counter + first // PER_COUNTER, step, probe, key_low, key_high, GAUSSIAN)
        direction += z * tl.load(factors + term)
    before = tl.load(weights + at, mask=mask, other=0.0).to(tl.float32)
    if KEPT == "residual":
        kept = tl.cast(tl.load(part + 1), tl.pointer_type(tl.int16))
        if ALIGNED:
            kept = tl.multiple_of(kept, 16)
        beyond = tl.load(kept + at, mask=mask, other=0).to(tl.int32)
        before = (before.to(tl.int32, bitcast=True) + beyond).to(tl.float32, bitcast=True)
    if KEPT == "fp32":
        kept = tl.cast(tl.load(part + 1), tl.pointer_type(tl.float32))
        if ALIGNED:
            kept = tl.multiple_of(kept, 16)
        before = tl.load(kept + at, mask=mask, other=0.0)
    after = before * tl.load(scalars + number * 3) - direction * tl.load(scalars + number * 3 + 1)
    stored = _rounded(after, W)
    tl.store(weights + at, stored, mask=mask)
    now = stored.to(tl.float32)
    if KEPT == "residual":
        rounded = now.to(tl.int32, bitcast=True)
        beyond = tl.minimum(after.to(tl.int32, bitcast=True) - rounded, 32767)
        tl.store(kept + at, beyond.to(tl.int16), mask=mask)
        now = (rounded + beyond).to(tl.float32, bitcast=True)
    if KEPT == "fp32":
        tl.store(kept + at, after, mask=mask)
        now = after
    wanted = after - before
    # Outside the mask all that was loaded is 0, but the noise is not.
    tl.store(moved + program * 2, tl.sum(tl.where(mask, (now - before) * wanted, 0.0)))
    tl.store(moved + program * 2 + 1, tl.sum(tl.where(mask, wanted * wanted, 0.0)))
