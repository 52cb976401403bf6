"""Which elements of a tensor belong to which blocks: integers, built once per layout.

Elements are counted as they lie in memory, whatever shape a tensor has. A table lists the pieces of each tensor of an
optimizer call, by the tensor's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class RowPiece(NamedTuple):
    """`rows` x `count` runs of `width` elements, all of blocks with `size` elements in the whole parameter.

    Run (r, i) begins at element offset + r * row_stride + i * width of the tensor and belongs to its block
    `block` + r * block_stride + i. No other piece of the same interval has elements of these blocks.

    entry: where a state of one entry per element has that of the first element; the others follow as the elements do.
    interval: number of the tensor's interval, among those of its blocks' structure, that the piece lies in.
    """

    offset: int
    count: int
    width: int
    block: int
    size: int
    entry: int
    interval: int
    rows: int = 1
    row_stride: int = 0
    block_stride: int = 0

    def elements(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the piece's elements, [rows, count, width]."""
        return self._view(tensor, self.offset)

    def entries(self, state: torch.Tensor) -> torch.Tensor:
        """A view of their entries in a state of one entry per element, [rows, count, width]."""
        return self._view(state, self.entry)

    def per_element(self, per_block: torch.Tensor) -> torch.Tensor:
        """The value of each element's block, in a shape that broadcasts over `elements`."""
        return self.blocks(per_block).unsqueeze(-1)

    def blocks(self, per_block: torch.Tensor) -> torch.Tensor:
        """A view of the values of the piece's blocks, [rows, count]."""
        offset = per_block.storage_offset() + self.block
        return per_block.as_strided((self.rows, self.count), (self.block_stride, 1), offset)

    def _view(self, tensor: torch.Tensor, first: int) -> torch.Tensor:
        shape, strides = (self.rows, self.count, self.width), (self.row_stride, self.width, 1)
        return tensor.as_strided(shape, strides, tensor.storage_offset() + first)

    def split(self, most: int) -> list[RowPiece]:
        """The piece in parts of about `most` elements, cut between blocks."""
        if self.rows > 1:
            step = max(1, most // (self.count * self.width))
            return [
                self.at(row * self.row_stride, row * self.block_stride)._replace(rows=min(step, self.rows - row))
                for row in range(0, self.rows, step)
            ]
        step = max(1, most // self.width)
        return [
            self.at(run * self.width, run)._replace(count=min(step, self.count - run))
            for run in range(0, self.count, step)
        ]

    def at(self, elements: int, blocks: int) -> RowPiece:
        """The piece so many elements and blocks further on."""
        return self._replace(offset=self.offset + elements, entry=self.entry + elements, block=self.block + blocks)


class ColumnPiece(NamedTuple):
    """`count` rows of `width` elements from element `offset` on; column j of them belongs to block block_of[j].

    runs: the same as (first column, blocks, columns of each, first block, elements of each block in the whole).
    entry, interval: as of a `RowPiece`.
    """

    offset: int
    count: int
    width: int
    block_of: torch.Tensor
    runs: tuple[tuple[int, int, int, int, int], ...]
    entry: int
    interval: int

    def elements(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of the piece's elements, [count, width]."""
        return self._view(tensor, self.offset)

    def entries(self, state: torch.Tensor) -> torch.Tensor:
        """A view of their entries in a state of one entry per element, [count, width]."""
        return self._view(state, self.entry)

    def per_element(self, per_block: torch.Tensor) -> torch.Tensor:
        """The value of each element's block, in a shape that broadcasts over `elements`."""
        return per_block[self.block_of]

    def _view(self, tensor: torch.Tensor, first: int) -> torch.Tensor:
        return tensor.as_strided((self.count, self.width), (self.width, 1), tensor.storage_offset() + first)


Piece = RowPiece | ColumnPiece

Table = Sequence[Sequence[Piece]]
"""The pieces of each tensor of an optimizer call, by the tensor's number."""
