"""The blocks of the intervals that one optimizer call updates: where each lies, how large it is, what is cut.

Everything here is index arithmetic on the layout; the only tensors are views that the caller hands in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ds_memopt.blocks import Columns, Contiguous, ParamBlocks
from ds_memopt.shards import Interval, Layout, Seams


@dataclass(frozen=True)
class RowPiece:
    """`count` equal runs of `width` elements at `offset` of a flat tensor; run i belongs to block `block` + i."""

    offset: int
    count: int
    width: int
    block: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.narrow(0, self.offset, self.count * self.width).view(self.count, self.width)

    def add_square_sums(self, flat: torch.Tensor, sums: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(self.view(flat), dim=1, dtype=sums.dtype)
        sums.narrow(0, self.block, self.count).addcmul_(norms, norms)

    def per_element(self, per_block: torch.Tensor) -> torch.Tensor:
        """The value of each element's block, in a shape that broadcasts over `view`."""
        return per_block.narrow(0, self.block, self.count).unsqueeze(1)


@dataclass(frozen=True)
class ColumnPiece:
    """`count` rows of `width` elements at `offset` of a flat tensor; column j of them belongs to block blocks[j]."""

    offset: int
    count: int
    width: int
    blocks: torch.Tensor

    view = RowPiece.view

    def add_square_sums(self, flat: torch.Tensor, sums: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(self.view(flat), dim=0, dtype=sums.dtype)
        sums.index_add_(0, self.blocks, norms.square_())

    def per_element(self, per_block: torch.Tensor) -> torch.Tensor:
        return per_block[self.blocks]


Piece = RowPiece | ColumnPiece


@dataclass(frozen=True)
class BlockRange:
    """Blocks [first, first + count) of a parameter, kept at [local, local + count) of a tensor's per-block state."""

    interval: Interval
    first: int
    count: int
    local: int


def cut_blocks(blocks: ParamBlocks, borders: np.ndarray) -> np.ndarray:
    """Sorted ids of the blocks that lie on both sides of one of the sorted `borders` (element positions)."""
    cut, start, first = [], 0, 0
    for section in blocks.sections:
        inside = borders[(borders > start) & (borders < start + section.numel)] - start
        if len(inside) and isinstance(section, Columns):
            cut.append(np.arange(first, first + section.num_blocks))
        elif len(inside):
            cut.append(first + np.unique(inside[inside % section.length != 0] // section.length))
        start += section.numel
        first += section.num_blocks
    return np.concatenate(cut).astype(np.int64) if cut else np.empty(0, dtype=np.int64)


def block_span(blocks: ParamBlocks, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks [first, last) that elements [start, stop) touch, for arrays of non-empty intervals."""
    firsts, lasts = np.zeros_like(starts), np.zeros_like(stops)
    start, first = 0, 0
    for section in blocks.sections:
        if isinstance(section, Contiguous):
            low, high = first + (starts - start) // section.length, first + (stops - 1 - start) // section.length + 1
        else:
            low, high = first, first + section.num_blocks
        firsts = np.where(starts >= start, low, firsts)
        lasts = np.where(stops > start, high, lasts)
        start += section.numel
        first += section.num_blocks
    return firsts, lasts


def most_blocks(blocks: ParamBlocks, borders: Sequence[int]) -> int:
    """The number of blocks on the rank that touches most of them, where `borders` cut the parameter."""
    numel = sum(section.numel for section in blocks.sections)
    edges = np.array([0, *borders, numel])
    if numel == 0:
        return 0
    firsts, lasts = block_span(blocks, edges[:-1], edges[1:])
    return int((lasts - firsts).max())


def block_sizes(blocks: ParamBlocks) -> np.ndarray:
    """Number of elements of each block of a whole parameter, [num_blocks]."""
    sizes = []
    for section in blocks.sections:
        if isinstance(section, Contiguous):
            sizes.append(np.full(section.count, section.length))
        else:
            sizes += [np.full(count, width * section.rows) for width, count in section.runs]
    return np.concatenate(sizes)


def column_blocks(section: Columns) -> np.ndarray:
    """The block, counted from the section's first, of each column: [C]."""
    widths = np.concatenate([np.full(count, width) for width, count in section.runs])
    return np.repeat(np.arange(len(widths)), widths)


def step_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a step on parameters of this dtype is computed in: fp32, or fp64 where they are fp64."""
    return torch.promote_types(dtype, torch.float32)


class BlockPlan:
    """The blocks that the tensors of one optimizer call hold on this rank.

    pieces[i], ranges[i]: how tensor i decomposes. num_blocks[i]: length of its per-block state on this rank;
    most_blocks[i]: on the rank where it is longest, for a tensor that stands for one parameter.
    sizes[i]: true size of each of its blocks, whatever share of it lies here, in the dtype of the step's arithmetic.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: Mapping[str, ParamBlocks],
        names: Sequence[str | None],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        devices = [tensor.device for tensor in tensors]
        self.seams = Seams(layout.borders, lambda name, borders: cut_blocks(blocks[name], borders))
        self.pieces: list[list[Piece]] = [[] for _ in devices]
        self.ranges: list[list[BlockRange]] = [[] for _ in devices]
        self.num_blocks = [0 for _ in devices]
        sizes: list[list[np.ndarray]] = [[] for _ in devices]
        seam_blocks: list[list[np.ndarray]] = [[] for _ in devices]
        seam_slots: list[list[np.ndarray]] = [[] for _ in devices]
        for interval in layout.intervals:
            number = interval.tensor
            local = self.num_blocks[number]
            pieces, first, count = split_interval(interval, blocks[interval.name], local, devices[number])
            self.pieces[number] += pieces
            self.ranges[number].append(BlockRange(interval, first, count, local))
            self.num_blocks[number] += count
            sizes[number].append(block_sizes(blocks[interval.name])[first : first + count])
            cut, slots = self.seams.find(interval.name, first, first + count)
            seam_blocks[number].append(cut - first + local)
            seam_slots[number].append(slots)
        borders = {name: cuts for part in layout.borders for name, cuts in part.by_name.items()}
        self.most_blocks = [
            count if name is None else most_blocks(blocks[name], borders.get(name, []))
            for name, count in zip(names, self.num_blocks, strict=True)
        ]
        self.sizes = [_tensor(p, step_dtype(t.dtype), t.device) for p, t in zip(sizes, tensors, strict=True)]
        self._seam_blocks = [_tensor(p, torch.int64, d) for p, d in zip(seam_blocks, devices, strict=True)]
        self._seam_slots = [_tensor(p, torch.int64, d) for p, d in zip(seam_slots, devices, strict=True)]

    def complete(self, sums: list[torch.Tensor]) -> None:
        """Make the sums of the cut blocks whole: add to each what the other ranks hold of it, in place.

        A collective where anything is cut: every rank of the group must call it, whatever it holds.
        """
        if self.seams.num_slots == 0:
            return
        slots = torch.zeros(self.seams.num_slots, dtype=sums[0].dtype, device=sums[0].device)
        for values, block, slot in zip(sums, self._seam_blocks, self._seam_slots, strict=True):
            slots.index_copy_(0, slot, values[block])
        self.seams.sum(slots)
        for values, block, slot in zip(sums, self._seam_blocks, self._seam_slots, strict=True):
            values.index_copy_(0, block, slots[slot])


def _tensor(parts: list[np.ndarray], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    joined = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(joined).to(device=device, dtype=dtype)


def split_interval(
    interval: Interval, blocks: ParamBlocks, local: int, device: torch.device
) -> tuple[list[Piece], int, int]:
    """Cut an interval at the borders of its blocks.

    Returns the pieces, the first block that they belong to and the number of blocks; a piece's blocks count from
    `local`, the place of that first block in the tensor's per-block state.
    """
    stop = interval.start + interval.length
    firsts, lasts = block_span(blocks, np.array([interval.start]), np.array([stop]))
    first = int(firsts[0])
    pieces: list[Piece] = []
    start, section_first = 0, 0
    for section in blocks.sections:
        low, high = max(interval.start, start) - start, min(stop, start + section.numel) - start
        if low < high:
            offset = interval.offset + start + low - interval.start
            block = local + section_first - first
            if isinstance(section, Contiguous):
                pieces += _row_pieces(section, low, high, offset, block)
            else:
                pieces += _column_pieces(section, low, high, offset, block, device)
        start += section.numel
        section_first += section.num_blocks
    return pieces, first, int(lasts[0]) - first


def _lines(low: int, high: int, length: int) -> list[tuple[int, int, int]]:
    """[low, high) cut at multiples of length, as (begin, count, width): a partial line, whole lines, a partial line."""
    if low // length == (high - 1) // length:
        return [(low, 1, high - low)]
    lines = []
    if low % length:
        lines.append((low, 1, length - low % length))
        low += length - low % length
    if whole := (high - low) // length:
        lines.append((low, whole, length))
        low += whole * length
    if low < high:
        lines.append((low, 1, high - low))
    return lines


def _row_pieces(section: Contiguous, low: int, high: int, offset: int, block: int) -> list[Piece]:
    return [
        RowPiece(offset + begin - low, count, width, block + begin // section.length)
        for begin, count, width in _lines(low, high, section.length)
    ]


def _column_pieces(section: Columns, low: int, high: int, offset: int, block: int, device: torch.device) -> list[Piece]:
    of_column = torch.from_numpy(column_blocks(section) + block).to(device)
    columns = section.num_columns
    return [
        ColumnPiece(offset + begin - low, count, width, of_column.narrow(0, begin % columns, width))
        for begin, count, width in _lines(low, high, columns)
    ]
