"""A run's output folder: every rank can write there, and no other run does."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import TextIO

from ds_memopt.checkpoint.durable import steps
from ds_memopt.train.ranks import Ranks, on_all_ranks

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
RESOLVED = "resolved_config.json"

_locks: dict[Path, TextIO] = {}


def refuse_no_run(folder: Path) -> None:
    """ValueError for a folder in which no run was begun, such as one whose name was misspelt."""
    if not (folder / RESOLVED).exists() and not steps(folder / CHECKPOINTS):
        raise ValueError(
            f"--resume found no run in {folder}, which has no {RESOLVED}: correct --output_dir, or leave --resume out"
        )


def claim(folder: Path, ranks: Ranks) -> None:
    """Make the folder, and keep other runs out of it until this process ends, in whatever way. All ranks call.

    ValueError on all ranks if one cannot write there, or if another process on whatever machine has claimed it.
    """
    on_all_ranks(lambda: _check_writable(folder))
    on_all_ranks(lambda: _lock(folder) if ranks.is_main else None)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to: {error.strerror}; choose another") from error


def _lock(folder: Path) -> None:
    """By a lock of the kernel's on a file, which the holder's end undoes, be it a kill; the file stays."""
    if folder.resolve() in _locks:  # of an earlier run of this process
        _locks.pop(folder.resolve()).close()
    file = (folder / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf: children do not inherit it, and NFS knows it
    except OSError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes there", flush=True)
            return
        raise ValueError(
            f"--output_dir {folder} is in use by {holder or 'another process'}: wait until it has ended, or choose "
            "another --output_dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _locks[folder.resolve()] = file
