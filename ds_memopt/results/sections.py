"""What a report says about runs, a section for each question. What was not recorded is left out, with a note."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_memopt.measure import GIB, MIB, OTHER, PHASES
from ds_memopt.results import plots
from ds_memopt.results.comparison import Summary, figures, number, peak_gib, steady
from ds_memopt.results.plots import PROCESS, REST, UNDIVIDED
from ds_memopt.results.record import setting_of
from ds_memopt.results.schema import CaseResult, Environment, MetricsRow

_FIRST, _LAST = [PROCESS, "weights", "masters", "gradients"], [REST, UNDIVIDED]  # of the parts of a bar
_ONE_BAR = "no parts recorded, so it is drawn as one bar"
_TOO_LARGE = "the parts add up to more than the peak, so it is drawn as one bar"
_OF_PEAKS = "The peak is that of the rank with the largest; its parts, but the rest, are rank 0's in that interval."
_OF_SENT = "By collective, in the last logged interval."
_OF_TIMES = "Of rank 0, in the logged interval with the median step time."
_LARGEST = " (max)"
_RESERVED = "peak reserved by PyTorch, GiB"
_NO_PROCESS = f'the process was not measured before the model, so it is part of "{REST}"'


@dataclass(frozen=True)
class Run:
    """What a run wrote. settings: its resolved_config.json.

    sweep: the folder of the sweep that the run belongs to, None if to none. result: what the sweep says about the run.
    """

    name: str
    sweep: Path | None
    result: CaseResult | None
    rows: list[MetricsRow]
    summary: Summary
    settings: dict[str, Any]
    environment: Environment

    @property
    def median_step(self) -> MetricsRow:
        """The row with the median step time: a real one, so that its parts add up."""
        rows = sorted(steady(self.rows), key=lambda row: row["step_ms"])
        return rows[(len(rows) - 1) // 2]

    def median(self, key: str) -> float | None:
        values = [row[key] for row in steady(self.rows) if row.get(key) is not None]
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Failure:
    """A case that left no figures. sweep, result: as in `Run`."""

    name: str
    sweep: Path | None
    result: CaseResult | None
    status: str
    reason: str | None


@dataclass
class Section:
    """A part of the page: sentences, plot, notes, table. The first column of the table names the row."""

    title: str
    sentences: list[str] = field(default_factory=list)
    image_name: str | None = None
    image: bytes | None = None
    notes: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def all_sections(runs: Sequence[Run], failures: Sequence[Failure]) -> Iterator[Section]:
    if runs:
        yield _figures(runs)
    sweeps = list(dict.fromkeys(case.sweep for case in (*runs, *failures) if case.sweep))
    for index, sweep in enumerate(sweeps, start=1):
        name = "micro_batch.png" if len(sweeps) == 1 else f"micro_batch-{index}.png"
        yield _sweep([r for r in runs if r.sweep == sweep], [f for f in failures if f.sweep == sweep], sweep.name, name)
    if runs:
        yield _speed(runs)
        yield _peaks(runs)
        yield _sent(runs)
        yield _losses(runs)
        yield _stacked(runs, "Time of a step", _OF_TIMES, "step_time.png", "ms", ".1f", _times)
        yield _versions(runs)


def _figures(runs: Sequence[Run]) -> Section:
    rank = _rank(runs)
    largest = _largest(runs)
    columns = {
        f"{rank}s": [number(run.environment.get("world_size"), "") for run in runs],
        "micro-batch": [
            number(run.settings.get("micro_batch"), "") + (_LARGEST if run in largest else "") for run in runs
        ],
        "tokens per sequence": [number(run.settings.get("seq_length"), "") for run in runs],
        "dtype": [number(run.settings.get("dtype"), "") for run in runs],
        **figures([run.summary for run in runs]),
        f"tokens/s per {rank}": [number(run.median("tokens_per_s_per_gpu"), ".0f") for run in runs],
        "step, ms": [number(run.median_step["step_ms"], ".1f") for run in runs],
        "MFU": [number(run.median("mfu"), ".1%") for run in runs],
        _RESERVED: [number(run.rows[-1].get("peak_reserved_gib"), ".3f") for run in runs],
    }
    if rank == "CPU rank":
        del columns[_RESERVED]
    filled = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    missing = [name for name in columns if name not in filled]
    formulas = defaultdict(list)
    for run in runs:
        if run.settings.get("mfu"):
            formulas[run.settings["mfu"]].append(run.name)
    notes = _notes(formulas, runs)
    if largest:
        notes.append(f"{_LARGEST.strip()}: the largest micro-batch of its sweep, optimizer and stage that ran.")
    if missing:
        notes.append(f"Not recorded by any run: {', '.join(missing)}.")
    return Section(
        "Figures",
        [
            f"Tokens/s are those of all {rank}s together unless the column says otherwise. Speeds and times are "
            "medians over the logged intervals without the first, which includes start-up."
        ],
        notes=notes,
        header=["run", *filled],
        rows=[[run.name, *cells] for run, cells in zip(runs, zip(*filled.values(), strict=True), strict=True)],
    )


def _sweep(runs: Sequence[Run], failures: Sequence[Failure], name: str, image_name: str) -> Section:
    """Of each setting the largest micro-batch that ran and the best speed, and gains over AdamW."""
    speeds: dict[tuple[str, int], dict[int, float]] = {setting_of(case.result): {} for case in (*runs, *failures)}
    for run in runs:
        speeds[setting_of(run.result)][run.result["micro_batch"]] = run.summary.tokens_per_s
    rows = []
    for (optimizer, stage), of_batch in speeds.items():
        largest = max(of_batch, default=0)
        best = max(of_batch, key=of_batch.get, default=None)
        failed = [failure for failure in failures if setting_of(failure.result) == (optimizer, stage)]
        beyond = [failure for failure in failed if failure.result["micro_batch"] > largest]
        next_one = min(beyond, key=lambda failure: failure.result["micro_batch"], default=None)
        rows.append([
            f"{optimizer}, ZeRO-{stage}",
            str(largest or "none"),
            number(of_batch.get(largest), ".0f"),
            number(of_batch.get(best), ".0f"),
            number(best, ""),
            f"{next_one.result['micro_batch']}: {next_one.status}" if next_one else "-",
        ])  # fmt: skip
    ran = {setting: of_batch for setting, of_batch in speeds.items() if of_batch}
    several = any(len(of_batch) > 1 for of_batch in ran.values())
    return Section(
        f"Sweep {name}",
        [f"{len(runs)} of {len(runs) + len(failures)} cases ran.", *_gains(speeds)],
        image_name=image_name,
        image=plots.png(plots.speed_by_batch(ran)) if several else None,
        header=["", "largest micro-batch that ran", "tokens/s there", "best tokens/s", "at micro-batch",
                "next that did not run"],
        rows=rows,
    )  # fmt: skip


def _gains(speeds: Mapping[tuple[str, int], Mapping[int, float]]) -> Iterator[str]:
    """The best speed of each optimizer, with its options, over AdamW's with any, in words."""
    best: dict[str, tuple[float, str]] = {}
    for (optimizer, stage), of_batch in speeds.items():
        for batch, speed in of_batch.items():
            best[optimizer] = max(
                best.get(optimizer, (0.0, "")), (speed, f"{speed:,.0f} at ZeRO-{stage}, micro-batch {batch}")
            )
    adamw = max((name for name in best if name.split()[0] == "AdamW"), key=best.get, default=None)
    if adamw is None:
        yield "No case of AdamW ran, so there is nothing to measure a gain against."
        return
    base, base_text = best.pop(adamw)
    for optimizer, (speed, text) in best.items():
        yield f"{optimizer} trains {speed / base:.2f} times as many tokens/s as {adamw}: {text}, against {base_text}."


