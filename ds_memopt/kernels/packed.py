"""Weights and states of a call that are kept in fewer bits.

A fused back end may take them as they are. Else they are unpacked to fp32, and packed after the step, in plain PyTorch.

What is packed where, and how it is rounded, depends on the entries alone, so placement never changes the result.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from ds_memopt.kernels.codes import GROUP, decode, encode, join, split, to_bf16
from ds_memopt.kernels.noise_formulas import NoiseSource, elements
from ds_memopt.kernels.work import Tensors, Work

REMAINDER_PROBE, STATE_PROBE = 0, 1
"""Tell the noise of remainders from that of states. All states of an entry are rounded by the same bits: each is right
on average."""


class Segment(NamedTuple):
    """Entries [first, first + count) of what is kept of one parameter, at [entry, entry + count) of its tensor's.

    row: entries of a row; groups begin anew with each. group: number of the first entry's group in the parameter;
    scale: where its scale lies among the tensor's. key: of the parameter's noise.
    """

    entry: int
    count: int
    first: int
    row: int
    group: int
    scale: int
    key: int

    @property
    def entries(self) -> slice:
        """Where they lie."""
        return slice(self.entry, self.entry + self.count)

    def scales_of(self, device: torch.device) -> torch.Tensor:
        """For each entry the place of its scale."""
        number = torch.arange(self.first, self.first + self.count, device=device)
        line, place = number // self.row, number % self.row
        return line * -(-self.row // GROUP) + place // GROUP - self.group + self.scale


@dataclass(frozen=True, eq=False)
class Segments:
    """Where tensors have what is kept of their parameters, by number of tensor; built once per layout.

    derived: what a back end makes of them, by a key of its own.
    """

    by_tensor: Sequence[Sequence[Segment]]
    derived: dict[Any, Any] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Sequence[Segment]:
        return self.by_tensor[number]


class Maxima(Protocol):
    """Groups of entries, by number of tensor; ranks share some. work: their runs; the cut ones have slots."""

    work: Work

    @property
    def num_slots(self) -> int:
        """How many groups ranks share, on all of them."""

    def new_slots(self, width: int) -> torch.Tensor:
        """Memory for `width` numbers of each shared group."""

    def begin_max(self, slots: torch.Tensor) -> Callable[[], None]:
        """Begin to make slots those of all ranks, in place; returns what waits."""

    def new_blocks(self, numbers: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """For each of these tensors zeros, one per group."""

    def complete_maxima(self, maxima: dict[int, torch.Tensor]) -> None:
        """Make the maxima of shared groups those of all ranks."""


@dataclass(frozen=True, eq=False)
class Packing:
    """How one state of a call's tensors is kept: as codes with scales, or in bf16.

    kept: by number of tensor, in any shape. probe: tells its noise from that of other states. scales, groups: those of
    codes. nearest: bf16 is rounded to nearest, not at random.
    """

    kept: Tensors
    segments: Segments
    probe: int
    scales: Tensors | None = None
    groups: Maxima | None = None
    nearest: bool = False

    def unpack(self) -> dict[int, torch.Tensor]:
        """In fp32, new tensors, 1-D."""
        flat = {number: kept.view(-1) for number, kept in self.kept.items()}
        if self.scales is None:
            return {number: kept.float() for number, kept in flat.items()}
        return {number: self._decoded(number, kept) for number, kept in flat.items()}

    def _decoded(self, number: int, codes: torch.Tensor) -> torch.Tensor:
        values = torch.empty(len(codes), device=codes.device)
        for part in self.segments[number]:
            scales = self.scales[number][part.scales_of(codes.device)]
            values[part.entries] = decode(codes[part.entries], scales)
        return values

    def pack(self, values: Tensors, steps: Mapping[int, int]) -> None:
        """Keep values of the tensors. steps: of each, from 1. A collective where ranks share groups."""
        if self.scales is not None:
            maxima = self.measure(values)
            self.groups.complete_maxima(maxima)
            for number, of_tensor in maxima.items():
                self.scales[number].copy_(of_tensor)
        for number, of_tensor in values.items():
            for part in self.segments[number]:
                nearest = self.nearest and self.scales is None
                bits = None if nearest else rounding_bits(part, steps[number], self.probe, of_tensor.device)
                self._keep(number, part, of_tensor, bits)

    def keep_exactly(self, values: Tensors) -> None:
        """Keep, with the scales that are there, values that `unpack` gave out; others to the nearest."""
        for number, of_tensor in values.items():
            for part in self.segments[number]:
                self._keep(number, part, of_tensor, None)

    def measure(self, values: Tensors) -> dict[int, torch.Tensor]:
        """The largest magnitude of this rank's entries of each group."""
        maxima = self.groups.new_blocks(values)
        for number, of_tensor in values.items():
            for part in self.segments[number]:
                found = of_tensor[part.entries].abs().to(maxima[number].dtype)
                maxima[number].scatter_reduce_(0, part.scales_of(found.device), found, "amax")
        return maxima

    def _keep(self, number: int, part: Segment, values: torch.Tensor, bits: torch.Tensor | None) -> None:
        kept, found = self.kept[number].view(-1), values[part.entries].float()
        if self.scales is not None:
            scales = self.scales[number][part.scales_of(found.device)]
            kept[part.entries] = encode(found, scales, kept.dtype, bits)
        else:
            kept[part.entries] = found if bits is None else to_bf16(found, bits)


