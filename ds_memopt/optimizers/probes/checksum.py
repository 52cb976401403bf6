"""A 64-bit checksum of weights that every rank computes over what it holds: the sum over all ranks is the whole's.

checksum = sum over all elements of mix(bits + key + index * GOLDEN) mod 2^64, with

    bits    the element's bit pattern, as a signed integer of the same width
    key     name_hash of the dtype and the parameter's name, so that equal bits of another dtype or name count otherwise
    index   the element's index in the flattened whole parameter
    mix     the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
            OOPSLA 2014), a bijection on 64 bits

Summing bits times a random weight would be simpler, but miss changes: 64-bit numbers lose all but one bit of the weight
where only signs differ, so that swapping x and -x would change nothing; and zeros would count nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ds_memopt.optimizers.probes.noise import name_hash

PIECE = 2**18
"""Elements summed at a time, in up to 20 MiB besides the weights. With 2^20 a CPU, short of cache, is half as fast."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer to view an element as, by its bytes."""


def _signed(word: int) -> int:
    """The number in [-2^63, 2^63) that has the bits of a number in [0, 2^64): tensors take no larger ones."""
    return (word ^ 2**63) - 2**63


GOLDEN, FACTOR_1, FACTOR_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix_(words: torch.Tensor) -> torch.Tensor:
    """Mix int64 words in place. >> copies the sign bit, which an unsigned shift would not: hence the masks."""
    words ^= (words >> 30) & (2**34 - 1)
    words *= FACTOR_1
    words ^= (words >> 27) & (2**37 - 1)
    words *= FACTOR_2
    words ^= (words >> 31) & (2**33 - 1)
    return words


@torch.no_grad()
def checksum(parts: Iterable[tuple[str, int, torch.Tensor]], device: torch.device | str = "cpu") -> torch.Tensor:
    """The checksum of parts of parameters: 0-dim int64 on `device`. Ranks add theirs up, by an all_reduce with SUM.

    parts: (parameter name, index of the first element in the flattened whole parameter, 1-D tensor on any device).
    Over all ranks each element must come once; the order and the cuts between parts do not matter.

    Raises ValueError for a tensor that is not 1-D, for elements of over 8 bytes, and for a negative start.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, start, tensor in parts:
        if tensor.dim() != 1 or tensor.dtype.itemsize not in INTEGERS or start < 0:
            raise ValueError(
                f"{name} from element {start} must be 1-D, of at most 8 bytes an element and from an element >= 0 on; "
                f"it is {tensor.dim()}-D of {tensor.dtype}. Hand in slices of the flattened parameter."
            )
        key = _signed(name_hash(f"{tensor.dtype} {name}"))
        for bits in tensor.detach().view(INTEGERS[tensor.dtype.itemsize]).split(PIECE):
            words = torch.arange(start, start + len(bits), device=bits.device).mul_(GOLDEN).add_(key).add_(bits)
            total += _mix_(words).sum().to(device)
            start += len(bits)
    return total


def as_hex(total: torch.Tensor) -> str:
    """A checksum as 16 hexadecimal digits."""
    return f"{total.item() % 2**64:016x}"
