"""Several runs beside each other: one table, and a plot of their loss curves. Reads only what the runs wrote."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_memopt.measure import GIB, MIB
from ds_memopt.results import plots
from ds_memopt.results.record import read_json, read_metrics
from ds_memopt.results.schema import PEAKS, MetricsRow

STORED = ("weights", "masters", "gradients")
"""Kinds of what a rank holds from step to step; the others are states of the optimizer."""


@dataclass(frozen=True)
class Summary:
    """A run in numbers; units as in `MetricsRow`, whose names the fields have.

    validation_loss and accuracy are the last ones, accuracy_before is the first; None if there is none. tokens_per_s
    and bytes_sent_per_step: medians over the `steady` rows. peak_gib: the highest; peak_of: what it is. held_gib and
    optimizer_state_bytes_per_parameter: the most. What else there is: of the last row.
    """

    run: str
    optimizer: str
    zero_stage: int | str
    steps: int
    validation_loss: float | None
    accuracy_before: float | None
    accuracy: float | None
    tokens_per_s: float
    peak_gib: float
    peak_of: str
    optimizer_state_bytes_per_parameter: float
    bytes_sent_per_step: int
    held_gib: dict[str, float] | None


def summarize(folder: Path, damaged: list[str] | None = None) -> Summary:
    """damaged: as in `read_metrics`. ValueError if the folder holds no run, or a run that has not logged yet."""
    logged = read_metrics(folder, damaged)
    validated = [row for row in logged if row["validation_loss"] is not None]
    rows = [row for row in logged if row["step"]]
    if not rows:
        raise ValueError(f"{folder} holds a run that has logged no step yet")
    settings = read_json(folder / "resolved_config.json")
    last = rows[-1]
    accuracies = [row["validation_accuracy"] for row in validated if "validation_accuracy" in row]
    return Summary(
        run=folder.name,
        optimizer=settings["optimizer"]["type"],
        zero_stage=settings["zero_stage"],
        steps=last["step"],
        validation_loss=validated[-1]["validation_loss"] if validated else None,
        accuracy_before=accuracies[0] if accuracies else None,
        accuracy=accuracies[-1] if accuracies else None,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in steady(rows)),
        peak_gib=max(map(peak_gib, rows)),
        peak_of=next(what for key, what in PEAKS.items() if key in last),
        # Where blocks take turns, a new one has no state yet.
        optimizer_state_bytes_per_parameter=max(row["optimizer_state_bytes_per_parameter"] for row in rows),
        bytes_sent_per_step=int(statistics.median(row["bytes_sent_per_step"] for row in steady(rows))),
        held_gib=max(
            (row["held_gib"] for row in rows if "held_gib" in row), key=lambda h: sum(h.values()), default=None
        ),
    )


def table(folders: list[Path]) -> str:
    """One column per run, as an aligned Markdown table, which can be read as it is."""
    runs = [summarize(folder) for folder in folders]
    lines = [["", *(run.run for run in runs)], *([name, *cells] for name, cells in figures(runs).items())]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def figures(runs: list[Summary]) -> dict[str, list[str]]:
    """What `summarize` gives, as text: name of a figure -> one cell for each run, "-" where there is none."""
    peaks = " / ".join(sorted({run.peak_of for run in runs}))
    columns = {
        "optimizer": ("optimizer", ""),
        "ZeRO stage": ("zero_stage", ""),
        "steps": ("steps", ""),
        "final validation loss": ("validation_loss", ".4f"),
        "validation accuracy before": ("accuracy_before", ".4f"),
        "final validation accuracy": ("accuracy", ".4f"),
        "tokens/s": ("tokens_per_s", ".0f"),
        f"peak memory of a rank, GiB ({peaks})": ("peak_gib", ".3f"),
        "optimizer-state bytes/parameter": ("optimizer_state_bytes_per_parameter", ".3f"),
    }
    if all(run.accuracy is None for run in runs):
        del columns["validation accuracy before"], columns["final validation accuracy"]
    cells = {name: [number(getattr(run, field), form) for run in runs] for name, (field, form) in columns.items()}
    for kind in (*STORED, "states") if any(run.held_gib for run in runs) else ():
        cells[f"{kind} of rank 0, MiB"] = [number(_held_mib(run, kind), ".2f") for run in runs]
    return cells | {"sent per rank and step, MiB": [f"{run.bytes_sent_per_step / MIB:.2f}" for run in runs]}


def _held_mib(run: Summary, kind: str) -> float | None:
    """Of a kind in STORED, or of all states of the optimizer; None where the run did not tell, as older ones."""
    if run.held_gib is None:
        return None
    kinds = [kind] if kind in STORED else run.held_gib.keys() - {*STORED}
    return sum(run.held_gib.get(each, 0.0) for each in kinds) * GIB / MIB


def steps(folder: Path, damaged: list[str] | None = None) -> list[MetricsRow]:
    """The run's rows but the one before training, which has validation figures alone. damaged: as `read_metrics`."""
    return [row for row in read_metrics(folder, damaged) if row["step"]]


def steady(rows: list[MetricsRow]) -> list[MetricsRow]:
    """The rows of `steps` without the first, which includes start-up costs, if there are others."""
    return rows[1:] or rows


def peak_gib(row: MetricsRow) -> float:
    return next(row[key] for key in PEAKS if key in row)


def number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(folders: list[Path], path: Path) -> None:
    """Write a PNG with the training loss and validation loss of each run over the tokens seen."""
    runs = [summarize(folder) for folder in folders]
    optimizers = [run.optimizer for run in runs]
    distinct = len(set(optimizers)) == len(runs)
    names = optimizers if distinct else [f"{run.optimizer} ({run.run})" for run in runs]
    path.write_bytes(plots.png(plots.losses(names, optimizers, [steps(folder) for folder in folders])))
