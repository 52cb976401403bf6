"""Several runs beside each other: one table, and a plot of their loss curves. Reads only what the runs wrote."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, never a window
import matplotlib.pyplot as plt  # noqa: E402

from ds_memopt.train.record import read_metrics  # noqa: E402

MIB = 1024**2
_PEAKS = {"peak_allocated_gib": "allocated", "peak_rss_gib": "resident set"}


def summarize(folder: Path) -> dict[str, Any]:
    """One run in numbers: the keys are the columns of `table`.

    validation_loss and accuracy are the last ones, accuracy_before is the first; None if there is none. tokens_per_s is
    the median over the logged intervals without the first, which includes start-up costs. ValueError if the folder
    holds no run, or a run that has not logged yet.
    """
    validated = [row for row in read_metrics(folder) if row["validation_loss"] is not None]
    rows = _steps(folder)
    if not rows:
        raise ValueError(f"{folder} holds a run that has logged no step yet")
    settings = json.loads((folder / "resolved_config.json").read_text())
    last = rows[-1]
    accuracies = [row["validation_accuracy"] for row in validated if "validation_accuracy" in row]
    peak = next(key for key in _PEAKS if key in last)
    return {
        "run": folder.name,
        "optimizer": settings["optimizer"]["type"],
        "zero_stage": settings["zero_stage"],
        "steps": last["step"],
        "validation_loss": validated[-1]["validation_loss"] if validated else None,
        "accuracy_before": accuracies[0] if accuracies else None,
        "accuracy": accuracies[-1] if accuracies else None,
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows[1:] or rows),
        "peak_gib": max(row[peak] for row in rows),
        "peak_of": _PEAKS[peak],
        "optimizer_state_bytes_per_parameter": last["optimizer_state_bytes_per_parameter"],
        "bytes_sent_per_step": last["bytes_sent_per_step"],
    }


def table(folders: list[Path]) -> str:
    """One column per run, as an aligned Markdown table, which can be read as it is."""
    runs = [summarize(folder) for folder in folders]
    peaks = " / ".join(sorted({run["peak_of"] for run in runs}))
    lines = [
        ["", *(run["run"] for run in runs)],
        None,
        ["optimizer", *(run["optimizer"] for run in runs)],
        ["ZeRO stage", *(str(run["zero_stage"]) for run in runs)],
        ["steps", *(str(run["steps"]) for run in runs)],
        ["final validation loss", *(_number(run["validation_loss"], ".4f") for run in runs)],
        ["tokens/s", *(_number(run["tokens_per_s"], ".0f") for run in runs)],
        [f"peak memory of a rank, GiB ({peaks})", *(_number(run["peak_gib"], ".3f") for run in runs)],
        [
            "optimizer-state bytes/parameter",
            *(_number(run["optimizer_state_bytes_per_parameter"], ".3f") for run in runs),
        ],
        ["sent per rank and step, MiB", *(_number(run["bytes_sent_per_step"] / MIB, ".2f") for run in runs)],
    ]
    if any(run["accuracy"] is not None for run in runs):
        lines[6:6] = [
            ["validation accuracy before", *(_number(run["accuracy_before"], ".4f") for run in runs)],
            ["final validation accuracy", *(_number(run["accuracy"], ".4f") for run in runs)],
        ]
    widths = [max(len(cell) for cell in column) for column in zip(*filter(None, lines), strict=True)]
    lines[1] = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def _steps(folder: Path) -> list[dict[str, Any]]:
    """The run's rows but the one before training, which has validation figures alone."""
    return [row for row in read_metrics(folder) if row["step"]]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(folders: list[Path], path: Path) -> None:
    """Write a PNG with the training loss (thin) and validation loss (markers) of each run over the tokens seen."""
    figure, (whole, end) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    runs = [summarize(folder) for folder in folders]
    distinct = len({run["optimizer"] for run in runs}) == len(runs)
    for axes, first in ((whole, 0.0), (end, 0.5)):
        for index, (folder, run) in enumerate(zip(folders, runs, strict=True)):
            color = f"C{index}"
            rows = _steps(folder)
            rows = [row for row in rows if row["step"] > first * rows[-1]["step"]]
            validated = [row for row in rows if row["validation_loss"] is not None]
            name = run["optimizer"] if distinct else f"{run['optimizer']} ({run['run']})"
            axes.plot(
                _millions(rows), [r["loss"] for r in rows], color=color, lw=1, alpha=0.45, label=f"{name}, training"
            )
            losses = [r["validation_loss"] for r in validated]
            style = {"marker": "os^Dv"[index % 5], "ms": 5, "ls": ("-", "--", ":", "-.")[index % 4], "lw": 1.8}
            axes.plot(_millions(validated), losses, color=color, label=f"{name}, validation", **style)
        axes.set_xlabel("tokens seen (millions)")
        axes.grid(alpha=0.3)
    whole.set_title("whole run")
    whole.set_ylabel("cross-entropy loss (nats per token)")
    end.set_title("second half")
    whole.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _millions(rows: list[dict[str, Any]]) -> list[float]:
    return [row["tokens"] / 1e6 for row in rows]
