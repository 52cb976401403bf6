"""Many short runs, one for each optimizer, ZeRO stage, options and micro-batch: what is fastest, and what fits."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ds_memopt.engines.processes import remove_shared_memory
from ds_memopt.optimizers import method_of
from ds_memopt.results.comparison import steady, steps, summarize
from ds_memopt.results.record import RESULTS, read_json, read_results, setting_of, write_json, write_results
from ds_memopt.results.schema import FAILED, OK, OUT_OF_MEMORY, TIMEOUT, CaseResult
from ds_memopt.train.config import load_config, override_optimizer
from ds_memopt.train.launcher import free_port

SETTINGS = "sweep.json"  # what all cases of a sweep share
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc|MemoryError")
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Interrupt)\b.*)")


@dataclass(frozen=True)
class Case:
    """One run. optimizer: a type of DeepSpeed's JSON or of ours, or a ds_config whose optimizer block is taken.
    options: further words of the job's command line."""

    optimizer: str
    zero_stage: int
    micro_batch: int
    options: str = ""

    @property
    def name(self) -> str:
        further = "".join(f"-{word.removeprefix('--')}" for word in self.options.split())
        return f"{Path(self.optimizer).stem}-zero{self.zero_stage}-batch{self.micro_batch}{further}"


def ds_config(optimizer: str, zero_stage: int, configs: Path) -> dict[str, Any]:
    """The config of AdamW at this stage, in the folder `configs`, with another optimizer block."""
    config = load_config(configs / f"zero{zero_stage}_adamw.json")
    if optimizer.endswith(".json"):
        block = load_config(optimizer).get("optimizer", {})
        if "type" not in block:
            raise ValueError(f"{optimizer} has no optimizer.type: add that block, or name an optimizer type")
        return config | {"optimizer": block}
    config = override_optimizer(config, optimizer)
    config["optimizer"]["params"] |= method_of(optimizer).for_equal_lengths
    return config


def largest_that_fits(fits: Callable[[int], bool], smallest: int, largest: int) -> int | None:
    """The largest size from smallest to largest that fits, by doubling and then bisection; None if none does."""
    good, size = None, smallest
    while fits(size):
        good = size
        if good == largest:
            return good
        size = min(2 * good, largest)
    bad = size
    while good is not None and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


