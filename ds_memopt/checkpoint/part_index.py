"""The index of a checkpoint: what its files hold of what, and what else a run must know to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_memopt.checkpoint.durable import write_synced
from ds_memopt.checkpoint.part_files import WORDS, digest
from ds_memopt.shards import numel_of

INDEX = "index.json"
FORMAT = "ds_memopt checkpoint 1"
WEIGHT, BUFFER = "weight", "buffer"
"""The keys of what is no state of the optimizer."""


class Entry(NamedTuple):
    """Entries [start, start + length) of `key` of parameter or buffer `name`, and the file that has them."""

    name: str
    key: str
    start: int
    length: int
    file: str
    dtype: str

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def nbytes(self) -> int:
        return self.length * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return next(dtype for dtype, word in WORDS.items() if word == self.dtype)


@dataclass
class Index:
    """All that a checkpoint says of itself; every field is JSON.

    step: optimizer steps made. world_size, engine, optimizer: of the run that saved it, for people. shapes: of whole
    parameters and buffers. files: bytes and SHA-256 of each. progress: of the optimizer. scalars: keys of the states
    that are one number per parameter. groups: the numbers in each param group. scheduler: its state_dict. loss_scale:
    of fp16. settings, extra: what the caller wants to find again. model_config: of a Hugging Face model.
    """

    step: int
    world_size: int
    engine: str
    optimizer: str
    shapes: dict[str, list[int]]
    entries: list[Entry]
    files: dict[str, dict[str, Any]]
    progress: dict[str, Any]
    scalars: list[str] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    scheduler: dict[str, Any] | None = None
    loss_scale: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write it into the folder, with a checksum of its own."""
        content = asdict(self)
        write_synced(folder / INDEX, json.dumps({"format": FORMAT, "checksum": _checksum(content), **content}) + "\n")

    def check_json(self) -> None:
        """Raise ValueError for a field that JSON would not give back."""
        for name in ("progress", "settings", "extra"):
            try:
                same = json.loads(json.dumps(getattr(self, name)))
            except TypeError as error:
                raise ValueError(f"{name} of the checkpoint is no JSON: {error}") from error
            setattr(self, name, same)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Raises ValueError where it is missing or damaged, or of another version."""
        path = folder / INDEX
        try:
            content = json.loads(path.read_text())
            version, checksum = content.pop("format"), content.pop("checksum")
        except OSError as error:
            raise ValueError(f"checkpoint {folder} is damaged: {INDEX} is missing ({error.strerror})") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint {folder} is damaged: {INDEX} is no index ({error})") from error
        if version != FORMAT:
            raise ValueError(f"checkpoint {folder} is of the format {version!r}, this release reads {FORMAT!r}")
        if _checksum(content) != checksum:
            raise ValueError(f"checkpoint {folder} is damaged: the checksum of {INDEX} is not the one in it")
        content["entries"] = [Entry(*entry) for entry in content["entries"]]
        return cls(**content)

    def __post_init__(self) -> None:
        self._parts: dict[tuple[str, str], list[Entry]] = {}
        for entry in sorted(self.entries):
            self._parts.setdefault((entry.name, entry.key), []).append(entry)
        self._keys: dict[str, set[str]] = {}
        for name, key in self._parts:
            self._keys.setdefault(name, set()).add(key)

    def keys(self, name: str) -> set[str]:
        """The states that there are of a parameter."""
        return self._keys.get(name, set()) - {WEIGHT, BUFFER}

    def names(self, key: str) -> list[str]:
        """What has this key."""
        return [name for name, of in self._parts if of == key]

    def parts(self, name: str, key: str, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Those that have some of the entries [start, stop), in order."""
        for entry in self._parts.get((name, key), ()):
            if entry.start < (entry.stop if stop is None else stop) and entry.stop > start:
                yield entry

    def check_covered(self, name: str, key: str, start: int, stop: int) -> None:
        """Raise ValueError unless it has all entries [start, stop)."""
        covered = start
        for entry in self.parts(name, key, start, stop):
            if entry.start > covered:
                break
            covered = max(covered, entry.stop)
        if covered < stop:
            raise ValueError(f"the checkpoint lacks {key}[{covered}:{stop}] of {name}: it was saved by another model")

    def numel(self, name: str) -> int:
        return numel_of(self.shapes[name])


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fault(folder: Path, files: dict[str, dict[str, Any]], share: Sequence[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, None if nothing is. share: those to look at, by default all."""
    for name in files if share is None else share:
        path, said = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != said["bytes"]:
                return f"checkpoint file {path} is damaged: it has {size} bytes, {INDEX} says {said['bytes']}"
            if digest(path) != said["sha256"]:
                return f"checkpoint file {path} is damaged: its SHA-256 is not the one in {INDEX}"
        except OSError as error:
            return f"checkpoint file {path} is missing or damaged ({error.strerror})"
    return None
