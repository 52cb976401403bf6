"""Batches of two halves for Addax: in each step every rank gets some long rows, and then some short ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

from ds_memopt.train.data.order import StepBatches

OTHER_SEED = 2**31  # apart from all epochs of the first half, and within the 32 bits that torch's CPU generator takes


class Halves(NamedTuple):
    """Indices of the rows that each half of a batch is drawn from. length_threshold None: both from all rows."""

    long: Sequence[int]
    short: Sequence[int]
    length_threshold: int | None

    def __str__(self) -> str:
        if self.length_threshold is None:
            return f"both halves of a batch are drawn, apart, from all {len(self.long)} rows"
        return f"{len(self.long)} rows are longer than {self.length_threshold} tokens, {len(self.short)} are not"


def divide(lengths: Sequence[int], length_threshold: int | None) -> Halves:
    """Rows longer than the threshold, and the others; all rows twice if there is none, or if either half has no rows.

    lengths: tokens of each row.
    """
    everything = range(len(lengths))
    if length_threshold is not None:
        long = [row for row in everything if lengths[row] > length_threshold]
        short = [row for row in everything if lengths[row] <= length_threshold]
        if long and short:
            return Halves(long, short, length_threshold)
    return Halves(everything, everything, None)


class LengthBatches(Sampler[list[int]]):
    """Indices of one rank's batch in steps start_step + 1, ..., steps: zo_batch long rows, then fo_batch short ones.

    Each half is drawn as by `StepBatches`: the same rows in a step whatever the number of ranks, every row of it once
    in an epoch of its own length, and no state to save.
    ValueError if a half has less rows than one step needs.
    """

    def __init__(
        self, halves: Halves, zo_batch: int, fo_batch: int, rank: int, world_size: int, seed: int, steps: range
    ) -> None:
        self._halves, self._steps = halves, steps
        for name, batch, rows in (("zo_batch", zo_batch, halves.long), ("fo_batch", fo_batch, halves.short)):
            if len(rows) < batch * world_size:
                raise ValueError(
                    f"{name}={batch} on {world_size} ranks needs {batch * world_size} rows, but {halves}: lower "
                    f"{name}, or choose another length_threshold"
                )
        self._long = StepBatches(halves.long, zo_batch, 1, rank, world_size, seed, steps)
        self._short = StepBatches(halves.short, fo_batch, 1, rank, world_size, seed + OTHER_SEED, steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for long, short in zip(self._long, self._short, strict=True):
            yield [self._halves.long[i] for i in long] + [self._halves.short[i] for i in short]