class Sweep:
    """Runs cases, each in a process group of its own, and keeps a `CaseResult` for each in folder/results.jsonl.

    settings: what all cases share; `--resume` needs the same. command: (case, its folder, a free port) -> the command
    that runs it, and whose job writes metrics.jsonl there. timeout: seconds that a case may take. tell: shows a line.

    ValueError if the folder holds a sweep and resume is false, or one with other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        command: Callable[[Case, Path, str], list[str]],
        timeout: float,
        resume: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._folder, self._settings, self._command = folder, settings, command
        self._timeout, self._tell = timeout, tell
        self.results: dict[str, CaseResult] = {}
        if (folder / SETTINGS).exists():
            if not resume:
                raise ValueError(f"{folder} already holds a sweep: continue it with --resume, or choose another folder")
            self._check_settings(read_json(folder / SETTINGS))
            if (folder / RESULTS).exists():
                self.results = read_results(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)

    def _check_settings(self, earlier: dict[str, Any]) -> None:
        changed = [
            f"{key} was {earlier.get(key)}, is {value}"
            for key, value in self._settings.items()
            if earlier.get(key) != value
        ]
        if changed:
            raise ValueError(f"--resume needs the settings of the sweep in {self._folder}: {'; '.join(changed)}")

    def run(self, case: Case) -> CaseResult:
        """The result of a case, which is run unless an earlier one was ok or out of memory."""
        result = self.results.get(case.name)
        if result is None or result["status"] not in (OK, OUT_OF_MEMORY):
            result = self._run(case)
            self.results[case.name] = result
            write_results(self._folder, self.results.values())
            self._tell(describe(result))
        return result

    def _run(self, case: Case) -> CaseResult:
        folder = self._folder / case.name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that did not finish
        folder.mkdir()
        port = free_port()
        command = self._command(case, folder, port)
        began = time.monotonic()
        try:
            status, reason = _execute(command, folder / "log.txt", self._timeout)
        finally:
            remove_shared_memory("*", port, "*")  # of ranks that were killed
        result: CaseResult = {
            "case": case.name,
            **asdict(case),
            "gpus": self._settings["gpus"],
            "status": status,
            "reason": reason,
            "folder": case.name,
            "command": command,
            "seconds": round(time.monotonic() - began, 1),
        }
        return result | (_figures(folder) if status == OK else {})

    def largest_micro_batch(self, optimizer: str, zero_stage: int, options: str, largest: int) -> None:
        """Find it, by running cases. A case that fails for another reason than memory ends the search."""

        def fits(size: int) -> bool:
            status = self.run(Case(optimizer, zero_stage, size, options))["status"]
            if status not in (OK, OUT_OF_MEMORY):
                raise _SearchEnded
            return status == OK

        with contextlib.suppress(_SearchEnded):
            largest_that_fits(fits, method_of(_type(optimizer)).smallest_batch, largest)


class _SearchEnded(Exception):
    pass


def run_all(
    sweep: Sweep,
    optimizers: list[str],
    stages: list[int],
    micro_batches: list[int] | None,
    largest: int,
    options: list[str],
) -> Iterator[None]:
    """Run every combination; yields after each but for micro-batches. micro_batches: None to find the largest."""
    for optimizer, stage, words in product(optimizers, stages, options):
        if micro_batches is None:
            sweep.largest_micro_batch(optimizer, stage, words, largest)
        for size in micro_batches or ():
            sweep.run(Case(optimizer, stage, size, words))
        yield


def _type(optimizer: str) -> str:
    return load_config(optimizer)["optimizer"]["type"] if optimizer.endswith(".json") else optimizer


def _execute(command: list[str], log: Path, timeout: float) -> tuple[str, str | None]:
    """Run it to its end, with all processes that it starts; returns status and reason."""
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return TIMEOUT, f"not finished after {timeout:.0f} s; its last line: {_last(_lines(log))}"
    finally:  # also if this process is interrupted, and of ranks that outlive their launcher
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code == 0:
        return OK, None
    return _why(_lines(log), code)


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _why(lines: list[str], code: int) -> tuple[str, str]:
    """Status and reason of a run that failed: the line that says it best."""
    for line in lines:
        if _NO_MEMORY.search(line):
            return OUT_OF_MEMORY, line.strip()
    errors = [match[1] for line in lines if (match := _ERROR.match(line))]
    return FAILED, f"{errors[0] if errors else _last(lines)} (exit status {code})"


def _figures(folder: Path) -> dict[str, Any]:
    """Of a finished run, over the ranks together but where the name says otherwise."""
    rows, summary = steady(steps(folder)), summarize(folder)

    def median(key: Literal["tokens_per_s", "tokens_per_s_per_gpu", "step_ms", "mfu"]) -> float | None:
        values = [row[key] for row in rows if row[key] is not None]
        return statistics.median(values) if values else None

    figures = {key: median(key) for key in ("tokens_per_s", "tokens_per_s_per_gpu", "step_ms", "mfu")}
    speeds = [row["tokens_per_s"] for row in rows]
    figures["tokens_per_s_range"] = [min(speeds), max(speeds)]
    kept = ("peak_gib", "peak_of", "bytes_sent_per_step", "optimizer_state_bytes_per_parameter")
    return figures | {key: getattr(summary, key) for key in kept}


def describe(result: CaseResult) -> str:
    """A line for the terminal."""
    if result["status"] != OK:
        return f"{result['case']}: {result['status']} after {result['seconds']:.0f} s: {result['reason']}"
    return f"{result['case']}: {result['tokens_per_s']:.0f} tokens/s, peak {result['peak_gib']:.2f} GiB"


def summary(results: dict[str, CaseResult]) -> str:
    """The fastest case of each optimizer, options and stage, beside the fastest of AdamW with any, as text."""
    best: dict[tuple[str, int], CaseResult] = {}
    for result in results.values():
        setting = setting_of(result)
        if result["status"] == OK and (setting not in best or result["tokens_per_s"] > best[setting]["tokens_per_s"]):
            best[setting] = result
    of_adamw = [result["tokens_per_s"] for (optimizer, _), result in best.items() if optimizer.split()[0] == "AdamW"]
    lines = []
    for (optimizer, stage), result in best.items():
        gain = f", {result['tokens_per_s'] / max(of_adamw):.2f} x the fastest AdamW" if of_adamw else ""
        lines.append(
            f"{optimizer} at ZeRO-{stage}: {result['tokens_per_s']:.0f} tokens/s with micro-batches of "
            f"{result['micro_batch']}{gain}"
        )
    return "\n".join(lines) or "no case was ok: see the reasons above"


def progress(combinations: Iterator[None], total: int) -> None:
    """Run them, with a progress line that tells the time left."""
    for _ in tqdm(combinations, total=total, unit="setting"):
        pass
