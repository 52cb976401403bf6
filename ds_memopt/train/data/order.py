"""The order of training data: a function of seed and step, the same on any number of ranks, with no state to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Sampler

WINDOW = 1000
"""Consecutive sequences among which the sources of a mixture have just their shares."""


class Epochs:
    """The n-th of `size` items that come once in each epoch, in the order of the permutation `draw(epoch)`."""

    def __init__(self, size: int, draw: Callable[[int], np.ndarray]) -> None:
        self._size, self._draw = size, draw
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the items at these positions, both int64 [positions]."""
        epochs, places = np.divmod(positions, self._size)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch, self._permutation = epoch, self._draw(int(epoch))
            here = epochs == epoch
            indices[here] = self._permutation[places[here]]
        return indices


class Mixture:
    """The order of several sources that lie end to end, each with its share of every WINDOW positions.

    Which source a position has is drawn anew in each window; a source is gone through in epochs of its own. sizes:
    items of each source. weights: their shares, of any sum. ValueError for a share that is no item of a window.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._seed, self._quotas = seed, shares(weights, WINDOW)
        if 0 in self._quotas:
            raise ValueError(
                f"a weight of {min(weights)} of {sum(weights):g} is less than 1 of {WINDOW} sequences: raise it"
            )
        self._starts = [0, *accumulate(sizes)][:-1]
        self._epochs = [
            Epochs(size, lambda epoch, source=source, size=size: _rng(seed, 1, source, epoch).permutation(size))
            for source, size in enumerate(sizes)
        ]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the items at these positions, both int64 [positions]."""
        windows, places = np.divmod(positions, WINDOW)
        indices = np.empty_like(positions)
        for window in np.unique(windows):
            sources = _rng(self._seed, 0, window).permutation(np.repeat(np.arange(len(self._quotas)), self._quotas))
            for source, (quota, start) in enumerate(zip(self._quotas, self._starts, strict=True)):
                before = np.cumsum(sources == source) - 1  # items of this source in the window, before each place
                here = (windows == window) & (sources[places] == source)
                indices[here] = start + self._epochs[source](window * quota + before[places[here]])
        return indices


def shares(weights: Sequence[float], whole: int) -> list[int]:
    """`whole` divided by weights: integers of that sum, each less than 1 from its exact part (largest remainders)."""
    exact = np.array(weights) / sum(weights) * whole
    counts = np.floor(exact + 1e-9).astype(int)
    for source in np.argsort(counts - exact, kind="stable")[: whole - counts.sum()]:
        counts[source] += 1
    return counts.tolist()


def _rng(*words: int) -> np.random.Generator:
    return np.random.default_rng(words)


class StepBatches(Sampler[list[int]]):
    """Indices of each micro-batch of one rank, for steps start_step + 1, ..., steps.

    Step s consumes positions [(s-1) G, s G) of an order that depends on the seed alone, G = global batch: the same
    sequences whatever the number of ranks, and no state to save. The order is that of `mixture`; without one it is a
    permutation for each epoch, which has len(dataset) // G steps.
    """

    def __init__(
        self,
        dataset: Sized,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        steps: range,
        mixture: Mixture | None = None,
    ) -> None:
        global_batch = micro_batch * accumulation * world_size
        if len(dataset) < global_batch:
            raise ValueError(
                f"the training data has {len(dataset)} sequences, less than one global batch of {global_batch} "
                f"({micro_batch} x {accumulation} accumulated x {world_size} ranks): lower the batch or give more data"
            )
        whole = len(dataset) // global_batch * global_batch
        self._order = mixture or Epochs(whole, lambda epoch: _torch_permutation(whole, seed + epoch))
        self._places = np.arange(global_batch).reshape(accumulation, micro_batch, world_size)[:, :, rank]
        self._global_batch, self._accumulation, self._steps = global_batch, accumulation, steps

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            positions = step * self._global_batch + self._places
            yield from self._order(positions.ravel()).reshape(positions.shape).tolist()


def _torch_permutation(size: int, seed: int) -> np.ndarray:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()  # as DistributedSampler draws
