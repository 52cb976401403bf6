"""One rank's file of a checkpoint: 1-D tensors in the format of safetensors, written one after the other.

The format: 8 bytes with the header's length, the header in JSON, then the tensors' bytes without gaps. safetensors' own
`save_file` would first copy all tensors to memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

WORDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
"""What safetensors calls each dtype."""


def key_in_file(name: str, key: str, start: int) -> str:
    """What a file calls the part of the state `key` of parameter `name` that begins at `start`."""
    return f"{name}:{key}:{start}"


def write_tensors(
    path: Path,
    described: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file of safetensors and sync it. At any time one tensor is in memory besides.

    described: key, dtype and shape of each; tensors: the same keys, in whatever order. Raises OSError.
    """
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, dtype, shape in sorted(described, key=lambda one: -one[1].itemsize):  # so that each is aligned
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": WORDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write(file.fileno(), len(text).to_bytes(8, "little") + text, 0)
        for key, tensor in tensors:
            data = tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
            begin, stop = header[key]["data_offsets"]
            assert len(data) == stop - begin, f"{key} was described otherwise"
            _write(file.fileno(), data, 8 + len(text) + begin)
        os.fsync(file.fileno())


def _write(file: int, data, place: int) -> None:
    view = memoryview(data)
    while len(view):  # one call writes at most 2 GiB, and less where the disk is nearly full
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class PartFiles:
    """Reads from the files of a checkpoint, each opened once. What is read is a view of the mapped file, so that only
    what is copied from it comes into memory, and so that it stays readable when the file is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, {}

    def read(self, file: str, key: str, low: int, high: int) -> torch.Tensor:
        """Elements [low, high) of a tensor."""
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, "pt")
        return self._open[file].get_slice(key)[low:high]
