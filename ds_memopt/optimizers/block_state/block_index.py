"""The blocks of the intervals that one optimizer call updates: where each lies, how large it is, what is cut.

Everything here is index arithmetic on the layout; the only tensors are views that the caller hands in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ds_memopt.blocks import Columns, Contiguous, ParamBlocks, Tiled
from ds_memopt.shards import Interval, Layout, Seams

SHORT = 32
"""Runs of up to so many elements, a power of two, are added up by halves: 0.16 instead of 0.4 ns per element."""

CACHED = 2**18
"""Elements of a piece on the CPU, so that it and its temporary tensors stay in the cache."""


@dataclass(frozen=True)
class RowPiece:
    """`rows` x `count` runs of `width` elements of an interval, all of blocks with `size` elements in the whole.

    Run (r, i) begins at offset + r * row_stride + i * width and belongs to block `block` + r * block_stride + i.
    """

    offset: int
    count: int
    width: int
    block: int
    size: int
    rows: int = 1
    row_stride: int = 0
    block_stride: int = 0

    def view(self, interval: torch.Tensor) -> torch.Tensor:
        """The piece's elements of an interval, [rows, count, width]."""
        shape, strides = (self.rows, self.count, self.width), (self.row_stride, self.width, 1)
        return interval.as_strided(shape, strides, interval.storage_offset() + self.offset)

    def per_element(self, per_block: torch.Tensor) -> torch.Tensor:
        """The value of each element's block, in a shape that broadcasts over `view`."""
        return self._blocks(per_block).unsqueeze(-1)

    def add_means(self, interval: torch.Tensor, means: torch.Tensor, size: int) -> None:
        """Add to each block the sum of its elements here, divided by `size`."""
        self._blocks(means).add_(_sum_of_runs(self.view(interval).to(means.dtype)), alpha=1 / size)

    def add_mean_squares(self, interval: torch.Tensor, means: torch.Tensor) -> None:
        """Add what this piece contributes to the mean square of each block."""
        if self.width <= SHORT:
            squares = self.view(interval).to(means.dtype).square()
            self._blocks(means).add_(_sum_of_runs(squares), alpha=1 / self.size)
        else:
            norms = torch.linalg.vector_norm(self.view(interval), dim=-1, dtype=means.dtype)
            self._blocks(means).addcmul_(norms, norms, value=1 / self.size)

    def sum_over_elements(self, per_block: torch.Tensor) -> torch.Tensor:
        """The sum over the piece's elements of their blocks' values."""
        return self._blocks(per_block).sum() * self.width

    def _blocks(self, per_block: torch.Tensor) -> torch.Tensor:
        offset = per_block.storage_offset() + self.block
        return per_block.as_strided((self.rows, self.count), (self.block_stride, 1), offset)

    def split(self, most: int) -> list[RowPiece]:
        """The piece in parts of about `most` elements, cut between blocks."""
        if self.rows > 1:
            step = max(1, most // (self.count * self.width))
            return [
                replace(
                    self, rows=min(step, self.rows - row), offset=self.offset + row * self.row_stride,
                    block=self.block + row * self.block_stride,
                )
                for row in range(0, self.rows, step)
            ]  # fmt: skip
        step = max(1, most // self.width)
        return [
            replace(
                self, count=min(step, self.count - run), offset=self.offset + run * self.width, block=self.block + run
            )
            for run in range(0, self.count, step)
        ]


def _sum_of_runs(values: torch.Tensor) -> torch.Tensor:
    """[rows, count, width] -> [rows, count]. Overwrites nothing of `values`."""
    width = values.shape[-1]
    if width > SHORT or width & (width - 1):
        return values.sum(-1)
    while values.shape[-1] > 1:
        values = values[..., ::2] + values[..., 1::2]
    return values.squeeze(-1)


@dataclass(frozen=True)
class ColumnPiece:
    """`count` rows of `width` elements at `offset` of an interval; column j of them belongs to block blocks[j].

    runs: the same as (first column, blocks, columns of each, first block, elements of each block in the whole).
    """

    offset: int
    count: int
    width: int
    blocks: torch.Tensor
    runs: tuple[tuple[int, int, int, int, int], ...]

    def view(self, interval: torch.Tensor) -> torch.Tensor:
        """The piece's elements of an interval, [count, width]."""
        return interval.narrow(0, self.offset, self.count * self.width).view(self.count, self.width)

    def per_element(self, per_block: torch.Tensor) -> torch.Tensor:
        """The value of each element's block, in a shape that broadcasts over `view`."""
        return per_block[self.blocks]

    def add_mean_squares(self, interval: torch.Tensor, means: torch.Tensor) -> None:
        """Add what this piece contributes to the mean square of each block."""
        squares = torch.linalg.vector_norm(self.view(interval), dim=0, dtype=means.dtype).square_()
        # Not index_add_, whose order of sums, and so the result, changes from run to run on a GPU.
        for column, count, width, block, size in self.runs:
            sums = squares.narrow(0, column, count * width).view(count, width).sum(-1)
            means.narrow(0, block, count).add_(sums, alpha=1 / size)


Piece = RowPiece | ColumnPiece


@dataclass(frozen=True)
class HeldBlocks:
    """The blocks of one interval: [first, first + count) of the parameter, cut into `pieces`.

    The tensor's per-block state keeps them at [local, local + count); pieces count their blocks from there.
    """

    interval: Interval
    first: int
    count: int
    local: int
    pieces: list[Piece]

    def elements(self, flat: torch.Tensor) -> torch.Tensor:
        """The interval of a tensor laid like the parameter."""
        return flat.narrow(0, self.interval.offset, self.interval.length)

    def blocks(self, per_block: torch.Tensor) -> torch.Tensor:
        """The interval's part of a tensor's per-block values."""
        return per_block.narrow(0, self.local, self.count)


def cut_blocks(blocks: ParamBlocks, borders: np.ndarray) -> np.ndarray:
    """Sorted ids of the blocks that lie on both sides of one of the sorted `borders` (element positions)."""
    cut, start, first = [], 0, 0
    for section in blocks.sections:
        inside = borders[(borders > start) & (borders < start + section.numel)] - start
        if len(inside) and isinstance(section, Columns):
            cut.append(np.arange(first, first + section.num_blocks))
        elif len(inside):
            cut.append(first + np.unique(_block_of(section, inside)[~_begins_block(section, inside)]))
        start += section.numel
        first += section.num_blocks
    return np.concatenate(cut).astype(np.int64) if cut else np.empty(0, dtype=np.int64)


def block_span(blocks: ParamBlocks, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks [first, last) that elements [start, stop) touch, for arrays of non-empty intervals."""
    firsts, lasts = np.zeros_like(starts), np.zeros_like(stops)
    start, first = 0, 0
    for section in blocks.sections:
        if isinstance(section, Columns):
            low, high = first, first + section.num_blocks
        else:
            low = first + _block_of(section, starts - start)
            high = first + _block_of(section, stops - 1 - start) + 1
        firsts = np.where(starts >= start, low, firsts)
        lasts = np.where(stops > start, high, lasts)
        start += section.numel
        first += section.num_blocks
    return firsts, lasts


def most_blocks(blocks: ParamBlocks, borders: Sequence[int]) -> int:
    """The number of blocks on the rank that touches most of them, where `borders` cut the parameter."""
    numel = sum(section.numel for section in blocks.sections)
    if numel == 0:
        return 0
    edges = np.array([0, *borders, numel])
    firsts, lasts = block_span(blocks, edges[:-1], edges[1:])
    return int((lasts - firsts).max())


def block_starts(blocks: ParamBlocks) -> np.ndarray:
    """First element of each block of a parameter without Columns, and the parameter's end: [num_blocks + 1]."""
    starts, start = [], 0
    for section in blocks.sections:
        ids = np.arange(section.num_blocks)
        if isinstance(section, Tiled):
            row, tile = np.divmod(ids, section.blocks_per_row)
            starts.append(start + row * section.columns + tile * section.length)
        else:
            starts.append(start + ids * section.length)
        start += section.numel
    return np.append(np.concatenate(starts), start)


def _block_of(section: Contiguous | Tiled, positions: np.ndarray) -> np.ndarray:
    if isinstance(section, Contiguous):
        return positions // section.length
    row, column = np.divmod(positions, section.columns)
    return row * section.blocks_per_row + column // section.length


def _begins_block(section: Contiguous | Tiled, positions: np.ndarray) -> np.ndarray:
    column = positions % section.columns if isinstance(section, Tiled) else positions
    return column % section.length == 0


def step_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a step on parameters of this dtype is computed in: fp32, or fp64 where they are fp64."""
    return torch.promote_types(dtype, torch.float32)


class BlockPlan:
    """The blocks of one structure that the tensors of one optimizer call hold on this rank.

    held[i]: those of each interval of tensor i, if the structure has the parameter. num_blocks[i]: length of the
    tensor's per-block state on this rank; most_blocks[i]: on the rank where it is longest, for a tensor that stands for
    one parameter.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: Mapping[str, ParamBlocks],
        names: Sequence[str | None],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        self._blocks = blocks
        self._tensors = [(tensor.device, step_dtype(tensor.dtype)) for tensor in tensors]
        self._counts: dict[str, tuple[torch.Tensor, int]] = {}
        self.seams = Seams(layout.borders, self._cut)
        self.held: list[list[HeldBlocks]] = [[] for _ in tensors]
        self.num_blocks = [0 for _ in tensors]
        seam_blocks: list[list[np.ndarray]] = [[] for _ in tensors]
        seam_slots: list[list[np.ndarray]] = [[] for _ in tensors]
        for interval in layout.intervals:
            if interval.name not in blocks:
                continue
            number = interval.tensor
            local = self.num_blocks[number]
            pieces, first, count = split_interval(interval, blocks[interval.name], tensors[number].device)
            if tensors[number].device.type == "cpu":
                pieces = [part for p in pieces for part in (p.split(CACHED) if isinstance(p, RowPiece) else [p])]
            self.held[number].append(HeldBlocks(interval, first, count, local, pieces))
            self.num_blocks[number] += count
            cut, slots = self.seams.find(interval.name, first, first + count)
            seam_blocks[number].append(cut - first + local)
            seam_slots[number].append(slots)
        borders = {name: cuts for part in layout.borders for name, cuts in part.by_name.items()}
        self.most_blocks = [
            most_blocks(blocks[name], borders.get(name, [])) if name in blocks else count
            for name, count in zip(names, self.num_blocks, strict=True)
        ]
        self._seam_blocks = [_index(part, tensor.device) for part, tensor in zip(seam_blocks, tensors, strict=True)]
        self._seam_slots = [_index(part, tensor.device) for part, tensor in zip(seam_slots, tensors, strict=True)]

    def _cut(self, name: str, borders: np.ndarray) -> np.ndarray:
        return cut_blocks(self._blocks[name], borders) if name in self._blocks else np.empty(0, dtype=np.int64)

    def count_within(self, held: HeldBlocks, inner: BlockPlan) -> tuple[torch.Tensor, int]:
        """How many blocks of `inner` lie in each block of an interval of this plan, int64, and in all of them.

        Every block of `inner` must lie in one block here, and neither plan may have Columns.
        """
        interval = held.interval
        if interval.name not in self._counts:
            edges = block_starts(self._blocks[interval.name])[held.first : held.first + held.count + 1]
            edges = edges.clip(interval.start, interval.start + interval.length)
            firsts, lasts = block_span(inner._blocks[interval.name], edges[:-1], edges[1:])
            counts = lasts - firsts
            self._counts[interval.name] = _index([counts], self._tensors[interval.tensor][0]), int(counts.sum())
        return self._counts[interval.name]

    def new_blocks(self, numbers: Iterable[int]) -> dict[int, torch.Tensor]:
        """For each of these tensors zeros, one per block, in the dtype of the step's arithmetic."""
        return {
            number: torch.zeros(
                self.num_blocks[number], dtype=self._tensors[number][1], device=self._tensors[number][0]
            )
            for number in numbers
        }

    def mean_squares(self, gradients: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """This rank's part of the mean square of each block; gradients by number of tensor, flat."""
        means = self.new_blocks(gradients)
        for number, gradient in gradients.items():
            for held in self.held[number]:
                for piece in held.pieces:
                    piece.add_mean_squares(held.elements(gradient), held.blocks(means[number]))
        return means

    def complete(self, *quantities: dict[int, torch.Tensor]) -> None:
        """Make sums over blocks whole: add to those of cut blocks what the other ranks hold of them, in place.

        quantities: each as `new_blocks` gives it, for all tensors that have a gradient; all travel in one all_reduce.
        A collective where anything is cut: every rank of the group must call it, whatever it holds.
        """
        if self.seams.num_slots == 0:
            return
        device, dtype = self._tensors[0]
        slots = torch.zeros(self.seams.num_slots, len(quantities), dtype=dtype, device=device)
        for column, quantity in enumerate(quantities):
            for number, values in quantity.items():
                slots[:, column].index_copy_(0, self._seam_slots[number], values[self._seam_blocks[number]])
        self.seams.sum(slots)
        for column, quantity in enumerate(quantities):
            for number, values in quantity.items():
                values.index_copy_(0, self._seam_blocks[number], slots[self._seam_slots[number], column])


def _index(parts: list[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)).to(device)


def split_interval(interval: Interval, blocks: ParamBlocks, device: torch.device) -> tuple[list[Piece], int, int]:
    """Cut an interval at the borders of its blocks.

    Returns the pieces, the first block that they belong to and the number of blocks; offsets count from the interval's
    first element, a piece's blocks from that first block.
    """
    stop = interval.start + interval.length
    firsts, lasts = block_span(blocks, np.array([interval.start]), np.array([stop]))
    first = int(firsts[0])
    pieces: list[Piece] = []
    start, section_first = 0, 0
    for section in blocks.sections:
        low, high = max(interval.start, start) - start, min(stop, start + section.numel) - start
        if low < high:
            offset, block = start + low - interval.start, section_first - first
            if isinstance(section, Contiguous):
                pieces += _row_pieces(section, low, high, offset, block)
            elif isinstance(section, Tiled):
                pieces += _tile_pieces(section, low, high, offset, block)
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
        RowPiece(offset + begin - low, count, width, block + begin // section.length, section.length)
        for begin, count, width in _lines(low, high, section.length)
    ]


def _tile_pieces(section: Tiled, low: int, high: int, offset: int, block: int) -> list[Piece]:
    pieces: list[Piece] = []
    columns, length, per_row = section.columns, section.length, section.blocks_per_row
    for line, rows, line_width in _lines(low, high, columns):
        first_column = line % columns
        for begin, count, width in _lines(first_column, first_column + line_width, length):
            size = min(length, columns - begin // length * length)
            pieces.append(
                RowPiece(
                    offset + line - low + begin - first_column, count, width,
                    block + line // columns * per_row + begin // length, size,
                    rows, columns, per_row,
                )
            )  # fmt: skip
    return pieces


def _column_pieces(section: Columns, low: int, high: int, offset: int, block: int, device: torch.device) -> list[Piece]:
    pieces: list[Piece] = []
    columns = section.num_columns
    for begin, rows, line_width in _lines(low, high, columns):
        first, stop = begin % columns, begin % columns + line_width
        runs, blocks, column, run_block = [], [], 0, block
        for width, count in section.runs:
            left, right = max(first, column) - column, min(stop, column + width * count) - column
            for start, parts, part in _lines(left, right, width) if left < right else ():
                runs.append((column + start - first, parts, part, run_block + start // width, width * section.rows))
                blocks.append(np.repeat(np.arange(parts) + run_block + start // width, part))
            column += width * count
            run_block += count
        of_column = torch.from_numpy(np.concatenate(blocks)).to(device)
        pieces.append(ColumnPiece(offset + begin - low, rows, line_width, of_column, tuple(runs)))
    return pieces
