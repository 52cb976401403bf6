"""The runs of a call as rows of integers: what a back end walks through in one launch, built once per layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from ds_memopt.kernels.descriptors import RowPiece, Table

FIELDS = (
    "tensor", "offset", "rows", "row_stride", "count", "width", "block", "block_stride", "entry", "size", "interval",
    "slot",
)  # fmt: skip
"""Those of a `RowPiece`; the number of its tensor; and of a cut run its place among the sums over ranks, else -1."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of row pieces, `rows` [pieces, len(FIELDS)] int64. Back ends keep what they derive from them in `schedules`,
    by a key of their own."""

    rows: np.ndarray
    schedules: dict[Any, Any] = field(default_factory=dict)


class Work(NamedTuple):
    """All runs of a table. whole: of blocks that lie on this rank as a whole. cut: a piece is one run, of a block whose
    elements other ranks hold, too."""

    whole: Runs
    cut: Runs

    @classmethod
    def of(cls, table: Table, slot_of: Callable[[int, int], int]) -> Self | None:
        """Of a table; slot_of(number of a tensor, block of it): slot of a cut block. None: it has pieces of columns."""
        rows: tuple[list[list[int]], list[list[int]]] = [], []
        for number, pieces in enumerate(table):
            for piece in pieces:
                if not isinstance(piece, RowPiece):
                    return None
                cut = piece.width < piece.size
                assert not cut or piece.rows == piece.count == 1, "a cut block is a piece of its own"
                rows[cut].append(_row(number, piece, slot_of(number, piece.block) if cut else -1))
        return cls(*(Runs(np.array(part, dtype=np.int64).reshape(-1, len(FIELDS))) for part in rows))


def _row(number: int, piece: RowPiece, slot: int) -> list[int]:
    values = piece._asdict() | {"tensor": number, "slot": slot}
    return [values[field] for field in FIELDS]
