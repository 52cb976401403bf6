"""The trajectory of a zeroth-order run: with the base weights, all that is needed to rebuild the final ones to the bit.

The file is one line of JSON, then one record of fixed size for each step, little-endian and without padding:

    step   uint32             from the header's first_step on, without a hole
    flags  uint32             bit 0: SKIPPED
    g      float64[probes]    the step's projected gradients, finite unless the step was skipped
    lr     float64[groups]    the learning rate of each param group, finite
    crc32  uint32             of the header's line, then the record up to here

The line ends with the CRC-32 of what it would be without that.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ds_memopt.optimizers.base.hyper_parameters import integer
from ds_memopt.optimizers.probes.noise import NOISE_VERSION

VERSIONS = {"ds_memopt_trajectory": 2, "noise_version": NOISE_VERSION}
"""What the header begins with. The first is the format's: it grows with the checksum's formula too."""
MAGIC = b'{"ds_memopt_trajectory": '
SKIPPED = 1  # the flag of a step that left the weights as they were
MOST_PROBES = 2**20
CRC_BYTES = 4


@dataclass(frozen=True)
class TrajectoryHeader:
    """What holds for the whole run.

    method, dtype: the method's name and the weights' dtype, for instance "bfloat16".
    hyper: its hyper-parameters that do not change, the seed among them, as JSON can hold them.
    probes: values of g per step, from 1 to 2^20.
    parameters: the names of each param group's parameters.
    base_checksum: of the weights before the first step, as checksum.as_hex writes it.
    first_step: the step of the first record, in [0, 2^32).

    Raises ValueError for what is none of these.
    """

    method: str
    hyper: dict[str, Any]
    probes: int
    parameters: list[list[str]]
    base_checksum: str
    dtype: str
    first_step: int = 0

    def __post_init__(self) -> None:
        for key, low, high in (("probes", 1, MOST_PROBES), ("first_step", 0, 2**32 - 1)):
            integer(low, high, "A trajectory has no other.").check(key, getattr(self, key))
        for key in ("method", "base_checksum", "dtype"):
            if not isinstance(getattr(self, key), str):
                raise ValueError(f"{key} must be a string, not {getattr(self, key)!r}.")
        lists = isinstance(self.parameters, list) and all(isinstance(names, list) for names in self.parameters)
        if not (lists and all(isinstance(name, str) for names in self.parameters for name in names)):
            raise ValueError("parameters must be a list of names for each param group.")
        if not isinstance(self.hyper, dict):
            raise ValueError(f"hyper must hold values by name, not be {self.hyper!r}.")
        try:
            json.dumps(self.hyper, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"hyper must hold what JSON can, finite numbers above all: {error}.") from error

    @property
    def record(self) -> np.dtype:
        """The dtype of a record."""
        g, lr = (self.probes,), (len(self.parameters),)
        return np.dtype([("step", "<u4"), ("flags", "<u4"), ("g", "<f8", g), ("lr", "<f8", lr), ("crc32", "<u4")])

    def line(self) -> bytes:
        """The first line of the file."""
        content = VERSIONS | {"groups": len(self.parameters)} | asdict(self)
        return json.dumps(content | {"crc32": zlib.crc32(json.dumps(content).encode())}).encode() + b"\n"


class TrajectoryWriter:
    """Writes a trajectory, step by step. Let one rank do it: the scalars are the same on all.

    Each step is handed to the operating system as it is appended: a process that is killed loses at most that step, of
    which a torn record may stay.

    path: a new file; with `resume_after`, the run's existing one.
    resume_after: the last step that the checkpoint holds, first_step - 1 for none. Later records are dropped, a torn
        one too, and the next step to append is the one after it.

    Raises ValueError for an existing file; with `resume_after` for no trajectory, another header, damage, or too few
    steps. OSError where the file cannot be written.
    """

    def __init__(self, path: str | Path, header: TrajectoryHeader, resume_after: int | None = None) -> None:
        self._path = Path(path)
        self._record = header.record
        if resume_after is None:
            if self._path.exists():
                raise ValueError(f"{path} exists. To continue its run pass resume_after, else give another path.")
            aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            aside.write_bytes(header.line())
            os.replace(aside, self._path)  # so a file of this name has a whole header
        else:
            header = _resumable(self._path, header, resume_after)
        self._next = header.first_step if resume_after is None else resume_after + 1
        self._line_crc = zlib.crc32(header.line())
        self._file = self._path.open("ab")
        self._file.truncate(len(header.line()) + (self._next - header.first_step) * self._record.itemsize)

    def append(self, step: int, flags: int, g: Sequence[float], lr: Sequence[float]) -> None:
        """Write one step: a g for each probe and an lr for each param group.

        Raises ValueError for a step that is not the next one and for another number of values.
        """
        if step != self._next:
            raise ValueError(f"{self._path} needs step {self._next} next, not {step}. Append skipped steps too.")
        for key, values in (("g", g), ("lr", lr)):
            shape = self._record[key].shape
            if np.shape(values) != shape:  # NumPy would repeat a single value
                raise ValueError(f"{key} must have shape {shape}, as in the header, not {np.shape(values)}.")
        self._next += 1  # even if the disk is full: then the record stays in the file's buffer, to be written first
        content = np.array((step, flags, g, lr, 0), self._record).tobytes()[:-CRC_BYTES]
        self._file.write(content + zlib.crc32(content, self._line_crc).to_bytes(CRC_BYTES, "little"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_trajectory(path: str | Path) -> tuple[TrajectoryHeader, np.ndarray]:
    """The header, and the records as a read-only structured array of shape (steps,) with the fields of `record`.

    A file cut exactly between two records is whole, with fewer steps: compare with the steps that you expect.

    Raises ValueError for what is no trajectory, of an unknown format or noise, damaged, cut within a record, or lacks a
    step.
    """
    header, body = _read(path)
    size = header.record.itemsize
    steps, left_over = divmod(len(body), size)
    if left_over:
        raise ValueError(
            f"{path} is cut: after {steps} whole records {left_over} bytes are left over, and a record has {size}. "
            f"Resume its run, copy it again, or drop what is left over: truncate -s -{left_over} {path}"
        )
    return header, _records(path, header, body, steps)


def check_writable(path: str | Path) -> None:
    """Raise ValueError where a trajectory can neither be begun nor, in a file that is one, be continued."""
    path = Path(path)
    try:
        if path.exists():
            with path.open("r+b") as file:
                begins = file.read(len(MAGIC))
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
            begins = MAGIC
    except OSError as error:
        raise ValueError(
            f"trajectory={str(path)!r} cannot be written: {error.strerror}. Give a file in a folder that exists and "
            "can be written."
        ) from error
    if begins != MAGIC:
        raise ValueError(f"{path} exists and is no trajectory. Give another path.")


def _read(path: str | Path) -> tuple[TrajectoryHeader, bytes]:
    """The header, and all that follows it."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
            body = file.read() if line.startswith(MAGIC) else b""
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Give the path of a trajectory.") from error
    if not line.startswith(MAGIC):
        raise ValueError(f"{path} is no trajectory: it does not begin with {MAGIC.decode()}. Give another path.")
    try:
        content = json.loads(line)
        versions = {key: content[key] for key in VERSIONS}
        if versions == VERSIONS:  # else there may be other fields
            header = TrajectoryHeader(**{field.name: content[field.name] for field in fields(TrajectoryHeader)})
            if header.line() != line:
                raise ValueError("not as it was written")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}). Copy it again from where it was written.") from error
    if versions != VERSIONS:
        raise ValueError(f"{path} has {versions}, this ds_memopt reads {VERSIONS}. Use the one that wrote the file.")
    return header, body


