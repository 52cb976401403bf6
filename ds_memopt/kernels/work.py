"""The runs of a call as rows of integers: what a back end walks through in one launch, built once per layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import torch

from ds_memopt.kernels.descriptors import RowPiece, Table

Tensors = Mapping[int, torch.Tensor]
"""1-D tensors by their numbers in the call."""

FIELDS = (
    "tensor", "offset", "rows", "row_stride", "count", "width", "block", "block_stride", "entry", "size", "interval",
    "slot", "outer", "outer_stride", "matrix", "numel",
)  # fmt: skip
"""Those of a `RowPiece`; the number of its tensor; of a cut run its place among the sums over ranks, else -1; and where
runs lie within blocks of other structures, else 0: the runs of row r in block outer + r * outer_stride, all in the one
block of a parameter of `numel` elements, whose place among the sums of all parameters is `matrix`."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of row pieces, `rows` [pieces, len(FIELDS)] int64. Back ends keep what they derive from them in `schedules`,
    by a key of their own."""

    rows: np.ndarray
    schedules: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, int]]) -> Self:
        values = [[row.get(name, 0) for name in FIELDS] for row in rows]
        return cls(np.array(values, dtype=np.int64).reshape(-1, len(FIELDS)))

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        return self.rows[:, FIELDS.index(name)]


@dataclass(frozen=True, eq=False)
class Work:
    """All runs of a table. whole: of blocks that lie on this rank as a whole. cut: a piece is one run, of a block whose
    elements other ranks hold, too."""

    whole: Runs
    cut: Runs

    @classmethod
    def of(cls, table: Table, slot_of: Callable[[int, int], int]) -> Self | None:
        """Of a table; slot_of(number of a tensor, block of it): slot of a cut block. None: it has pieces of columns."""
        rows: tuple[list, list] = [], []
        for number, pieces in enumerate(table):
            for piece in pieces:
                if not isinstance(piece, RowPiece):
                    return None
                cut = piece.width < piece.size
                rows[cut].append(row_of(number, piece, slot_of))
        return cls(*map(Runs.of, rows))

    @functools.cached_property
    def all(self) -> Runs:
        """Both, for one launch."""
        return Runs(np.concatenate([self.whole.rows, self.cut.rows]))


def row_of(number: int, piece: RowPiece, slot_of: Callable[[int, int], int], **within: int) -> dict[str, int]:
    """The fields of a piece of tensor `number`, and where it lies within other structures."""
    cut = piece.width < piece.size
    assert not cut or piece.rows == piece.count == 1, "a cut block is a piece of its own"
    slot = slot_of(number, piece.block) if cut else -1
    return piece._asdict() | {"tensor": number, "slot": slot} | within


class Blocks(Protocol):
    """The blocks that the tensors of one call hold on this rank, and how sums over shared ones are completed."""

    pieces: Table
    work: Work | None

    @property
    def num_slots(self) -> int:
        """How many blocks ranks share, on all of them."""

    def new_blocks(self, numbers: Iterable[int]) -> dict[int, torch.Tensor]:
        """For each of these tensors zeros, one per block."""

    def mean_squares(self, values: Tensors) -> dict[int, torch.Tensor]:
        """This rank's part of the mean square of each block."""

    def complete(self, *quantities: dict[int, torch.Tensor]) -> None:
        """Add to the values of shared blocks what other ranks hold of them."""

    def new_slots(self, width: int) -> torch.Tensor:
        """Memory for `width` numbers of each shared block."""

    def new_places(self) -> torch.Tensor:
        """Memory: a number for each shared block, in the order of slots, and then one for each of the others."""

    def begin_sum(self, slots: torch.Tensor) -> Callable[[], None]:
        """Begin to sum slots over the ranks, in place; returns what waits."""

    def count_within(self, number: int, inner: Blocks) -> tuple[torch.Tensor, int]:
        """How many blocks of `inner` lie in each block of a tensor, int64, and in all of them."""

    def numels(self, number: int) -> list[int]:
        """Elements of the whole parameter that each interval of a tensor is of."""

    def packed_as(self, elements: Blocks) -> Table:
        """The pieces of the parameters that `elements` has, for states that have one entry per element of these."""

    def packed_work(self, elements: Blocks) -> Work | None:
        """`packed_as` as rows of integers."""

    def work_within(self, matrices: Blocks, outer: Blocks | None) -> Work | None:
        """The runs with their places in `matrices`, whole parameters, and the blocks of `outer` that they lie in."""
