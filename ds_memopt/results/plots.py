"""The plots that compare runs. Of each run they know its name, its optimizer and what to draw."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ds_memopt.results.schema import MetricsRow

matplotlib.rcParams["text.parse_math"] = False  # the name of a run may hold a $

REST = "activations, buffers and the rest"
PROCESS = "the process before the model"
UNDIVIDED = "not divided"

# One meaning, one colour in all plots: what forward computes with is blue, what backward makes orange, what the
# optimizer keeps or does green, what nobody accounts for grey. From Okabe and Ito's palette for the colour-blind.
_COLORS = {
    PROCESS: "#8c8c8c",
    "weights": "#0072b2",
    "masters": "#56b4e9",
    "gradients": "#e69f00",
    "exp_avg": "#009e73",
    "exp_avg_sq": "#7fcdb0",
    REST: "#d0d0d0",
    UNDIVIDED: "#f2f2f2",
    "forward": "#0072b2",
    "backward": "#e69f00",
    "optimizer": "#009e73",
    "communication": "#cc79a7",
    "other": "#d0d0d0",
    "all_reduce": "#332288",
    "all_gather": "#44aa99",
    "reduce_scatter": "#ddcc77",
    "broadcast": "#cc6677",
}
_MORE_COLORS = ("#117733", "#999933", "#88ccee", "#aa4499", "#882255", "#661100", "#6699cc", "#b8860b")
_OPTIMIZERS = ("AdamW", "AdamMini", "GWT", "BAdam", "MeZO", "IPSGD", "Addax")  # others take the colours that are left
_MARKERS, _LINES = "os^Dv", ("-", "--", ":", "-.")


def speed(names: Sequence[str], optimizers: Sequence[str], panels: Mapping[str, Sequence[float | None]]) -> Figure:
    """A bar for each run in each panel; panels: title -> values, of which None leaves a "-"."""
    figure = _figure_for(names, legend_lines=1)
    base = _optimizer_colors(optimizers)
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        bars = axes.barh(
            range(len(names)), [value or 0 for value in values], color=[base[name] for name in optimizers], height=0.7
        )
        axes.bar_label(bars, ["-" if value is None else _number(value) for value in values], padding=4, fontsize=8)
        axes.set_title(title)
        axes.set_xlabel("tokens/s")
        _name_rows(axes, names, max((value or 0 for value in values), default=0))
    handles = [Patch(color=color, label=name) for name, color in base.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    return figure


def stacked(
    names: Sequence[str], kinds: Sequence[str], parts: Sequence[Mapping[str, float]], title: str, unit: str
) -> Figure:
    """A bar for each run, of the parts that `parts` has for it in the order of `kinds`, with their sum at its end."""
    figure = _figure_for(names, legend_lines=(len(kinds) + 4) // 5)
    axes = figure.subplots()
    palette = _kind_colors(kinds)
    sums = [sum(of_run.values()) for of_run in parts]
    begins = [0.0] * len(names)
    for kind in kinds:
        widths = [of_run.get(kind, 0.0) for of_run in parts]
        seen = max(widths) > 0.0005 * max(sums)  # what cannot be seen needs no entry in the legend
        bars = axes.barh(
            range(len(names)),
            widths,
            left=begins,
            height=0.7,
            color=palette[kind],
            edgecolor="#999999" if kind == UNDIVIDED else "white",
            hatch="///" if kind == UNDIVIDED else None,
            linewidth=0.5,
            label=kind if seen else None,
        )
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    axes.bar_label(bars, [_number(total) for total in sums], padding=4, fontsize=8)
    axes.set_title(title)
    axes.set_xlabel(unit)
    _name_rows(axes, names, max(sums))
    figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def losses(names: Sequence[str], optimizers: Sequence[str], runs: Sequence[Sequence[MetricsRow]]) -> Figure:
    """Training loss (thin) and validation loss (markers) of each run over the tokens seen, whole and second half."""
    figure = Figure(figsize=(12, 5.2 + 0.2 * (len(names) // 3)), layout="constrained")
    whole, end = figure.subplots(1, 2)
    for axes, first in ((whole, 0.0), (end, 0.5)):
        for name, style, logged in zip(names, _line_styles(optimizers), runs, strict=True):
            rows = [row for row in logged if row["step"] > first * logged[-1]["step"]]
            validated = [row for row in rows if row["validation_loss"] is not None]
            point = "." if len(rows) == 1 else ""  # a line of one point would not be seen
            axes.plot(
                _millions(rows), [r["loss"] for r in rows], color=style["color"], lw=0.9, alpha=0.55, marker=point
            )
            axes.plot(_millions(validated), [r["validation_loss"] for r in validated], **style, label=name)
        axes.set_xlabel("tokens seen (millions)")
        axes.grid(alpha=0.3)
    whole.set_title("whole run")
    whole.set_ylabel("cross-entropy loss (nats per token)")
    end.set_title("second half")
    figure.suptitle("Loss: thin lines in training, markers in validation")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, map(_wrapped, labels), loc="outside lower center", ncols=3, frameon=False)
    return figure


def speed_by_batch(cases: Mapping[tuple[str, int], Mapping[int, float]]) -> Figure:
    """Tokens/s over the micro-batch; cases: (optimizer, ZeRO stage) -> {micro-batch: tokens/s}."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    base = _optimizer_colors([optimizer for optimizer, _ in cases])
    for (optimizer, stage), speeds in cases.items():
        batches = sorted(speeds)
        style = {"color": base[optimizer], "marker": _MARKERS[stage], "ls": _LINES[stage], "ms": 6}
        axes.plot(batches, [speeds[batch] for batch in batches], **style, label=f"{optimizer}, ZeRO-{stage}")
        axes.plot(batches[-1], speeds[batches[-1]], marker="o", ms=13, mfc="none", color=base[optimizer])
    ticks = sorted({batch for speeds in cases.values() for batch in speeds})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(batch) for batch in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("micro-batch (sequences per rank and pass)")
    axes.set_ylabel("tokens/s, all ranks together")
    axes.set_title("Tokens/s by micro-batch; ringed: the largest that ran")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _figure_for(names: Sequence[str], legend_lines: int) -> Figure:
    return Figure(figsize=(10, 1.4 + 0.22 * legend_lines + 0.42 * max(len(names), 2)), layout="constrained")


