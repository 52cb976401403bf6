"""What a run leaves in its output folder: metrics.jsonl, resolved_config.json, environment.json."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # it imports deepspeed, which takes seconds, and which reading needs not
    from ds_memopt.train.ranks import Ranks

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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of folder/metrics.jsonl. ValueError if the file is missing or a line is no JSON."""
    path = folder / METRICS
    text = _read(path)
    try:
        return [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ValueError(
            f"{path.parent} is not the folder of a run: cannot read {path.name} in it ({error.strerror})"
        ) from error


class MetricsFile:
    """Appends one JSON object per line to folder/metrics.jsonl.

    after_step: rows beyond this step, which an interrupted run logged after its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        self._path = folder / METRICS
        rows = read_metrics(folder) if after_step and self._path.exists() else []
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= after_step))

    def append(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def as_text(ranks: Iterable[int]) -> str:
    """Ranks of a process group: "0-3", or "0,2" where they do not follow each other."""
    ranks = sorted(ranks)
    if ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def environment(ranks: Ranks) -> dict[str, Any]:
    """What is needed to run this again: command, versions, device, commit of this source (None if unknown)."""
    device, on_gpu = ranks.device, ranks.device.type == "cuda"
    return {
        "command": [sys.executable, *sys.argv],
        "world_size": ranks.world_size,
        "process_gib": ranks.process_gib,
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
