"""A run's output folder: one run's at a time, and known to be writable before a model is built."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
from pathlib import Path

import pytest
import torch
from spawn import run_ranks

from ds_memopt.train.output_folder import _lock, claim
from ds_memopt.train.ranks import Ranks


def hold(folder: Path, held: multiprocessing.Event) -> None:
    _lock(folder)
    held.set()
    signal.pause()


def test_two_jobs_in_one_folder(tmp_path):
    """The second is told who holds it; a killed job holds nothing, and a process may go on in its own folder."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, held))
    holder.start()
    try:
        assert held.wait(60)
        named = re.escape(f"--output_dir {tmp_path} is in use by process {holder.pid} on {socket.gethostname()}: wait")
        for _ in range(2):  # to be refused takes nothing from the holder
            with pytest.raises(ValueError, match=named):
                _lock(tmp_path)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    _lock(tmp_path)
    _lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def claims(place: Path) -> list[str]:
    """What each rank is told: of a folder in a file on rank 1 alone, then of one that can be made."""
    rank = torch.distributed.get_rank()
    ranks = Ranks(rank, rank, 2, torch.device("cpu"))
    (place / f"file{rank}").touch()
    told = []
    for folder in (place / ("file1/run" if rank else "run0"), place / "new/run"):
        try:
            claim(folder, ranks)
            told.append("")
        except ValueError as error:
            told.append(str(error))
    return told


def test_a_folder_that_one_rank_cannot_write_to_is_told_to_all(tmp_path):
    first, second = run_ranks(claims, 2, tmp_path)
    assert first == second and first[1] == ""
    assert (
        first[0] == f"rank 1: --output_dir {tmp_path}/file1/run cannot be written to: Not a directory; choose another"
    )
    assert (tmp_path / "new/run/.lock").is_file() and not (tmp_path / "run0/.lock").exists()