def _records(path: str | Path, header: TrajectoryHeader, body: bytes, count: int) -> np.ndarray:
    """The first `count` records, of consecutive steps."""
    records, size = np.frombuffer(body, header.record, count), header.record.itemsize
    line_crc = zlib.crc32(header.line())
    crcs = [zlib.crc32(body[begin : begin + size - CRC_BYTES], line_crc) for begin in range(0, count * size, size)]
    expected = header.first_step + np.arange(count)
    skipped = records["flags"] == SKIPPED
    for wrong, what in (
        (records["crc32"] != np.array(crcs, np.uint32), "is damaged: what it has for step {} is not what was written"),
        (records["step"] != expected, "has a hole: it lacks step {}"),
        (~skipped & (records["flags"] != 0), "has unknown flags at step {}"),
        (~skipped & ~np.isfinite(records["g"]).all(1), "has a g at step {} that is no finite number"),
        (~np.isfinite(records["lr"]).all(1), "has an lr at step {} that is no finite number"),
    ):
        if wrong.any():
            raise ValueError(
                f"{path} {what.format(expected[wrong.argmax()])}. Use another copy of it, or resume its run from a "
                "checkpoint of an earlier step."
            )
    return records


def _resumable(path: Path, header: TrajectoryHeader, resume_after: int) -> TrajectoryHeader:
    """The file's own header, which says the same as `header`, if its records reach to step `resume_after`."""
    stored, body = _read(path)
    theirs, ours = (dict(_leaves("", json.loads(json.dumps(asdict(each))))) for each in (stored, header))
    for key in theirs | ours:
        there, here = (repr(each[key]) if key in each else "nothing" for each in (theirs, ours))
        if there != here:
            raise ValueError(f"{path} has {key}: {there}, this run {here}. Resume with the same, or give another path.")
    count, whole = resume_after + 1 - header.first_step, len(body) // header.record.itemsize
    if not 0 <= count <= whole:
        raise ValueError(
            f"{path} has {whole} steps from step {header.first_step} on: it cannot go on after step {resume_after}. "
            "Resume from a checkpoint within them, or begin another trajectory with the checkpoint's weights as base."
        )
    _records(path, stored, body, count)
    return stored


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What lies in nested dicts and lists, each with its path: ("hyper.betas.0", 0.9)."""
    if isinstance(value, dict | list) and value:
        for inner, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{key}.{inner}" if key else str(inner), entry)
    else:
        yield key, value