def _name_rows(axes: Axes, names: Sequence[str], largest: float) -> None:
    """Runs from top to bottom, and bars from zero with room for a figure behind the longest."""
    axes.set_yticks(range(len(names)), [_wrapped(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * largest or 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _optimizer_colors(optimizers: Sequence[str]) -> dict[str, str]:
    others = (name for name in dict.fromkeys(optimizers) if name not in _OPTIMIZERS)
    places = {name: place for place, name in enumerate((*_OPTIMIZERS, *others))}
    return {name: f"C{places[name] % 10}" for name in dict.fromkeys(optimizers)}


def _line_styles(optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """Of each run: the colour of its optimizer, lighter from one run of the same to the next, with other markers."""
    base, met, styles = _optimizer_colors(optimizers), dict.fromkeys(optimizers, 0), []
    for name in optimizers:
        index, of_same = met[name], optimizers.count(name)
        met[name] += 1
        strength = 1 - 0.6 * index / max(1, of_same - 1)
        color = tuple(1 - strength * (1 - channel) for channel in colors.to_rgb(base[name]))
        styles.append({"color": color, "marker": _MARKERS[index % 5], "ms": 5, "ls": _LINES[index % 4], "lw": 1.6})
    return styles


def _kind_colors(kinds: Sequence[str]) -> dict[str, str]:
    others = sorted(set(kinds) - set(_COLORS))
    return _COLORS | {kind: _MORE_COLORS[index % len(_MORE_COLORS)] for index, kind in enumerate(others)}


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 36)


def _number(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}" if value >= 0.1 else f"{value:.2g}"


def _millions(rows: Sequence[MetricsRow]) -> list[float]:
    return [row["tokens"] / 1e6 for row in rows]
