"""Writing and reading what runs and sweeps leave in their folders. What is in the files: `results.schema`."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch

from ds_memopt.results.schema import PEAKS, CaseResult, Environment, MetricsRow, ValidationRow

METRICS = "metrics.jsonl"
RESULTS = "results.jsonl"
PACKAGES = ("ds_memopt", "torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


def first_free(stem: str | Path) -> Path:
    """The first of <stem>-1, <stem>-2, ... that does not exist."""
    candidates = (Path(f"{stem}-{number}") for number in itertools.count(1))
    return next(candidate for candidate in candidates if not candidate.exists())


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


def read_metrics(folder: Path, damaged: list[str] | None = None) -> list[MetricsRow]:
    """The rows of folder/metrics.jsonl, of which one of step 0 is a mere ValidationRow.

    damaged: takes a sentence for each row that is not whole, which is left out.

    ValueError if the file is missing, and without `damaged` for a line that is no row.
    """
    return _read_lines(folder / METRICS, _has_step if damaged is None else _is_whole, damaged)


def read_results(folder: Path, damaged: list[str] | None = None) -> dict[str, CaseResult]:
    """The cases of the sweep in a folder, by name; the last line of a case counts. damaged: as `read_metrics`."""
    return {line["case"]: line for line in _read_lines(folder / RESULTS, _is_case, damaged)}


def setting_of(result: CaseResult) -> tuple[str, int]:
    """What a case has beside its micro-batch: optimizer, by the name of the file if it is one, with options; stage."""
    optimizer = Path(result["optimizer"].removesuffix(".json")).name
    return f"{optimizer} {result.get('options', '')}".rstrip(), result["zero_stage"]


def write_results(folder: Path, results: Iterable[CaseResult]) -> None:
    write_text(folder / RESULTS, "".join(json.dumps(result) + "\n" for result in results))


def _read_lines(path: Path, is_row: Callable[[Any], bool], damaged: list[str] | None) -> list[Any]:
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


def _has_step(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int)


def _is_whole(row: Any) -> bool:
    """Whether a row holds what a report needs, in its types."""
    if not _has_step(row) or not ValidationRow.__required_keys__ <= row.keys():
        return False
    needed = {"tokens"}
    if row["step"]:
        peak = next((key for key in PEAKS if key in row), "peak")
        needed = MetricsRow.__required_keys__ - {"validation_loss"} | {peak}
    if any(row.get(key) is None for key in needed):
        return False
    kinds = get_type_hints(MetricsRow)
    return all(value is None or _fits(value, kinds[key]) for key, value in row.items() if key in kinds)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has one of the types that `MetricsRow` names."""
    if kind is str:
        return isinstance(value, str)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(one, float) for one in value.values())
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_case(line: Any) -> bool:
    kinds = get_type_hints(CaseResult)
    return isinstance(line, dict) and all(isinstance(line.get(key), kinds[key]) for key in CaseResult.__required_keys__)


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

    def append(self, row: ValidationRow) -> None:
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


def environment(device: torch.device, world_size: int, process_gib: float | None) -> Environment:
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
