"""The noise z of zeroth-order training as a function of what an element is, not as a stream of random numbers.

z = f(run seed, step, probe, the parameter's name, the element's index in the flattened whole parameter). So z is the
same on any number of ranks, for any slice, in any order, and after a resume. With the key

    k = seed XOR name_hash(name)

`ds_memopt.kernels.noise_formulas` says what the other arguments make of it, to the bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from ds_memopt import kernels

NOISE_VERSION = 1
"""Grows whenever any z changes: a record of steps can only be replayed with the version that wrote it."""


def name_hash(name: str) -> int:
    """64 bits that stand for a parameter's name: the BLAKE2b digest of 8 bytes of its UTF-8 form, little-endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Noise:
    """The noise of one probe of one step.

    seed: the run's seed, any integer of 64 bits, -2^63 to 2^64 - 1 (taken modulo 2^64).
    step, probe: counted from 0, each less than 2^32.
    kind: "gaussian", standard normal with |z| <= 6.661, or "rademacher", +1 or -1.
    compiled: use torch.compile where no fused back end runs, see `ds_memopt.kernels.back_ends`. The numbers are the
        same to the bit. On a CPU they come 5 to 12 times faster, after some seconds for the first.

    Raises ValueError for any that is out of range, and RuntimeError on first use where compilation does not work.
    """

    seed: int
    step: int
    probe: int = 0
    kind: Literal["gaussian", "rademacher"] = "gaussian"
    compiled: bool = False

    def __post_init__(self) -> None:
        for key, low, high in (("seed", -(2**63), 2**64), ("step", 0, 2**32), ("probe", 0, 2**32)):
            value = getattr(self, key)
            if not (isinstance(value, int) and low <= value < high):
                raise ValueError(f"{key} must be an integer from {low} to {high - 1}, not {value!r}.")
        if self.kind not in kernels.NOISE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(kernels.NOISE_KINDS)}, not {self.kind!r}.")

    @torch.no_grad()
    def values(
        self,
        name: str,
        start: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Elements [start, start + length) of the parameter's flattened noise, 1-D; in another dtype rounded once.

        Raises ValueError for a negative start or length, and for an end of 2^63 or more.
        """
        if length < 0:
            raise ValueError(f"length must not be negative, not {length}.")
        result = torch.empty(length, device=device, dtype=dtype)
        self._check(result, start)
        kernels.add_noise(result, None, self.source(name), start)
        return result

    def add_(self, target: torch.Tensor, name: str, start: int, scale: float | torch.Tensor) -> torch.Tensor:
        """target += scale * z, for the elements of a parameter from `start` on; returns target.

        target: 1-D, of any floating-point dtype. scale * z is rounded to fp32, then the sum to fp32, then to a 16-bit
        dtype. scale: a number, or a tensor without dimensions. In plain PyTorch on a CPU this takes up to 16 MiB
        besides, compiled 2.

        Raises ValueError for a target that is not 1-D or not floating-point, a negative start, and an end of 2^63 or
        more.
        """
        return self.add(target, name, start, scale, out=target)

    @torch.no_grad()
    def add(
        self, weights: torch.Tensor, name: str, start: int, scale: float | torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """out <- weights + scale * z, of the same dtype and length; as `add_` otherwise."""
        self._check(out, start)
        kernels.add_noise(out, weights, self.source(name), start, scale)
        return out

    def source(self, name: str) -> kernels.NoiseSource:
        """The noise of one parameter, as kernels take it."""
        key = (self.seed ^ name_hash(name)) % 2**64
        return kernels.NoiseSource(self.kind, key, self.step, self.probe, self.compiled)

    def _check(self, target: torch.Tensor, start: int) -> None:
        if target.dim() != 1 or not target.is_floating_point():
            raise ValueError(f"target must be 1-D and floating-point, not {target.dim()}-D of {target.dtype}.")
        if start < 0 or start + len(target) >= 2**63:
            raise ValueError(f"Elements {start} to {start + len(target)} do not lie between 0 and 2^63.")
