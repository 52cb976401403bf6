"""Pre-train the same model with every method, three seeds each, and show the validation losses beside each other.

    python launch/experiments/evidence.py --jobs 2 --dtype bf16 --attention eager --compile
    python launch/experiments/evidence.py --jobs 2 --output_dir runs/longer --steps 5000 --sweep_steps 1000 \
        --methods AdamMini GWT-2 "GWT-2 + AdamMini" BAdam --save_interval 500 --keep_checkpoints 1 \
        --dtype bf16 --attention eager --compile

The second asks whether the gap to AdamW closes over ten times the tokens; started again, it goes on.

AdamW's learning rate is swept over four values with the first seed, and the others' over three; each method then
runs all seeds at its best. Runs are single processes of launch/pretrain.py, which gets all other options; finished
ones are kept and not run again. Writes evidence.md and evidence.png into the output folder.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator  # noqa: E402
from runner import Runner, Trial, load_config  # noqa: E402

from ds_memopt.results.comparison import summarize  # noqa: E402
from ds_memopt.results.record import read_metrics  # noqa: E402

ADAMW_LRS = (2.5e-4, 5e-4, 1e-3, 2e-3)
BADAM = {"switch_every": 12, "include_embedding": True, "include_lm_head": True}
"""Short visits: each of the 8 blocks is visited 5 times in 500 steps."""


def methods(adamw_lr: float) -> dict[str, tuple[str, dict, tuple[float, ...]]]:
    """Name -> type, hyper-parameters, lrs to try. GWT's matrices see lr * scale, its other weights dense_lr."""
    gwt = {"scale": 0.25, "dense_lr": adamw_lr}
    rates = (2 * adamw_lr, 4 * adamw_lr, 8 * adamw_lr)
    return {
        "AdamMini": ("AdamMini", {}, (adamw_lr, adamw_lr / 2, adamw_lr / 4)),
        "GWT-2": ("GWT", gwt | {"level": 2}, rates),
        "GWT-3": ("GWT", gwt | {"level": 3}, rates),
        "GWT-2 + AdamMini": ("GWT", gwt | {"level": 2, "base": "adam_mini"}, rates),
        "BAdam": ("BAdam", BADAM, (adamw_lr, 2 * adamw_lr, 4 * adamw_lr)),
    }


class Evidence:
    def __init__(self, runner: Runner, options: list[str], sweep_steps: int | None) -> None:
        self._runner, self._options, self._sweep_steps = runner, options, sweep_steps

    def run(self, runs: list[tuple[str, str, dict, float, int]]) -> list[Path]:
        """Run (name, type, hyper-parameters, lr, seed) each; returns their folders."""
        return self._runner.run([self._describe(*run) for run in runs])

    def best(self, name: str, kind: str, params: dict, lrs: tuple[float, ...]) -> float:
        """The learning rate with the lowest final validation loss at the first seed."""
        trials = [self._describe(name, kind, params, lr, 0) for lr in lrs]
        if self._sweep_steps:
            steps = str(self._sweep_steps)
            trials = [t._replace(name=f"{t.name}-{steps}steps", options=[*t.options, "--steps", steps]) for t in trials]
        folders = self._runner.run(trials)
        return min(zip(folders, lrs, strict=True), key=lambda pair: summarize(pair[0]).validation_loss)[1]

    def _describe(self, name: str, kind: str, params: dict, lr: float, seed: int) -> Trial:
        config = load_config("zero2_adamw", **({"torch_adam": True} if kind == "AdamW" else {}), **params)
        config["optimizer"]["type"] = kind
        options = ["--lr", f"{lr:g}", "--seed", str(seed), "--save_interval", "0", *self._options]
        return Trial(f"{name.replace(' ', '')}-lr{lr:g}-seed{seed}", "pretrain.py", config, options)


