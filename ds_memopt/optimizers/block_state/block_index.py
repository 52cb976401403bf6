"""The blocks of the intervals that one optimizer call updates: where each lies, how large it is, what is cut.

Everything here is index arithmetic on the layout; what is computed with it stands in kernels/.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ds_memopt.blocks import Columns, Contiguous, ParamBlocks, Tiled
from ds_memopt.kernels import ColumnPiece, Piece, RowPiece, Runs, Segments, Table, Work, add_mean_squares, row_of
from ds_memopt.shards import Interval, Layout, Seams, numel_of

CACHED = 2**18
"""Elements of a piece on the CPU, so that it and its temporary tensors stay in the cache."""


@dataclass(frozen=True)
class IntervalBlocks:
    """Blocks [first, first + count) of a parameter: those that an interval of it touches.

    The tensor's per-block values keep them at [local, local + count).
    """

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


class BlockIndex:
    """The blocks of one structure that the tensors of one optimizer call hold on this rank.

    pieces[i]: the table of tensor i for `kernels`. intervals[i]: the blocks of each interval of tensor i, if the
    structure has the parameter. num_blocks[i]: the tensor's blocks on this rank; most_blocks[i]: on the rank that has
    most, for a tensor that stands for one parameter.
    segments: what storage.py builds of it, by the structure of states.
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
        self._counts: dict[int, tuple[torch.Tensor, int]] = {}
        self.segments: dict[str | None, Segments] = {}
        self._packed: Table | None = None
        self._packed_work: Work | None = None
        self._within: Work | None = None
        self.seams = Seams(layout.borders, self._cut)
        self.pieces: list[list[Piece]] = [[] for _ in tensors]
        self.intervals: list[list[IntervalBlocks]] = [[] for _ in tensors]
        self.num_blocks = [0 for _ in tensors]
        seam_blocks: list[list[np.ndarray]] = [[] for _ in tensors]
        seam_slots: list[list[np.ndarray]] = [[] for _ in tensors]
        self._slots: list[dict[int, int]] = [{} for _ in tensors]
        for interval in layout.intervals:
            if interval.name not in blocks:
                continue
            number = interval.tensor
            local, known, device = self.num_blocks[number], self.intervals[number], tensors[number].device
            pieces, first, count = split_interval(interval, blocks[interval.name], device, local, len(known))
            if device.type == "cpu":
                pieces = [part for p in pieces for part in (p.split(CACHED) if isinstance(p, RowPiece) else [p])]
            self.pieces[number] += pieces
            known.append(IntervalBlocks(interval, first, count, local))
            self.num_blocks[number] += count
            cut, slots = self.seams.find(interval.name, first, first + count)
            seam_blocks[number].append(cut - first + local)
            seam_slots[number].append(slots)
            self._slots[number].update(zip(seam_blocks[number][-1].tolist(), slots.tolist(), strict=True))
        borders = {name: cuts for part in layout.borders for name, cuts in part.by_name.items()}
        self.most_blocks = [
            most_blocks(blocks[name], borders.get(name, [])) if name in blocks else count
            for name, count in zip(names, self.num_blocks, strict=True)
        ]
        self._seam_blocks = [_index(part, tensor.device) for part, tensor in zip(seam_blocks, tensors, strict=True)]
        self._seam_slots = [_index(part, tensor.device) for part, tensor in zip(seam_slots, tensors, strict=True)]

    def _cut(self, name: str, borders: np.ndarray) -> np.ndarray:
        return cut_blocks(self._blocks[name], borders) if name in self._blocks else np.empty(0, dtype=np.int64)

    def count_within(self, number: int, inner: BlockIndex) -> tuple[torch.Tensor, int]:
        """How many blocks of `inner` lie in each block of a tensor, int64, and in all of them.

        Every block of `inner` must lie in one block here, and neither index may have Columns.
        """
        if number not in self._counts:
            counts = [self._counts_of(part, inner) for part in self.intervals[number]]
            total = sum(int(of_interval.sum()) for of_interval in counts)
            self._counts[number] = _index(counts, self._tensors[number][0]), total
        return self._counts[number]

    def _counts_of(self, part: IntervalBlocks, inner: BlockIndex) -> np.ndarray:
        interval = part.interval
        if interval.name not in inner._blocks:
            return np.zeros(part.count, dtype=np.int64)
        edges = block_starts(self._blocks[interval.name])[part.first : part.first + part.count + 1]
        edges = edges.clip(interval.start, interval.start + interval.length)
        firsts, lasts = block_span(inner._blocks[interval.name], edges[:-1], edges[1:])
        return lasts - firsts

    def packed_as(self, elements: BlockIndex) -> Table:
        """The pieces of the parameters that `elements` has, for states of one entry per element that lack the others'.

        elements: each of its blocks is one element; its blocks are these states' entries.
        """
        if self._packed is None:
            self._packed = []
            for number, pieces in enumerate(self.pieces):
                packed = {part.interval.name: part for part in elements.intervals[number]}
                self._packed.append([])
                for piece in pieces:
                    interval = self.intervals[number][piece.interval].interval
                    if interval.name in packed:
                        entry = piece.entry + packed[interval.name].local - interval.offset
                        self._packed[-1].append(piece._replace(entry=entry))
        return self._packed

    def new_blocks(self, numbers: Iterable[int], width: int = 1) -> dict[int, torch.Tensor]:
        """For each of these tensors zeros, `width` per block, in the dtype of the step's arithmetic.

        Their shape is [num_blocks], or [num_blocks, width] where width is not 1.
        """
        return {number: self._new_blocks(number, width) for number in numbers}

    def _new_blocks(self, number: int, width: int) -> torch.Tensor:
        device, dtype = self._tensors[number]
        shape = (self.num_blocks[number],) if width == 1 else (self.num_blocks[number], width)
        return torch.zeros(shape, dtype=dtype, device=device)

    def mean_squares(self, values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """This rank's part of the mean square of each block; values, such as gradients, by number of tensor, flat."""
        means = self.new_blocks(values)
        add_mean_squares(values, self.pieces, means)
        return means

    def complete(self, *quantities: dict[int, torch.Tensor], width: int = 1) -> None:
        """Make sums over blocks whole: add to those of cut blocks what the other ranks hold of them, in place.

        quantities: each as `new_blocks` gives it, for all tensors that have a gradient; all travel in one all_reduce.
        A collective where anything is cut: every rank of the group must call it, whatever it holds.
        """
        if self.num_slots == 0:
            return
        slots = self.new_slots(len(quantities) * width).zero_().view(-1, len(quantities), width)
        for column, quantity in enumerate(quantities):
            for number, values in quantity.items():
                cut = values.view(-1, width)[self._seam_blocks[number]]
                slots[:, column].index_copy_(0, self._seam_slots[number], cut)
        self.begin_sum(slots)()
        for column, quantity in enumerate(quantities):
            for number, values in quantity.items():
                whole = slots[self._seam_slots[number], column]
                values.view(-1, width).index_copy_(0, self._seam_blocks[number], whole)

    def complete_maxima(self, maxima: dict[int, torch.Tensor]) -> None:
        """Make the maxima of cut blocks those of all ranks, in place; one that is no number stays so on its rank.

        maxima: as `new_blocks` gives them, not below 0, for all tensors that have a gradient. A collective where
        anything is cut.
        """
        if self.num_slots == 0:
            return
        slots = self.new_slots(1).zero_().view(-1)
        for number, values in maxima.items():
            slots.index_copy_(0, self._seam_slots[number], values[self._seam_blocks[number]])
        self.seams.begin_max(slots)()
        for number, values in maxima.items():
            own, whole = values[self._seam_blocks[number]], slots[self._seam_slots[number]]
            values.index_copy_(0, self._seam_blocks[number], torch.where(own.isnan(), own, whole))

    @functools.cached_property
    def work(self) -> Work | None:
        """The pieces as rows of integers for a fused back end; None if some are of columns."""
        return Work.of(self.pieces, self._slot)

    def packed_work(self, elements: BlockIndex) -> Work | None:
        """`packed_as` as rows of integers; None if some are of columns."""
        if self._packed_work is None:
            self._packed_work = Work.of(self.packed_as(elements), self._slot)
        return self._packed_work

    def work_within(self, matrices: BlockIndex, outer: BlockIndex | None) -> Work:
        """The runs with their places in `matrices`, whole parameters, and the blocks of `outer` that they lie in.

        Every block must lie in one of `outer`; no index may have Columns. matrices: of the same parameters.
        """
        if self._within is None:
            rows: tuple[list, list] = [], []
            for number, pieces in enumerate(self.pieces):
                numels = matrices.numels(number)
                parts = {part.interval.name: part for part in outer.intervals[number]} if outer else {}
                for piece in pieces:
                    of_matrix = {
                        "matrix": matrices._place(number, matrices.intervals[number][piece.interval].local),
                        "numel": numels[piece.interval],
                    }
                    for part, first, stride in self._split_within(number, piece, outer, parts):
                        row = row_of(number, part, self._slot, outer=first, outer_stride=stride, **of_matrix)
                        rows[row["slot"] >= 0].append(row)
            self._within = Work(*map(Runs.of, rows))
        return self._within

    def _split_within(
        self, number: int, piece: Piece, outer: BlockIndex | None, parts: Mapping[str, IntervalBlocks]
    ) -> Iterator[tuple[RowPiece, int, int]]:
        """A piece in parts of which each row lies in one block of `outer`; the block of the first row, and the step."""
        if outer is None:
            yield piece, 0, 0
            return
        interval = self.intervals[number][piece.interval].interval
        part, starts = parts[interval.name], block_starts(outer._blocks[interval.name])
        for row, first, stride in split_at(piece, piece.offset - interval.offset + interval.start, starts):
            yield row, part.local + first - part.first, stride

    def _place(self, number: int, block: int) -> int:
        """Of a tensor's block in `new_places`."""
        slot = self._slots[number].get(block)
        return self.num_slots + sum(self.num_blocks[:number]) + block if slot is None else slot

    def _slot(self, number: int, block: int) -> int:
        return self._slots[number][block]

    def numels(self, number: int) -> list[int]:
        """Elements of the whole parameter that each interval of a tensor is of."""
        return [numel_of(self._blocks[part.interval.name].shape) for part in self.intervals[number]]

    @property
    def num_slots(self) -> int:
        """How many blocks ranks share, on all of them."""
        return self.seams.num_slots

    def new_slots(self, width: int) -> torch.Tensor:
        """Memory for `width` numbers of each block that ranks share: [slots, width]."""
        device, dtype = self._tensors[0]
        return torch.empty(self.num_slots, width, dtype=dtype, device=device)

    def new_places(self) -> torch.Tensor:
        """Memory: a number for each block that ranks share, in the order of slots, and then one for each of all."""
        device, dtype = self._tensors[0]
        return torch.empty(self.num_slots + sum(self.num_blocks), dtype=dtype, device=device)

    def begin_sum(self, slots: torch.Tensor) -> Callable[[], None]:
        """Begin to sum slots over the ranks, in place; returns what waits. A collective where there are any."""
        return self.seams.begin_sum(slots) if self.num_slots else lambda: None

    def begin_max(self, slots: torch.Tensor) -> Callable[[], None]:
        """As `begin_sum`, with the largest of what the ranks have."""
        return self.seams.begin_max(slots) if self.num_slots else lambda: None


def split_at(piece: RowPiece, begin: int, starts: np.ndarray) -> Iterator[tuple[RowPiece, int, int]]:
    """A piece whose first element is element `begin` of its parameter, in parts of which each row lies in one block.

    starts: where the blocks begin, and the end of the last one; each run of the piece lies in one of them.
    Yields each part, the block of its first row and the step from a row's block to the next row's.
    """
    if piece.rows == 1:
        stop = begin + piece.count * piece.width
        low, high = np.searchsorted(starts, begin, "right") - 1, np.searchsorted(starts, stop)
        edges = starts[low : high + 1].clip(begin, stop)
        lengths = np.diff(edges)
        for first, last in _equal(lengths):
            offset, length = int(edges[first]) - begin, int(lengths[first])
            count = length // piece.width
            shape = {"rows": last - first, "row_stride": length, "count": count, "block_stride": count}
            yield piece.at(offset, offset // piece.width)._replace(**shape), int(low) + first, 1
    else:
        blocks = np.searchsorted(starts, begin + np.arange(piece.rows) * piece.row_stride, "right") - 1
        ids, firsts, counts = np.unique(blocks, return_index=True, return_counts=True)
        for low, high in _equal(counts):
            # Blocks of one row each go together.
            step = high - low if counts[low] == 1 else 1
            for first in range(low, high, step):
                row, rows = int(firsts[first]), int(counts[first : first + step].sum())
                part = piece.at(row * piece.row_stride, row * piece.block_stride)._replace(rows=rows)
                yield part, int(ids[first]), int(step > 1)


def _equal(values: np.ndarray) -> list[tuple[int, int]]:
    """The ranges [first, last) of consecutive equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(itertools.pairwise(edges))


def _index(parts: list[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)).to(device)


def split_interval(
    interval: Interval, blocks: ParamBlocks, device: torch.device, local: int, number: int
) -> tuple[list[Piece], int, int]:
    """Cut an interval, of this number among its tensor's, at the borders of its blocks.

    Returns the pieces, the first block of the parameter that they belong to and the number of blocks. Pieces count
    elements from the tensor's first, and blocks from `local` on.
    """
    stop = interval.start + interval.length
    firsts, lasts = block_span(blocks, np.array([interval.start]), np.array([stop]))
    first = int(firsts[0])
    pieces: list[Piece] = []
    start, section_first = 0, 0
    for section in blocks.sections:
        low, high = max(interval.start, start) - start, min(stop, start + section.numel) - start
        if low < high:
            offset, block = interval.offset + start + low - interval.start, local + section_first - first
            if isinstance(section, Contiguous):
                pieces += _row_pieces(section, low, high, offset, block, number)
            elif isinstance(section, Tiled):
                pieces += _tile_pieces(section, low, high, offset, block, number)
            else:
                pieces += _column_pieces(section, low, high, offset, block, number, device)
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


def _row_pieces(section: Contiguous, low: int, high: int, offset: int, block: int, number: int) -> list[Piece]:
    length = section.length
    return [
        _row_piece(offset + begin - low, count, width, block + begin // length, length, number)
        for begin, count, width in _lines(low, high, length)
    ]


def _row_piece(offset: int, count: int, width: int, block: int, size: int, number: int, *rows: int) -> RowPiece:
    return RowPiece(offset, count, width, block, size, offset, number, *rows)


def _tile_pieces(section: Tiled, low: int, high: int, offset: int, block: int, number: int) -> list[Piece]:
    pieces: list[Piece] = []
    columns, length, per_row = section.columns, section.length, section.blocks_per_row
    for line, rows, line_width in _lines(low, high, columns):
        first_column = line % columns
        for begin, count, width in _lines(first_column, first_column + line_width, length):
            size = min(length, columns - begin // length * length)
            start, first = (
                offset + line - low + begin - first_column,
                block + line // columns * per_row + begin // length,
            )
            pieces.append(_row_piece(start, count, width, first, size, number, rows, columns, per_row))
    return pieces


def _column_pieces(
    section: Columns, low: int, high: int, offset: int, block: int, number: int, device: torch.device
) -> list[Piece]:
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
        block_of, start = torch.from_numpy(np.concatenate(blocks)).to(device), offset + begin - low
        pieces.append(ColumnPiece(start, rows, line_width, block_of, tuple(runs), start, number))
    return pieces
