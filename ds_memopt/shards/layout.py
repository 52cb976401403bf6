"""What every placement has in common: contiguous row-major intervals of parameters, and the borders between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Interval:
    """Elements [start, start + length) of the flattened parameter `name`, as far as this rank holds them.

    They lie at [offset, offset + length) of the flattened local part of optimizer tensor number `tensor`.
    """

    name: str
    start: int
    length: int
    tensor: int
    offset: int


@dataclass(frozen=True)
class RankBorders:
    """Where the ranks of one process group cut the parameters that they share.

    by_name: for each parameter, in the same order on every rank, the sorted element positions strictly inside it
    at which one rank's part ends and the next one's begins. Empty where a parameter is whole on one rank.
    """

    process_group: ProcessGroup | None
    by_name: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """Where the elements of the tensors of one optimizer call come from."""

    intervals: tuple[Interval, ...]
    borders: tuple[RankBorders, ...]


class Placement(Protocol):
    """How one engine spreads parameters over ranks. The optimizers know no more of an engine than this."""

    def names(self, param_group: dict) -> Sequence[str | None]:
        """For each tensor of a param group the parameter that it stands for, or None for a flat buffer of many."""

    def named_tensors(self, param_groups: Sequence[dict]) -> list[tuple[torch.Tensor, str | None]]:
        """All tensors that the optimizer updates on this rank, whether or not they are in param_groups right now."""

    def layout(self, tensors: Sequence[torch.Tensor], names: Sequence[str | None]) -> Layout:
        """The layout of the tensors that one optimizer call updates; `names` as `names` gives them."""

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's elements of an optimizer tensor, its gradient or its state, in the shape that it is kept in."""

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, detached, as a 1-D view where possible."""

    def new_state(self, tensor: torch.Tensor, lengths: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
        """Zeros to be kept beside an optimizer tensor: one per element (None), or (this rank's, any rank's most)."""


def numel_of(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def even_borders(start: int, numel: int, partition: int) -> np.ndarray:
    """Positions inside a parameter that lies at [start, start + numel) of a buffer cut every `partition` elements."""
    first = start // partition + 1
    last = (start + numel - 1) // partition
    return np.arange(first, last + 1, dtype=np.int64) * partition - start


def even_part(numel: int, piece: int, rank: int) -> tuple[int, int]:
    """First element and length of a rank's part of a parameter cut every `piece` elements; the last may be empty."""
    start = min(rank * piece, numel)
    return start, min(piece, numel - start)


def partition_flat_buffer(
    members: Sequence[tuple[str | None, int, int]], partition: int, rank: int
) -> tuple[list[Interval], dict[str, np.ndarray]]:
    """One buffer of many parameters, cut every `partition` elements: ZeRO-1 and ZeRO-2.

    members: (name, offset in the buffer, numel); a parameter without a name is not trained and belongs to no interval.
    Returns what `rank` holds, and the borders inside each parameter.
    """
    intervals, borders, low = [], {}, rank * partition
    for name, offset, numel in members:
        if name is None:
            continue
        borders[name] = even_borders(offset, numel, partition)
        begin, end = max(offset, low), min(offset + numel, low + partition)
        if begin < end:
            intervals.append(Interval(name, begin - offset, end - begin, 0, begin - low))
    return intervals, borders


def partition_each_parameter(
    members: Sequence[tuple[str | None, int, int]], rank: int
) -> tuple[list[Interval], dict[str, np.ndarray]]:
    """Every parameter cut into equal pieces, a rank's pieces one after another in a buffer: ZeRO-3.

    members: (name, numel, elements of a rank's piece); a parameter without a name is not trained and belongs to no
    interval. Returns what `rank` holds, and the borders of each parameter.
    """
    intervals, borders, offset = [], {}, 0
    for name, numel, piece in members:
        # The last ranks' pieces may be partly or wholly padding, which belongs to no parameter.
        start, length = even_part(numel, piece, rank)
        if name is not None:
            borders[name] = even_borders(0, numel, piece)
            if length > 0:
                intervals.append(Interval(name, start, length, 0, offset))
        offset += piece
    return intervals, borders


class FlatPlacement:
    """Placement by flat buffers that an engine cut out of many parameters (ZeRO-1/2/3). Subclasses fill `flats`."""

    def __init__(self) -> None:
        self.flats: list[tuple[torch.Tensor, list[Interval], RankBorders]] = []

    def layout(self, tensors: Sequence[torch.Tensor], names: Sequence[str | None]) -> Layout:
        intervals, borders = [], []
        for number, tensor in enumerate(tensors):
            found = [flat for flat in self.flats if flat[0] is tensor]
            if not found:
                raise ValueError(
                    f"The optimizer was handed a tensor of {tensor.numel()} elements that is no flat partition of the "
                    "engine it was initialized with. Build one optimizer per deepspeed.initialize call and leave its "
                    "param_groups to DeepSpeed."
                )
            _, members, rank_borders = found[0]
            intervals += [Interval(m.name, m.start, m.length, number, m.offset) for m in members]
            borders.append(rank_borders)
        return Layout(tuple(intervals), tuple(borders))

    def names(self, param_group: dict) -> Sequence[str | None]:
        return [None for _ in param_group["params"]]

    def named_tensors(self, param_groups: Sequence[dict]) -> list[tuple[torch.Tensor, str | None]]:
        # Not from param_groups: ZeRO-3 empties them between its sub-groups' steps.
        return [(flat, None) for flat, _, _ in self.flats]

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1)

    def new_state(self, tensor: torch.Tensor, lengths: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
        # Per-element state has the partition's own shape: only such states are linked, offloaded and
        # handed out (safe_get_full_optimizer_state) by DeepSpeed.
        shape = tensor.shape if lengths is None else (lengths[0],)
        return torch.zeros(shape, dtype=dtype, device=tensor.device)