def table(results: dict[str, tuple[tuple[float, ...], float, list[Path]]]) -> str:
    lines = [
        "| method | lr tried | lr used | validation loss, mean | lowest to highest | state bytes/parameter |",
        "|---|---|---|---|---|---|",
    ]
    for name, (tried, lr, folders) in results.items():
        runs = [summarize(folder) for folder in folders]
        losses = [run.validation_loss for run in runs]
        lines.append(
            f"| {name} | {', '.join(f'{rate:g}' for rate in tried)} | {lr:g} | {statistics.mean(losses):.4f} "
            f"| {min(losses):.4f} to {max(losses):.4f} | {runs[0].optimizer_state_bytes_per_parameter:.3f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, tuple[tuple[float, ...], float, list[Path]]], path: Path) -> None:
    """Validation loss over tokens, the mean of the seeds and a band from the lowest to the highest; below, each
    method's distance to AdamW, seed by seed."""
    figure, (above, below) = plt.subplots(2, figsize=(8, 8), layout="constrained", sharex=True)
    reference = _losses(results["AdamW"][2])
    for name, (_, lr, folders) in results.items():
        index = ["AdamW", *methods(1.0)].index(name)
        losses, style = _losses(folders), {"marker": "os^DvP"[index], "ms": 4, "color": f"C{index}"}
        gaps = {at: [a - b for a, b in zip(values, reference[at], strict=True)] for at, values in losses.items()}
        for axes, values in ((above, losses), (below, gaps)):
            axes.plot(list(values), [statistics.mean(v) for v in values.values()], label=f"{name}, lr {lr:g}", **style)
            lowest, highest = ([end(v) for v in values.values()] for end in (min, max))
            axes.fill_between(list(values), lowest, highest, alpha=0.2, color=style["color"])
    above.set_ylabel("validation loss (nats per token)")
    below.set_ylabel("validation loss above AdamW's\n(logarithmic beyond 0.1)")
    below.set_yscale("symlog", linthresh=0.1, linscale=2)  # small gaps count, and BAdam's is large
    below.yaxis.set_major_locator(FixedLocator([-0.1, -0.05, -0.02, 0, 0.02, 0.05, 0.1, 0.2, 0.5, 1]))
    below.yaxis.set_major_formatter("{x:g}")
    below.set_xlabel("tokens seen (millions)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend()
    figure.savefig(path, dpi=150)


def _losses(folders: list[Path]) -> dict[float, list[float]]:
    """By millions of tokens the validation loss of each run."""
    losses: dict[float, list[float]] = {}
    for folder in folders:
        for row in read_metrics(folder):
            if row["validation_loss"] is not None:
                losses.setdefault(row["tokens"] / 1e6, []).append(row["validation_loss"])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=methods(1.0), default=list(methods(1.0)), help="beside AdamW")
    parser.add_argument(
        "--sweep_steps", type=int, help="of the runs that choose a learning rate; default: as the others"
    )
    arguments, options = parser.parse_known_args()  # the rest goes to launch/pretrain.py
    runner = Evidence(Runner(arguments.output_dir, arguments.jobs), options, arguments.sweep_steps)

    adamw_lr = runner.best("AdamW", "AdamW", {}, ADAMW_LRS)
    chosen = {"AdamW": ("AdamW", {}, ADAMW_LRS, adamw_lr)}
    for name in arguments.methods:
        kind, params, lrs = methods(adamw_lr)[name]
        chosen[name] = kind, params, lrs, runner.best(name, kind, params, lrs)
    seeds = range(arguments.seeds)
    folders = runner.run([(n, kind, params, lr, s) for s in seeds for n, (kind, params, _, lr) in chosen.items()])
    results = {name: (lrs, lr, folders[i :: len(chosen)]) for i, (name, (_, _, lrs, lr)) in enumerate(chosen.items())}
    (arguments.output_dir / "evidence.md").write_text(table(results) + "\n")
    plot(results, arguments.output_dir / "evidence.png")
    print(table(results), f"\nplot: {arguments.output_dir / 'evidence.png'}")


if __name__ == "__main__":
    main()
