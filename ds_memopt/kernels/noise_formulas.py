"""The noise of zeroth-order training in plain PyTorch: the reference for any other back end, which gives equal bits.

The random bits of a parameter's elements come from Philox 4x32-10, those of rounding from Philox 4x32-7 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC11), a function from a 128-bit counter and a 64-bit key to four words
of 32 bits:

    counter = (low word of b, high word of b, step, probe)       with b = element // (elements per counter)
    key     = (low word of k, high word of k)                    with k of the `NoiseSource`

A Gaussian counter gives 4 elements, a Rademacher counter 128, one of rounding bits 16; see the functions. All
arithmetic is on integers, or +, -, * and conversions in fp32, which IEEE 754 rounds the same way everywhere, and a root
that is rounded so too. Hence the bits do not depend on the device, the threads or the compiler, as those of torch.log
and cos do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ds_memopt.kernels.compiled import compile_exactly

WORD = 0xFFFFFFFF
"""The 32 low bits: words are kept in int64, as PyTorch has few operations on unsigned integers."""

ROUNDS_OF_ROUNDING = 7
"""Of Philox where its bits round: the fewest with which it passes the tests of randomness in the paper."""

PIECE = {"cpu": 2**18}
PIECE_ELSEWHERE = 2**22
"""Elements generated at a time, on each type of device: few enough for a CPU's cache, many for a GPU's launches."""


class NoiseSource(NamedTuple):
    """The noise of one parameter in one probe of one step.

    kind: of `FORMULAS`. key: 64 bits. step, probe: 32 bits each. compiled: use torch.compile, where the formula itself
    is asked. The numbers are the same to the bit. On a CPU they come 5 to 12 times faster, after some seconds for the
    first.
    """

    kind: str
    key: int
    step: int
    probe: int
    compiled: bool = False

    @property
    def per_counter(self) -> int:
        """How many elements a counter gives."""
        return FORMULAS[self.kind][1]


def elements(source: NoiseSource, start: int, length: int, device: torch.device) -> torch.Tensor:
    """Elements [start, start + length), a new tensor in fp32.

    Raises RuntimeError on first use where compilation is asked for and does not work.
    """
    formula, per_counter = FORMULAS[source.kind]
    generate = _compiled(source.kind, device) if source.compiled else formula
    first, skip = divmod(start, per_counter)
    arguments = torch.tensor([first, source.step, source.probe, source.key & WORD, source.key >> 32], device="cpu")
    if device.type == "cuda":
        arguments = arguments.pin_memory()  # else the copy would wait for all that the GPU still has to do
    arguments = arguments.to(device, non_blocking=True)
    count = -(-(skip + length) // per_counter)
    return generate(arguments, max(count, 2))[skip : skip + length]  # never 1: see compile_exactly


def philox(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor | int], rounds: int = 10) -> list[torch.Tensor]:
    """Philox 4x32 of four counter words and two key words, element by element; all words are int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(rounds):
        # The product of two words is less than 2^64: int64 holds its bits, if not its sign. What lies above the low
        # 32 bits of c1 and c3, and of a key that has grown over 2^32, is masked away after the next XOR.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product1 >> 32) ^ c1 ^ (k0 + number * 0x9E3779B9)) & WORD
        c2 = ((product0 >> 32) ^ c3 ^ (k1 + number * 0xBB67AE85)) & WORD
        c1, c3 = product1, product0
    return [c0, c1 & WORD, c2, c3 & WORD]


def _random_words(arguments: torch.Tensor, count: int, rounds: int = 10) -> list[torch.Tensor]:
    """The four words of `count` counters in turn. arguments: int64 (first b, step, probe, key low, key high)."""
    first, step, probe, *key = arguments
    block = first + torch.arange(count, device=arguments.device)
    return philox((block & WORD, block >> 32, step, probe), key, rounds)