def _speed(runs: Sequence[Run]) -> Section:
    rank = _rank(runs)
    total, each = [run.summary.tokens_per_s for run in runs], [run.median("tokens_per_s_per_gpu") for run in runs]
    figure = plots.speed(
        [run.name for run in runs],
        [run.summary.optimizer for run in runs],
        {f"all {rank}s together": total, f"per {rank}": each},
    )
    return Section("Tokens per second", image_name="tokens_per_s.png", image=plots.png(figure))


def _losses(runs: Sequence[Run]) -> Section:
    notes: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        if run.summary.validation_loss is None:
            notes["no validation loss recorded"].append(run.name)
    figure = plots.losses(
        [run.name for run in runs], [run.summary.optimizer for run in runs], [run.rows for run in runs]
    )
    return Section("Loss", image_name="loss.png", image=plots.png(figure), notes=_notes(notes, runs))


def _sent(runs: Sequence[Run]) -> Section:
    """The stacked section, with the bytes sent within each process group beside."""
    size, unit = (GIB, "GiB") if max(run.summary.bytes_sent_per_step for run in runs) >= GIB else (MIB, "MiB")

    def parts(run: Run, notes: dict[str, list[str]]) -> dict[str, float]:
        sent = run.rows[-1].get("sent_by_collective")
        if sent is None:
            notes[_ONE_BAR].append(run.name)
            sent = {UNDIVIDED: run.summary.bytes_sent_per_step}
        return {collective: count / size for collective, count in sent.items()}

    section = _stacked(runs, "Sent per rank and step", _OF_SENT, "sent.png", unit, ".4g", parts)
    by_group = [run.rows[-1].get("sent_by_group") or {} for run in runs]
    for group in dict.fromkeys(group for of_run in by_group for group in of_run):
        section.header.append(f"of it in group {group}")
        for row, of_run in zip(section.rows, by_group, strict=True):
            row.append(f"{of_run[group] / size:.4g}" if group in of_run else "-")
    return section


