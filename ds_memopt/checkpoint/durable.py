"""Checkpoints in a folder: each written aside, synced and renamed when it is whole, then named in `latest`.

checkpoints/latest names the newest, such as "step200", and checkpoints/step200/ is it. checkpoints/.step300/ is being
written, or a killed run has left it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from ds_memopt.measure import GIB

LATEST = "latest"


def sync_folder(folder: Path) -> None:
    """Names that were made, moved or removed in it are on the disk afterwards."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_files(folder: Path) -> None:
    """What others wrote below it is on the disk afterwards."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def write_synced(path: Path, text: str) -> None:
    """Written aside, synced, renamed: after a power cut there is the old text or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def begin(folder: Path, step: int, needs: int) -> Path:
    """An empty folder to write a checkpoint of a step aside. needs: its bytes.

    Raises ValueError if the disk has no room for it or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        restore(folder)
        for left in folder.glob(".step*"):  # of a run that was killed
            shutil.rmtree(left)
        aside = folder / f".step{step}"
        aside.mkdir()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}") from error
    check_room(aside, needs)
    return aside


def check_room(folder: Path, needs: int) -> None:
    """Raise ValueError, and remove the folder, if its disk has less than this many bytes."""
    free = shutil.disk_usage(folder).free
    if free < needs:
        shutil.rmtree(folder)
        raise ValueError(f"no space left in {folder.parent}: needs {needs / GIB:.3g} GiB, has {free / GIB:.3g} GiB")


def publish(aside: Path, keep: int | None) -> Path:
    """Give a checkpoint its name, in the place of one of the same step, and make it `latest`. Then remove all but the
    last `keep` (None: keep all) up to its step. Later ones are of a run that went on from an earlier step: they stay.
    """
    final, old = aside.with_name(aside.name[1:]), aside.with_name(f".old-{aside.name[1:]}")
    sync_folder(aside)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    sync_folder(aside.parent)
    write_synced(aside.parent / LATEST, final.name)
    shutil.rmtree(old, ignore_errors=True)
    if keep is not None:
        step = step_of(final)
        for earlier in [other for other in steps(aside.parent) if other <= step][:-keep]:
            shutil.rmtree(aside.parent / f"step{earlier}", ignore_errors=True)
    return final


def restore(folder: Path) -> None:
    """What `publish` set aside, and a kill kept it from replacing, gets its name back."""
    for old in folder.glob(".old-step*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def give_up(aside: Path) -> None:
    """Remove what was written aside."""
    with contextlib.suppress(OSError):
        shutil.rmtree(aside)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step"))


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that have their names, whole or damaged, in order."""
    found = (path.name.removeprefix("step") for path in folder.glob("step*"))
    return sorted(int(name) for name in found if name.isdecimal())


def newest_first(folder: Path) -> list[int]:
    """The step that `latest` names, whether or not it is there, and those before it; without `latest` all."""
    restore(folder)
    saved = steps(folder)[::-1]
    try:
        named = re.fullmatch(r"step(\d+)\s*", (folder / LATEST).read_text(errors="replace"))
    except OSError:
        named = None
    if not named:
        return saved
    newest = int(named[1])
    return [newest, *(step for step in saved if step < newest)]