def gaussian(arguments: torch.Tensor, count: int) -> torch.Tensor:
    """4 * `count` standard normal fp32 numbers: of words (w0, w1, w2, w3), the pairs of (w0, w1) and of (w2, w3).

    arguments: see `_random_words`.
    """
    w0, w1, w2, w3 = _random_words(arguments, count)
    return torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], dim=1).flatten()


def box_muller(v: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent normal fp32 numbers from two words: a radius r from v, and a direction from w.

    r = sqrt(-2 ln(u)) with u = (v + 1) / 2^32 rounded to fp32, hence r <= 6.661. The 30 low bits of w give an angle a
    in [-pi/4, pi/4), bit 31 the sign of r, and bit 30 which comes first of r cos(a) and r sin(a): together they make
    every direction equally likely. The error is below 1e-6.

    Source: Box and Muller, "A note on the generation of random normal deviates" (1958); sin and cos: Cephes (Moshier),
    sinf.c.
    """
    squared = -2 * _log((v + 1).float() * 2.0**-32)
    # Where sqrt in fp64 is off by an ulp or two, rounding it to fp32 still gives the fp32 number nearest to the true
    # root: no root of an fp32 number lies within 2^-50 of the middle between two fp32 numbers without being it.
    r = squared.double().sqrt().float()
    r = torch.where(w < 2**31, r, -r)
    a = ((w & (2**30 - 1)) - 2**29).float() * (math.pi * 2.0**-31)
    aa = a * a
    sine = ((-1.9515295891e-4 * aa + 8.3321608736e-3) * aa - 1.6666654611e-1) * aa * a + a
    cosine = ((2.443315711809948e-5 * aa - 1.388731625493765e-3) * aa + 4.166664568298827e-2) * aa * aa - 0.5 * aa + 1
    sine_first = (w & 2**30) != 0
    return r * torch.where(sine_first, sine, cosine), r * torch.where(sine_first, cosine, sine)


def _log(u: torch.Tensor) -> torch.Tensor:
    """ln(u) for positive normal fp32 u. Source: Cephes (Moshier), logf.c."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2): u = 2^exponent * (1 + x), 1 + x from it to sqrt(2)
    x = (bits - exponent * 2**23).view(torch.float32) - 1
    series = 7.0376836292e-2 * x - 1.1514610310e-1
    for coefficient in (
        *(1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1),
        *(2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    ):
        series = series * x + coefficient
    xx = x * x
    return xx * x * series - 0.5 * xx + x + exponent.float() * math.log(2)


def rademacher(arguments: torch.Tensor, count: int) -> torch.Tensor:
    """128 * `count` fp32 numbers, +1 or -1: bit i of a counter's word j, 1 for -1, gives its element 32 j + i.

    arguments: see `_random_words`.
    """
    words = torch.stack(_random_words(arguments, count), dim=1)
    bits = (words[:, :, None] >> torch.arange(32, device=words.device)) & 1
    return (1 - 2 * bits.float()).flatten()


def rounding_bits(arguments: torch.Tensor, count: int) -> torch.Tensor:
    """16 * `count` numbers of 8 bits, in int32: byte i of a counter's word j, from the lowest, is its element 4 j + i.

    arguments: see `_random_words`.
    """
    words = torch.stack(_random_words(arguments, count, ROUNDS_OF_ROUNDING), dim=1)
    return ((words[:, :, None] >> torch.arange(0, 32, 8, device=words.device)) & 0xFF).int().flatten()


FORMULAS: dict[str, tuple[Callable[[torch.Tensor, int], torch.Tensor], int]] = {
    "gaussian": (gaussian, 4),
    "rademacher": (rademacher, 128),
    "rounding": (rounding_bits, 16),
}
"""For each kind of noise, its formula and how many elements a counter gives."""


NOISE_KINDS = ("gaussian", "rademacher")
"""What weights are perturbed with."""


@functools.cache
def _compiled(kind: str, device: torch.device) -> Callable[[torch.Tensor, int], torch.Tensor]:
    formula, _ = FORMULAS[kind]
    return compile_exactly(formula, torch.tensor([2**40, 3, 1, 0x243F6A88, 0x85A308D3], device=device), 2**12)
