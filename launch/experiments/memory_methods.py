"""Fine-tune the same model with each method that saves memory and with AdamW, three seeds each, on rows of which some
are long; show accuracy, time and memory beside each other.

    python launch/experiments/memory_methods.py --jobs 2

Pre-trains a byte-level Llama of 1.2 M parameters on sequences of 512 bytes (once), and makes a task whose prompts have
up to 511 bytes (make_task.py --long_tail). Every method tries some hyper-parameters with the first seed, and the best
two with all seeds; those of the higher mean accuracy are shown. Runs are single processes of launch/finetune.py;
finished ones are kept and not run again. Writes table.md into the output folder.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from runner import LAUNCH, Runner, Trial, load_config

from ds_memopt.results.comparison import steps as logged_steps
from ds_memopt.results.comparison import summarize

STEPS = 80
SEQ_LENGTH = 512
ROWS = ["--micro_batch", "8", "--accumulation", "1"]
HALVES = {"length_threshold": 128, "zo_batch": 4, "fo_batch": 4}
CHECKPOINTING = "IPSGD, activation checkpointing"


class Method(NamedTuple):
    """config: of ds_configs. tries: the optimizer's params to choose from. options: of launch/finetune.py."""

    config: str
    tries: list[dict[str, Any]]
    options: list[str]
    steps: int = STEPS


def rates(*lrs: float, **params: Any) -> list[dict[str, Any]]:
    return [{"lr": lr, **params} for lr in lrs]


METHODS = {
    "AdamW": Method("zero2_adamw", rates(3e-5, 1e-4, 3e-4, 1e-3), ROWS),
    "IPSGD": Method("zero2_ipsgd", rates(0.01, 0.03, 0.06), ROWS),
    "Addax": Method(
        "zero2_addax",
        rates(0.03, alpha=1e-3, **HALVES) + rates(0.01, 0.03, alpha=3e-3, **HALVES) + rates(0.01, alpha=1e-2, **HALVES),
        [],
    ),
    "long rows skipped": Method("zero2_addax", rates(0.01, 0.03, 0.06, alpha=0.0, **HALVES), []),
    "MeZO": Method("zero2_mezo", rates(3e-5, 1e-4, 2e-4, 4e-4), ROWS, 3 * STEPS),
}


def prepare(runner: Runner, folder: Path) -> list[str]:
    """Pre-train and make the task; returns options of launch/finetune.py that name both."""
    sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4)
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=256, max_position_embeddings=1024, rms_norm_eps=1e-5
    )
    config.save_pretrained(folder / "config")
    options = f"--model {folder / 'config'} --seq_length {SEQ_LENGTH} --micro_batch 4 --accumulation 1 --lr 2e-3"
    options += " --steps 1200 --warmup_steps 40 --validation_batches 4"
    (model,) = runner.run([Trial("pretrained", "pretrain.py", load_config("zero2_adamw"), options.split())])
    task = [sys.executable, LAUNCH / "experiments/make_task.py", "--output_dir", folder / "task"]
    subprocess.run([*task, "--long_tail", "470", "--longest", "40"], check=True)
    data = ["--data", folder / "task" / "train.jsonl", "--validation_data", folder / "task" / "valid.jsonl"]
    return list(map(str, ["--model", model, *data, "--seq_length", SEQ_LENGTH, "--save_interval", 0]))


def describe(name: str, params: dict[str, Any], seed: int, options: list[str]) -> Trial:
    method = METHODS[name]
    tried = "-".join(f"{key}{params[key]:g}" for key in ("lr", "alpha") if key in params)
    steps = ["--steps", str(method.steps), "--validation_interval", str(method.steps), "--seed", str(seed)]
    folder = f"{name.replace(' ', '_').replace(',', '')}-{tried}-seed{seed}"
    return Trial(folder, "finetune.py", load_config(method.config, **params), [*options, *method.options, *steps])


def quality(folders: list[Path]) -> tuple[float, float]:
    """Mean accuracy, and where that is the same the loss."""
    runs = [summarize(folder) for folder in folders]
    return statistics.mean(run.accuracy for run in runs), -statistics.mean(run.validation_loss for run in runs)


def seconds(folder: Path) -> float:
    """Of all steps, at the median speed: other processes may have slowed some down."""
    rows = logged_steps(folder)
    return rows[-1]["step"] * statistics.median(row["step_ms"] for row in rows) / 1000


def table(results: dict[str, tuple[dict[str, Any], list[Path]]]) -> str:
    lines = [
        "| method | lr, alpha | accuracy, mean | lowest to highest | steps | seconds | peak resident set, GiB "
        "| state bytes/parameter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (params, folders) in results.items():
        runs = [summarize(folder) for folder in folders]
        accuracies = [run.accuracy for run in runs]
        used = ", ".join(f"{params[key]:g}" for key in ("lr", "alpha") if key in params)
        lines.append(
            f"| {name} | {used} | {statistics.mean(accuracies):.4f} | {min(accuracies):.4f} to {max(accuracies):.4f} "
            f"| {runs[0].steps} | {statistics.median(map(seconds, folders)):.0f} "
            f"| {max(run.peak_gib for run in runs):.3f} | {runs[0].optimizer_state_bytes_per_parameter:.2f} |"
        )
    before = summarize(next(iter(results.values()))[1][0]).accuracy_before
    return "\n".join([*lines, "", f"Before training the accuracy is {before:.4f}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/memory_methods"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    runner = Runner(arguments.output_dir, arguments.jobs)
    options = prepare(runner, arguments.output_dir)

    def run(settings: list[tuple[str, dict[str, Any]]], seeds: int) -> list[list[Path]]:
        """The folders of each method and its params, of all seeds."""
        folders = iter(runner.run([describe(*one, seed, options) for one in settings for seed in range(seeds)]))
        return [[next(folders) for _ in range(seeds)] for _ in settings]

    tried = [(name, params) for name, method in METHODS.items() for params in method.tries]
    ranking = sorted(zip(tried, run(tried, 1), strict=True), key=lambda pair: quality(pair[1]), reverse=True)
    finalists = [one for name in METHODS for one in [entry for entry, _ in ranking if entry[0] == name][:2]]
    results = {}
    for (name, params), folders in zip(finalists, run(finalists, arguments.seeds), strict=True):
        if name not in results or quality(folders) > quality(results[name][1]):
            results[name] = params, folders
    # It computes the same as without, so it has the same learning rate.
    METHODS[CHECKPOINTING] = METHODS["IPSGD"]._replace(options=[*ROWS, "--gradient_checkpointing"])
    params = results["IPSGD"][0]
    results[CHECKPOINTING] = params, run([(CHECKPOINTING, params)], arguments.seeds)[0]
    (arguments.output_dir / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
