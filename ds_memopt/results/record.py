"""What a run leaves in its output folder: metrics.jsonl, resolved_config.json, environment.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

METRICS = "metrics.jsonl"
PACKAGES = ("ds_memopt", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename: a reader, or a run that is killed here, never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The content of a file that a run left. ValueError if it is missing or no JSON."""
    text = _read(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; remove the run's folder and run it again") from error


def read_metrics(folder: Path, damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of folder/metrics.jsonl. damaged: takes a sentence for each row that is not whole, which is left out.

    ValueError if the file is missing, and without `damaged` for a line that is no row.
    """
    return read_lines(folder / METRICS, _has_step if damaged is None else _is_whole, damaged)


def read_lines(path: Path, is_row: Callable[[Any], bool], damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """The JSON objects in a file's lines. is_row: whether one is whole. damaged: as `read_metrics`."""
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if is_row(row):
            rows.append(row)
            continue
        said = f"{path}, line {number}, is damaged: {line[:60]!r}"
        if damaged is None:
            raise ValueError(f"{said}; remove the line")
        damaged.append(said)
    return rows


PEAKS = {"peak_allocated_gib": "allocated", "peak_rss_gib": "resident set"}
"""The peak memory of a rank: its key, on a GPU and on a CPU, and what it is."""

_NEEDED = ("tokens", "step_ms", "tokens_per_s", "optimizer_state_bytes_per_parameter", "bytes_sent_per_step")
_DIVIDED = ("held_gib", "sent_by_collective", "sent_by_group")


def _has_step(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int)


def _is_whole(row: Any) -> bool:
    """Whether a row holds what a report needs, in its types; the row before training has no figures of steps."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300

    def is_fitting(key: str, value: Any) -> bool:
        if key in _DIVIDED:
            return isinstance(value, dict) and all(map(is_number, value.values()))
        return isinstance(value, str) if key == "active_block" else is_number(value)

    if not _has_step(row) or "loss" not in row or "validation_loss" not in row:
        return False
    needed = () if row["step"] == 0 else (*_NEEDED, next((key for key in PEAKS if key in row), "peak"), "loss")
    fitting = all(value is None or is_fitting(key, value) for key, value in row.items())
    return fitting and all(is_number(row.get(key)) for key in needed)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise ValueError(
            f"{path.parent} is not the folder of a run: cannot read {path.name} in it ({error.strerror})"
        ) from error


class MetricsFile:
    """Appends one JSON object per line to folder/metrics.jsonl.

    after_step: rows beyond this step, which an interrupted run logged after its last checkpoint, are dropped. So is a
    last line that is torn, which a kill or a full disk leaves.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        self._path = folder / METRICS
        if after_step and self._path.exists():
            _cut_torn_line(self._path)
        rows = read_metrics(folder) if after_step and self._path.exists() else []
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= after_step))

    def append(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def _cut_torn_line(path: Path) -> None:
    text = path.read_bytes()
    whole, last = text[: text.rfind(b"\n") + 1], text[text.rfind(b"\n") + 1 :]
    if last:
        print(f"WARNING: {path} ends in a torn line of {len(last)} bytes, which is cut", flush=True)
        os.truncate(path, len(whole))


def as_text(ranks: Iterable[int]) -> str:
    """Ranks of a process group: "0-3", or "0,2" where they do not follow each other."""
    ranks = sorted(ranks)
    if ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def environment(device: torch.device, world_size: int, process_gib: float | None) -> dict[str, Any]:
    """What is needed to run this again: command, versions, device, commit of this source (None if unknown)."""
    on_gpu = device.type == "cuda"
    return {
        "command": [sys.executable, *sys.argv],
        "world_size": world_size,
        "process_gib": process_gib,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "device_type": device.type,
        "cpu_cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