def _stacked(
    runs: Sequence[Run],
    title: str,
    sentence: str,
    image_name: str,
    unit: str,
    form: str,
    divide: Callable[[Run, dict[str, list[str]]], dict[str, float]],
) -> Section:
    """A bar for each run, divided into the parts that `divide` finds; it notes what it misses: remark -> runs."""
    notes: dict[str, list[str]] = defaultdict(list)
    found = [divide(run, notes) for run in runs]
    kinds = list(dict.fromkeys(kind for parts in found for kind in parts))
    between = [kind for kind in kinds if kind not in _FIRST + _LAST]
    kinds = [kind for kind in (*_FIRST, *between, *_LAST) if kind in kinds]
    section = Section(
        title,
        [sentence],
        notes=_notes(notes, runs),
        header=[f"run ({unit})", *kinds, "sum"],
        rows=[
            [run.name, *(number(of_run.get(kind), form) for kind in kinds), format(sum(of_run.values()), form)]
            for run, of_run in zip(runs, found, strict=True)
        ],
    )
    if any(sum(parts.values()) for parts in found):
        figure = plots.stacked([run.name for run in runs], kinds, found, title, unit)
        section.image_name, section.image = image_name, plots.png(figure)
    else:
        section.notes.append("No plot: all figures are 0.")
    return section


def _peaks(runs: Sequence[Run]) -> Section:
    of = " / ".join(sorted({run.summary.peak_of for run in runs}))
    return _stacked(runs, f"Peak memory of a rank ({of})", _OF_PEAKS, "memory.png", "GiB", ".3f", _memory)


def _memory(run: Run, notes: dict[str, list[str]]) -> dict[str, float]:
    """Parts of the peak, from the row where it was reached."""
    row = max(run.rows, key=peak_gib)
    peak, held, process = peak_gib(row), row.get("held_gib"), run.environment.get("process_gib")
    if not held:
        notes[_ONE_BAR].append(run.name)
        return {UNDIVIDED: peak}
    known = held if process is None else {PROCESS: process, **held}
    rest = peak - sum(known.values())
    if rest < 0:
        notes[_TOO_LARGE].append(run.name)
        return {UNDIVIDED: peak}
    if process is None and run.summary.peak_of == "resident set":
        notes[_NO_PROCESS].append(run.name)
    return {**known, REST: rest}


def _times(run: Run, notes: dict[str, list[str]]) -> dict[str, float]:
    row = run.median_step
    parts = {name: row.get(f"{name}_ms") for name in (*PHASES, OTHER)}
    if None in parts.values():
        notes[_ONE_BAR].append(run.name)
        return {UNDIVIDED: row["step_ms"]}
    return parts


def _versions(runs: Sequence[Run]) -> Section:
    packages = ("torch", "deepspeed", "transformers", "ds_memopt")
    rows = []
    for run in runs:
        seen, ranks = run.environment, run.environment.get("world_size")
        on_cpu = seen.get("device_type") == "cpu"
        rows.append([
            run.name,
            seen.get("python") or "-",
            *(seen.get("packages", {}).get(name, "-") for name in packages),
            seen.get("cuda") or "-",
            seen.get("device") or "-",
            f"0 ({ranks} on CPU)" if on_cpu else number(ranks, ""),
            (seen.get("git_commit") or "-")[:12],
        ])  # fmt: skip
    return Section("Versions", header=["run", "Python", *packages, "CUDA", "device", "GPUs", "commit"], rows=rows)


def _notes(remarks: Mapping[str, list[str]], runs: Sequence[Run]) -> list[str]:
    """A line for each remark, with the names of the runs that it is about, or of the others if these are fewer."""
    lines = []
    for remark, names in remarks.items():
        others = [run.name for run in runs if run.name not in names]
        if not others:
            whom = "All runs"
        elif len(others) < len(names):
            whom = f"All runs but {', '.join(others)}"
        else:
            whom = ", ".join(names)
        lines.append(f"{whom}: {remark}.")
    return lines


def _rank(runs: Sequence[Run]) -> str:
    """What a rank of these runs is."""
    kinds = {"GPU" if run.summary.peak_of == "allocated" else "CPU rank" for run in runs}
    return kinds.pop() if len(kinds) == 1 else "GPU or CPU rank"


def _largest(runs: Sequence[Run]) -> list[Run]:
    """Of each sweep and setting the run with the largest micro-batch."""
    largest: dict[tuple, Run] = {}
    for run in runs:
        if run.sweep:
            rival = largest.setdefault((run.sweep, *setting_of(run.result)), run)
            if run.result["micro_batch"] > rival.result["micro_batch"]:
                largest[run.sweep, *setting_of(run.result)] = run
    return list(largest.values())
