"""Streams of token ids in memory-mapped parts, split by document and cut into sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

HELD_OUT_FRACTION = 0.05

SAMPLES, IDS_OF_SAMPLE = 256, 64
"""Stretches that stand for all of a stream: few enough pages to read before each run."""

Runs = np.ndarray
"""Stretches of a stream, int64 [runs, 2]: where each begins and where it ends."""


class Tokens:
    """A stream of token ids in parts that lie end to end.

    name: of messages. parts: 1-D integer arrays, memory-mapped where they are large. borders: where documents begin and
    end, int64 [documents + 1], from 0 to the length; None where nothing tells.
    """

    def __init__(self, name: str, parts: Sequence[np.ndarray], borders: np.ndarray | None) -> None:
        self.name, self.borders = name, borders
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def documents(self) -> int | None:
        return None if self.borders is None else len(self.borders) - 1

    def digest(self) -> str:
        """Of evenly spaced ids: other text of the same length, or the same in another order, has another one."""
        last = max(0, len(self) - IDS_OF_SAMPLE)
        starts = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
        ids = [self.read(start, min(start + IDS_OF_SAMPLE, len(self))) for start in starts]
        return hashlib.sha256(np.concatenate(ids).astype("<i8")).hexdigest()[:8]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop), int64."""
        pieces, part = [], int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[part])
            first = end - len(self._parts[part])
            pieces.append(self._parts[part][start - first : min(stop, end) - first])
            start, part = end, part + 1
        return np.concatenate(pieces).astype(np.int64)


class Sequences(Dataset):
    """Runs of a stream, laid end to end and cut into sequences of seq_length ids; a shorter tail is left out.

    Items are int64 tensors [seq_length] of ids below vocab_size; ValueError for another id, when its sequence is read.
    """

    def __init__(self, tokens: Tokens, runs: Runs, seq_length: int, vocab_size: int) -> None:
        self._tokens, self._runs, self._seq_length, self._vocab_size = tokens, runs, seq_length, vocab_size
        self._ends = np.cumsum(runs[:, 1] - runs[:, 0])

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._seq_length if len(self._ends) else 0

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self._seq_length
        end, pieces, run = begin + self._seq_length, [], int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            stop = min(end, int(self._ends[run]))
            shift = int(self._runs[run, 1]) - int(self._ends[run])
            pieces.append(self._tokens.read(begin + shift, stop + shift))
            begin, run = stop, run + 1
        ids = np.concatenate(pieces)
        if ids.max() >= self._vocab_size or ids.min() < 0:
            wrong = next(int(i) for i in ids if not 0 <= i < self._vocab_size)
            raise ValueError(
                f"{self._tokens.name} holds token id {wrong}, but the model embeds {self._vocab_size}: choose the "
                "model that the tokens were made for, or files of another number type"
            )
        return torch.from_numpy(ids)


class SyntheticSequences(Dataset):
    """`length` sequences of random ids, a function of (seed, index)."""

    def __init__(self, length: int, seq_length: int, vocab_size: int, seed: int) -> None:
        self._length, self._seq_length, self._vocab_size, self._seed = length, seq_length, vocab_size, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = np.random.default_rng([self._seed, index])
        return torch.from_numpy(generator.integers(0, self._vocab_size, self._seq_length))


def all_of(tokens: Tokens) -> Runs:
    return np.array([[0, len(tokens)]], dtype=np.int64)


def hold_out(tokens: Tokens) -> tuple[Runs, Runs]:
    """(training, validation): 5 % of the documents, drawn the same each time, are for validation, at least one.

    Where nothing tells documents apart the last 5 % of the ids are. ValueError for less than two documents.
    """
    if tokens.borders is None:
        border = len(tokens) - round(HELD_OUT_FRACTION * len(tokens))
        return np.array([[0, border]]), np.array([[border, len(tokens)]])
    count = tokens.documents
    if count < 2:
        raise ValueError(
            f"--data {tokens.name} holds {count} documents; 2 are needed, one of them for validation, or give "
            "--validation_data"
        )
    held_out = np.zeros(count, bool)
    held_out[np.random.default_rng(0).choice(count, max(1, round(HELD_OUT_FRACTION * count)), replace=False)] = True
    changes = np.flatnonzero(np.diff(held_out)) + 1  # documents whose half is not that of the one before
    edges = tokens.borders[np.concatenate([[0], changes, [count]])]
    runs = np.stack([edges[:-1], edges[1:]], axis=1)
    first = int(held_out[0])  # runs of both halves come by turns
    return runs[first::2], runs[1 - first :: 2]
