"""How runs are shared out among threads: built once per layout, and kept with the runs. common.h has the structs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np

from ds_memopt.kernels.work import FIELDS, Runs

TASK = 2**15
"""Elements that a thread takes at a time: few enough to be spread evenly, and to stay in its cache."""

LARGE = 2**17
"""Longer runs are cut into chunks, which threads share: their elements would not stay in one core's cache."""


class Schedule(ctypes.Structure):
    """`Schedule` of adam.cpp. numbers: of the tensors that have runs; num_tensors: one more than the last of them."""

    _fields_ = [
        ("rows", ctypes.c_void_p), ("tasks", ctypes.c_void_p), ("num_tasks", ctypes.c_int64),
        ("large", ctypes.c_void_p), ("num_large", ctypes.c_int64), ("chunks", ctypes.c_void_p),
        ("num_chunks", ctypes.c_int64), ("sums", ctypes.c_void_p), ("scales", ctypes.c_void_p),
    ]  # fmt: skip

    def __init__(self, runs: Runs, tasks: list = (), large: list = (), chunks: list = ()) -> None:
        super().__init__()
        self.num_tasks, self.num_large, self.num_chunks = len(tasks), len(large), len(chunks)
        arrays = {
            "rows": runs.rows,
            "tasks": np.array(tasks, dtype=np.int64),
            "large": np.array(large, dtype=np.int64),
            "chunks": np.array(chunks, dtype=np.int64),
            "sums": np.zeros(max(len(tasks), len(chunks)), dtype=np.float64),
            "scales": np.zeros(len(large), dtype=np.float32),
        }
        for name, array in arrays.items():
            setattr(self, name, array.ctypes.data)
        self.arrays = arrays  # so that they live as long
        self.numbers = np.unique(runs.column("tensor")).tolist()
        self.num_tensors = max(self.numbers, default=-1) + 1


def of_blocks(runs: Runs) -> Schedule:
    """Small runs in tasks, large ones in chunks."""
    return _kept(runs, "blocks", lambda: _of_runs(runs, LARGE))


def of_cut_blocks(runs: Runs) -> Schedule:
    """All runs in chunks: what is computed once for each is on its own."""
    return _kept(runs, "cut blocks", lambda: _of_runs(runs, 0))


def of_elements(runs: Runs) -> Schedule:
    """Chunks of whole lines of runs."""
    return _kept(runs, "elements", lambda: Schedule(runs, chunks=list(_chunks_of_lines(runs))))


def of_groups(runs: Runs) -> Schedule:
    """All runs in tasks."""
    return _kept(runs, "groups", lambda: Schedule(runs, tasks=list(_tasks(runs, lambda width: True))))


def _kept(runs: Runs, kind: str, build: Callable[[], Schedule]) -> Schedule:
    if ("cpp", kind) not in runs.schedules:
        runs.schedules["cpp", kind] = build()
    return runs.schedules["cpp", kind]


def _of_runs(runs: Runs, most: int) -> Schedule:
    large, chunks = [], []
    for number, row in enumerate(_rows(runs)):
        for run in range(row["rows"] * row["count"]) if row["width"] > most else ():
            large.append((number, run, 0, row["width"], len(chunks)))
            chunks += [
                (number, run, start, min(TASK, row["width"] - start), len(large) - 1)
                for start in range(0, row["width"], TASK)
            ]
    return Schedule(runs, list(_tasks(runs, lambda width: width <= most)), large, chunks)


def _tasks(runs: Runs, fits: Callable[[int], bool]) -> Iterator[tuple[int, int, int]]:
    for number, row in enumerate(_rows(runs)):
        if fits(row["width"]):
            total, step = row["rows"] * row["count"], max(1, TASK // row["width"])
            yield from ((number, first, min(first + step, total)) for first in range(0, total, step))


def _chunks_of_lines(runs: Runs) -> Iterator[tuple[int, int, int, int, int]]:
    for number, row in enumerate(_rows(runs)):
        length = row["count"] * row["width"]
        for line in range(row["rows"]):
            for start in range(0, length, TASK):
                yield number, line * row["count"], start, min(TASK, length - start), 0


def _rows(runs: Runs) -> Iterator[dict[str, int]]:
    for row in runs.rows.tolist():
        yield dict(zip(FIELDS, row, strict=True))