@dataclass(frozen=True, eq=False)
class Storage:
    """How the tensors of one step are kept. remainders: of the bf16 weights that have masters, by number of tensor.

    segments: of the weights. states: by key; the others are kept as they are. steps: of each tensor, from 1.
    derived: what a back end makes of it, by a key of its own.
    """

    remainders: Tensors
    segments: Segments
    states: Mapping[str, Packing]
    steps: Mapping[int, int]
    derived: dict[Any, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def unpacked(self, weights: Tensors, states: Mapping[str, Tensors]) -> Iterator[tuple[Tensors, dict[str, Tensors]]]:
        """Weights and states, by key, as a step sees them that knows nothing of this. They are kept again after it."""
        unpacked = {key: packing.unpack() for key, packing in self.states.items()}
        masters = self.masters(weights)
        yield masters, {**states, **unpacked}
        for key, packing in self.states.items():
            packing.pack(unpacked[key], self.steps)
        self.keep_masters(weights, masters)

    @functools.cached_property
    def new_scales(self) -> dict[str, dict[int, torch.Tensor]]:
        """Of states in codes, by key: zeros, for a kernel that finds them. It still needs the old ones."""
        return {key: _zeros_like(packing.scales) for key, packing in self.coded.items()}

    def complete_new_scales(self) -> None:
        """Make those of shared groups those of all ranks, by the collectives of `Packing.pack`."""
        for key, packing in self.coded.items():
            packing.groups.complete_maxima(self.new_scales[key])

    def keep_new_scales(self) -> None:
        for key, packing in self.coded.items():
            found = self.new_scales[key]
            torch._foreach_copy_([packing.scales[number] for number in found], list(found.values()))

    def segments_of(self, *keys: str) -> Segments | None:
        """Where states of one structure lie, with their scales if they have any; None if the place changes nothing."""
        return next((self.states[key].segments for key in keys if key in self.states), None)

    @property
    def coded(self) -> dict[str, Packing]:
        """The states in codes."""
        return {key: packing for key, packing in self.states.items() if packing.scales is not None}

    def masters(self, weights: Tensors) -> dict[int, torch.Tensor]:
        """fp32 copies of the weights that have remainders, 1-D, and the others themselves."""
        exact = {number: join(weights[number].view(-1), rest.view(-1)) for number, rest in self.remainders.items()}
        return {**weights, **exact}

    def keep_masters(self, weights: Tensors, masters: Tensors) -> None:
        """Take back what `masters` gave out."""
        for number, remainder in self.remainders.items():
            for part in self.segments[number]:
                bits = None
                if remainder.dtype == torch.int8:
                    bits = rounding_bits(part, self.steps[number], REMAINDER_PROBE, remainder.device)
                rounded, rest = split(masters[number][part.entries], remainder.dtype, bits)
                weights[number].view(-1)[part.entries], remainder.view(-1)[part.entries] = rounded, rest


def _zeros_like(tensors: Tensors) -> dict[int, torch.Tensor]:
    """In one piece of memory: one allocation in the place of hundreds. tensors: 1-D."""
    lengths = list(map(torch.Tensor.numel, tensors.values()))
    like = next(iter(tensors.values()), torch.empty(0))
    return dict(zip(tensors, like.new_zeros(sum(lengths)).split(lengths), strict=True))


def rounding_bits(part: Segment, step: int, probe: int, device: torch.device) -> torch.Tensor:
    """8 random bits for each entry of a segment, in int32."""
    return elements(NoiseSource("rounding", part.key, step, probe), part.first, part.count, device)
