"""How a flattened parameter is cut into blocks: the vocabulary that `blocks/` writes and `optimizers/` reads.

Shape letters: R rows, C columns, H heads, E experts. A parameter is flattened row-major.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Contiguous:
    """`count` consecutive blocks of `length` elements each: rows, heads, whole tensors, single elements."""

    length: int
    count: int

    @property
    def numel(self) -> int:
        return self.length * self.count

    @property
    def num_blocks(self) -> int:
        return self.count


@dataclass(frozen=True)
class Columns:
    """A row-major [rows, C] piece whose blocks are runs of adjacent columns over all its rows.

    `runs` lists (width, count): `count` blocks of `width` columns each, left to right; C = sum(width * count).
    For weights stored [in, out], such as GPT-2's Conv1D, where an output neuron is a column.
    """

    rows: int
    runs: tuple[tuple[int, int], ...]

    @property
    def num_columns(self) -> int:
        return sum(width * count for width, count in self.runs)

    @property
    def numel(self) -> int:
        return self.rows * self.num_columns

    @property
    def num_blocks(self) -> int:
        return sum(count for _, count in self.runs)


@dataclass(frozen=True)
class Tiled:
    """`rows` rows of `columns` elements, each cut from its start into blocks of `length`, the last one shorter.

    For groups along the last axis, such as a wavelet's, where `length` does not divide the axis.
    """

    rows: int
    columns: int
    length: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def blocks_per_row(self) -> int:
        return -(-self.columns // self.length)

    @property
    def num_blocks(self) -> int:
        return self.rows * self.blocks_per_row


Section = Contiguous | Columns | Tiled


@dataclass(frozen=True)
class ParamBlocks:
    """The blocks of one parameter: its sections lie one after another in the flattened parameter.

    role: what the parameter is in the model ("embedding", "query", "mlp", "norm", ...), for the log.
    rule: how it is cut, in words ("per head", "per row", "whole", "elementwise", ...), for the log.
    """

    role: str
    rule: str
    shape: tuple[int, ...]
    sections: tuple[Section, ...]

    def __post_init__(self):
        numel = math.prod(self.shape)
        covered = sum(section.numel for section in self.sections)
        assert covered == numel, f"sections cover {covered} of {numel} elements of a {self.role} of shape {self.shape}"

    @property
    def num_blocks(self) -> int:
        return sum(section.num_blocks for section in self.sections)
