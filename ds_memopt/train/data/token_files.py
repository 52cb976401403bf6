"""Files of token ids, memory-mapped: those of nanoGPT, of llm.c, and pairs of Megatron's."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from ds_memopt.train.data.sequences import Tokens
from ds_memopt.train.data.sources import Files, local_path

MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
LLM_C = {20240520: np.uint16, 20240801: np.uint32}
"""The first of 256 int32 that head a file of llm.c, and the type of the ids behind them."""
LLM_C_HEADER = 1024

SCANNED_AT_ONCE = 2**24
VALIDATION_NAMES = ("val.bin", "validation.bin")


def training_and_validation(files: Files) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files to train on, and those named val.bin, in the source or beside a train.bin that is all of it."""
    validation = tuple(path for path in files.paths if Path(path).name in VALIDATION_NAMES)
    training = tuple(path for path in files.paths if path not in validation)
    if not training:
        return files.paths, ()
    if not validation and len(training) == 1 and Path(training[0]).name == "train.bin":
        folder = Path(local_path(training[0])).parent
        validation = tuple(str(folder / name) for name in VALIDATION_NAMES if (folder / name).is_file())
    return training, validation


def open_token_files(name: str, paths: tuple[str, ...], end_of_text: int | None) -> Tokens:
    """The ids of the files as one stream. Its documents are those that a Megatron index tells, else what ends with the
    id end_of_text; where that is None too, nothing tells.

    ValueError naming the file for one that is damaged, or that end_of_text is not in.
    """
    parts, lengths = [], []
    for path in map(local_path, paths):
        index = Path(path).with_suffix(".idx")
        ids, sizes = _open_megatron(path, index) if index.is_file() else (_open_plain(path), None)
        if sizes is None and end_of_text is not None:
            ends = _ends(ids, end_of_text)
            if not len(ends):
                raise ValueError(f"{path} does not hold the id {end_of_text} that --end_of_text or the tokenizer names")
            sizes = np.diff(ends, prepend=0, append=len(ids))
        parts.append(ids)
        lengths.append(sizes)
    if any(sizes is None for sizes in lengths):
        return Tokens(name, parts, None)
    sizes = np.concatenate(lengths)
    return Tokens(name, parts, np.concatenate([[0], np.cumsum(sizes[sizes > 0], dtype=np.int64)]))


def _open_plain(path: str) -> np.ndarray:
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
    if len(head) == 12 and (kind := LLM_C.get(struct.unpack("<3i", head)[0])):
        count = struct.unpack("<3i", head)[2]
        if size != LLM_C_HEADER + count * np.dtype(kind).itemsize:
            raise ValueError(f"{path} is damaged: its header tells {count} ids, which its {size} bytes are not")
        return np.memmap(path, kind, "r", LLM_C_HEADER)
    if not size or size % 2:
        raise ValueError(f"{path} has {size} bytes: a token file holds numbers of 2 bytes (uint16), or has an .idx")
    return np.memmap(path, np.uint16, "r")


def _open_megatron(path: str, index: Path) -> tuple[np.ndarray, np.ndarray]:
    """(ids, ids of each document) of a pair of files that Megatron's preprocess_data.py writes.

    The index holds, little-endian: 9 bytes, the version (uint64), the type (uint8), the number of sequences and that of
    documents' borders (uint64), ids of each sequence (int32), where each begins in bytes (int64), and the first
    sequence of each document and the number of all (int64).
    """
    data = index.read_bytes()
    if data[:9] != MEGATRON or len(data) < 34:
        raise ValueError(f"{index} is no index of Megatron's: it does not begin with MMIDIDX")
    _, code, sequences, borders = struct.unpack_from("<QBQQ", data, 9)
    if code not in MEGATRON_TYPES or len(data) < 34 + 12 * sequences + 8 * borders:
        raise ValueError(f"{index} is damaged, or holds another type than integers (code {code})")
    lengths = np.frombuffer(data, np.int32, sequences, 34).astype(np.int64)
    first = np.frombuffer(data, np.int64, borders, 34 + 12 * sequences)
    ids = np.memmap(path, MEGATRON_TYPES[code], "r")
    if lengths.sum() != len(ids):
        raise ValueError(f"{path} is damaged: it holds {len(ids)} ids, but {index} tells {lengths.sum()}")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return ids, np.diff(ends[first])


def _ends(ids: np.ndarray, end_of_text: int) -> np.ndarray:
    """Where documents end: behind each end_of_text."""
    starts = range(0, len(ids), SCANNED_AT_ONCE)
    found = [start + 1 + np.flatnonzero(ids[start : start + SCANNED_AT_ONCE] == end_of_text) for start in starts]
    return np.concatenate(found)
