"""What rounding to bf16 dropped of the masters of inactive blocks, kept for their next visit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch

from ds_memopt.kernels.residual import add_residual_, residual_of
from ds_memopt.optimizers.base.named_state import StatePart

RESIDUAL = "residual"
"""Their key in the state by name."""

Masters = Iterable[tuple[str, int, torch.Tensor]]
"""This rank's interval of each active parameter: name, first element, fp32 master."""


class KeptResiduals:
    """By name the parts that this rank keeps: those that it held at the last visit, or all that were loaded, which
    other ranks may have held."""

    def __init__(self) -> None:
        self._parts: dict[str, list[StatePart]] = {}

    def keep(self, masters: Masters, names: Collection[str]) -> None:
        """At the end of a visit, of these parameters."""
        for name, start, master in masters:
            if name in names:
                self._parts[name] = [StatePart(name, RESIDUAL, start, residual_of(master))]

    def put_back(self, masters: Masters, names: Collection[str]) -> None:
        """At the begin of a visit of the block of these parameters, whose masters were made from bf16 weights."""
        for name, start, master in masters:
            if name in self._parts:
                own = StatePart(name, RESIDUAL, start, torch.zeros_like(master, dtype=torch.int16))
                for part in self._parts[name]:
                    part.copy_to(own)
                add_residual_(master, own.values)
        for name in names:
            self._parts.pop(name, None)

    def parts(self) -> Iterator[StatePart]:
        for parts in self._parts.values():
            yield from parts

    def load(self, parts: Iterable[StatePart]) -> None:
        """In the place of all that is kept."""
        self._parts = {}
        for part in parts:
            self._parts.setdefault(part.name, []).append(part)
