"""What --data names: sources, their weights, and the files of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".txt": "text", ".md": "text", ".py": "text",
    ".bin": "tokens",
}  # fmt: skip
"""The kind of what a file holds, by the end of its name without that of its compression."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Arrow's name of a compression."""

SAVED = ("state.json", "dataset_dict.json")
"""Files that `datasets.save_to_disk` leaves in its folder."""

BUILT_IN = ("stdlib", "synthetic")


@dataclass(frozen=True)
class Source:
    """One word of --data: [NAME=]PATH[:WEIGHT]. weight: None if the word has none."""

    name: str
    path: str
    weight: float | None = None


@dataclass(frozen=True)
class Files:
    """The files of a source, sorted. kind: a value of SUFFIXES, or "saved", then the only path is a folder."""

    kind: str
    paths: tuple[str, ...]


def parse_sources(words: Sequence[str]) -> list[Source]:
    """The sources that the words of --data name.

    Several have a weight each, or none has: then every token weighs the same. ValueError for anything else.
    """
    sources = [_parse(word) for word in words]
    told = ", ".join(words)
    if len({source.name for source in sources}) < len(sources):
        raise ValueError(f"--data {told}: two sources have one name; name them, as in web=FOLDER:0.7 code=FOLDER:0.3")
    if any(source.path in BUILT_IN for source in sources) and len(sources) > 1:
        raise ValueError(f"--data {told}: {' and '.join(BUILT_IN)} stand alone, without another source")
    weights = [source.weight for source in sources]
    if len(sources) > 1 and None in weights and any(weights):
        raise ValueError(f"--data {told}: some sources have a weight and some have none; give one to each, or to none")
    if any(weight is not None and weight <= 0 for weight in weights):
        raise ValueError(f"--data {told}: a weight must be above 0; leave out a source that you do not want")
    return sources


def _parse(word: str) -> Source:
    if _exists(word):  # whatever signs its name has
        return Source(word, word)
    name, path, weight = re.fullmatch(r"(?:([\w.-]+)=)?(.+?)(?::(\d+\.?\d*|\.\d+))?", word, re.DOTALL).groups()
    return Source(name or path, path, None if weight is None else float(weight))


def find_files(source: Source, option: str = "--data") -> Files:
    """The files that a path names: a file, a folder and all that is below, a glob, or a URL of these that fsspec knows.

    ValueError if there is none, or if they are of several kinds.
    """
    system, path = _open(source.path)
    told = f"{option} {source.path}"
    if system.isdir(path):
        if any(system.exists(f"{path}/{name}") for name in SAVED):
            return Files("saved", (_named(system, path),))
        found = system.find(path)
    else:
        found = [path] if system.exists(path) else [file for file in system.glob(path) if system.isfile(file)]
        if not found:
            raise ValueError(f"{told}: no such file or folder (and not one of {', '.join(BUILT_IN)})")
    by_kind: dict[str, list[str]] = {}
    for file in sorted(found):
        if kind := kind_of(file):
            by_kind.setdefault(kind, []).append(_named(system, file))
    if len(by_kind) > 1 and "text" in by_kind:  # a dataset's own page is none of its documents
        by_kind["text"] = [file for file in by_kind["text"] if PurePosixPath(file).name != "README.md"]
        by_kind = {kind: files for kind, files in by_kind.items() if files}
    if len(by_kind) != 1:
        ends = ", ".join(SUFFIXES)
        lacks = f"files of several kinds ({', '.join(sorted(by_kind))})" if by_kind else f"no file of {ends}"
        raise ValueError(f"{told}: {lacks}; give a file, a folder of files of one kind, or a glob such as '*.parquet'")
    ((kind, files),) = by_kind.items()
    return Files(kind, tuple(files))


def kind_of(file: str) -> str | None:
    """The kind of what a file holds; None for one that --data does not take."""
    name = PurePosixPath(file)
    if name.suffix in COMPRESSIONS:
        kind = SUFFIXES.get(PurePosixPath(name.stem).suffix)
        return kind if kind in ("json", "text") else None
    return SUFFIXES.get(name.suffix)


def stamp(file: str) -> tuple[str, Any, Any]:
    """Name, size and date of a file, or what its file system has in the place of a date: it changes when the file
    does."""
    system, path = _open(file)
    info = system.info(path)
    return file, info["size"], info.get("mtime") or system.ukey(path)


def open_file(file: str) -> Any:
    """A binary file, opened for reading. ValueError naming it if it cannot be opened."""
    system, path = _open(file)
    try:
        return system.open(path, "rb")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from error


def local_path(file: str) -> str:
    """The path of a file on this machine. ValueError for one that is elsewhere: it could not be memory-mapped."""
    system, path = _open(file)
    if not _is_local(system):
        raise ValueError(f"{file}: token files and saved datasets are memory-mapped, so they must lie on this machine")
    return path


def _open(path: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ValueError(f"--data {path}: {error}") from error


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def _named(system: Any, path: str) -> str:
    """The path by which fsspec finds the file again."""
    return path if _is_local(system) else system.unstrip_protocol(path)


def _exists(path: str) -> bool:
    try:
        system, place = _open(path)
        return system.exists(place)
    except ValueError:
        return False
