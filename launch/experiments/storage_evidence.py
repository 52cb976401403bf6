"""Pre-train the same model with states and masters kept in fewer bits, three seeds each, and show what it costs.

    python launch/experiments/storage_evidence.py --jobs 2

AdamMini and AdamW, in plain PyTorch on one thread each: a Llama of 0.4 M parameters on the source text of Python's
standard library. The learning rate is tried with the first seed, fp32 weights and fp32 states, and serves every storage
of the method. Finished runs are kept and not run again. Writes storage.md and storage.png into the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from ds_memopt.kernels import codes, packed  # noqa: E402
from ds_memopt.measure import state_bytes  # noqa: E402
from ds_memopt.optimizers.adam_mini import AdamMini  # noqa: E402
from ds_memopt.optimizers.adamw import AdamW  # noqa: E402
from ds_memopt.train.data.corpus import load_corpus, train_loader, validation_batches  # noqa: E402
from ds_memopt.train.data.order import StepBatches  # noqa: E402
from ds_memopt.train.presets import build_model, parameter_groups  # noqa: E402

METHODS = {"AdamMini": AdamMini, "AdamW": AdamW}
LRS = (5e-4, 1e-3, 2e-3, 4e-3)
REMAINDER = "master_remainder"


class Kept(NamedTuple):
    """dtype: of the weights. params: of the optimizer. masters: fp32 copies beside bf16 weights, which it updates.
    forget: set remainders to zero after each step. linear: dtypes of codes that are linear ones. methods: that are run
    so. once: with the first seed only."""

    dtype: torch.dtype
    params: dict[str, str]
    masters: bool = False
    forget: bool = False
    linear: tuple[torch.dtype, ...] = ()
    methods: tuple[str, ...] = tuple(METHODS)
    once: bool = False


FP32, BF16 = torch.float32, torch.bfloat16
INT8 = {"state_dtype": "int8"}
BASELINE = "fp32 weights, fp32 states"
STORAGES = {
    BASELINE: Kept(FP32, {}),
    "fp32 weights, int8": Kept(FP32, INT8),
    "bf16 weights, fp32 masters and states": Kept(BF16, {}, masters=True, once=True),
    "bf16 weights, fp32 states, remainder16": Kept(BF16, {"masters": "remainder16"}),
    "bf16 weights, int8, remainder16": Kept(BF16, INT8 | {"masters": "remainder16"}),
    "bf16 weights, int8, remainder8": Kept(BF16, INT8 | {"masters": "remainder8"}),
    "bf16 weights, fp32 states, no remainder": Kept(BF16, {}, forget=True),
    "fp32 weights, int8, linear m": Kept(FP32, INT8, linear=(torch.int8,), methods=("AdamMini",)),
    "fp32 weights, int8, linear m and v": Kept(
        FP32, INT8, linear=(torch.int8, torch.uint8), methods=("AdamW",), once=True
    ),
}
"""AdamMini's v, one number per block, is never coded."""


class Run(NamedTuple):
    method: str
    storage: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.storage.replace(',', '').replace(' ', '_')}-lr{self.lr:g}-seed{self.seed}"


class Size(NamedTuple):
    steps: int
    hidden: int
    layers: int
    validation_rows: int
    seq_length: int = 128
    batch: int = 4


def train_into(file: Path, run: Run, size: Size) -> None:
    result = train(run, size)
    file.write_text(json.dumps(result))
    print(f"{run.name}: {result['validation_loss']:.4f}", flush=True)


def train(run: Run, size: Size) -> dict[str, Any]:
    """Losses of every 10 steps and of the held-out rows at the end, bytes per parameter, a hash of the masters."""
    kept = STORAGES[run.storage]
    corpus = load_corpus("stdlib", None, size.seq_length, 256)
    batches = StepBatches(corpus.train, size.batch, 1, 0, 1, run.seed, range(size.steps))
    model = llama(size, run.seed).to(kept.dtype)
    updated = llama(size, run.seed) if kept.masters else model
    if kept.masters:
        updated.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    optimizer = METHODS[run.method].from_model(
        updated, parameter_groups(updated, 0.1), lr=run.lr, betas=(0.9, 0.95), **kept.params
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, size.steps))
    losses = []
    with linear_codes(kept.linear) as used:
        for rows in train_loader(corpus.train, batches):
            loss = mean_loss(model, rows)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if kept.masters:
                for p, master in zip(model.parameters(), updated.parameters(), strict=True):
                    master.grad = p.grad.float()
            optimizer.step()
            schedule.step()
            model.zero_grad()
            keep(kept, model, updated, optimizer)
            losses.append(loss.item())
        assert not kept.linear or used, "the step did not take the codes of this experiment"
    held_out = validation_batches(corpus.validation, size.validation_rows, 16, 0, 1)
    with torch.no_grad():
        found = [mean_loss(model, inputs).item() for inputs, _ in held_out]
    numel = sum(p.numel() for p in model.parameters())
    weights = sum(p.nbytes for m in {model, updated} for p in m.parameters())
    return {
        "validation_loss": statistics.mean(found),
        "losses": [statistics.mean(losses[i : i + 10]) for i in range(0, len(losses), 10)],
        "bytes_per_parameter": (weights + sum(state_bytes(optimizer).values())) / numel,
        "largest_weight": max(p.abs().max().item() for p in model.parameters()),
        "masters": hash_of_masters(updated, optimizer),
    }


def llama(size: Size, seed: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        intermediate_size=3 * size.hidden,
        vocab_size=256,
        max_position_embeddings=size.seq_length,
        use_cache=False,
    )
    return build_model("", config, seed, torch.device("cpu"), partitioned=False)


def rate(step: int, steps: int) -> float:
    """Of the learning rate: warm-up over 5 % of the steps, linear decay to 0."""
    return min((step + 1) / (0.05 * steps), 1 - step / steps)


def mean_loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Per token, of logits in fp32."""
    logits = model(input_ids=rows).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def keep(kept: Kept, model: nn.Module, updated: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What the experiment does after a step that the optimizer does not."""
    if kept.masters:  # rounded as remainders round them: two bf16 numbers may be equally near
        for p, master in zip(model.parameters(), updated.parameters(), strict=True):
            p.copy_(codes.split(master, torch.int16, None)[0])
    if kept.forget:
        for state in optimizer.state.values():
            state[REMAINDER].zero_()


@torch.no_grad()
def hash_of_masters(updated: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    digest = hashlib.sha256()
    for p in updated.parameters():
        remainder = optimizer.state[p].get(REMAINDER)
        master = p.detach() if remainder is None else codes.join(p.detach(), remainder.view_as(p))
        digest.update(master.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def linear_codes(dtypes: tuple[torch.dtype, ...]) -> Iterator[list[bool]]:
    """Code c stands for scale * c / 127 or, without a sign, scale * c / 255, and rounding is random all the same.

    Gives a list that is not empty once such codes were made: fused steps would not make them.
    """
    used: list[bool] = []

    def encode(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor) -> torch.Tensor:
        if dtype not in dtypes:
            return codes.encode(values, scales, dtype, bits)
        used.append(True)
        exact = torch.where(scales > 0, values.abs() / scales, 0) * torch.iinfo(dtype).max
        code = exact.floor()
        return ((code + ((bits.float() + 0.5) / 256 < exact - code)) * values.sign()).to(dtype)

    def decode(kept: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (
            kept.float() / torch.iinfo(kept.dtype).max * scales if kept.dtype in dtypes else codes.decode(kept, scales)
        )

    plain = {"DS_MEMOPT_KERNELS": "plain"} if dtypes else {}
    with (
        mock.patch.dict(os.environ, plain),
        mock.patch.object(packed, "encode", encode),
        mock.patch.object(packed, "decode", decode),
    ):
        yield used


class Evidence:
    """Runs some at a time; results lie in `folder`, one file each."""

    def __init__(self, folder: Path, jobs: int, size: Size) -> None:
        self._folder, self._jobs, self._size = folder, jobs, size
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, runs: list[Run]) -> dict[Run, dict[str, Any]]:
        context = multiprocessing.get_context("spawn")
        missing = [run for run in runs if not self._file(run).exists()]
        with ProcessPoolExecutor(self._jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(train_into, map(self._file, missing), missing, [self._size] * len(missing)))
        return {run: json.loads(self._file(run).read_text()) for run in runs}

    def _file(self, run: Run) -> Path:
        return self._folder / f"{run.name}.json"


def table(results: dict[Run, dict[str, Any]], seeds: range) -> str:
    """Bytes of weights, masters and states. Differences are to the baseline's run with the same method and seed."""
    lines = [
        "| method | kept | bytes/parameter | seeds | validation loss, mean | lowest to highest "
        "| beside fp32, mean | lowest to highest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, storage, lr, seed), result in results.items():
        if seed != seeds[0]:
            continue
        used = seeds[:1] if STORAGES[storage].once else seeds
        losses, beside = (
            [results[Run(method, kept, lr, s)]["validation_loss"] for s in used] for kept in (storage, BASELINE)
        )
        apart = [ours - theirs for ours, theirs in zip(losses, beside, strict=True)]
        lines.append(
            f"| {method} | {storage} | {result['bytes_per_parameter']:.2f} | {len(used)} "
            f"| {statistics.mean(losses):.4f} | {min(losses):.4f} to {max(losses):.4f} | {statistics.mean(apart):+.4f} "
            f"| {min(apart):+.4f} to {max(apart):+.4f} |"
        )
    return "\n".join(lines)


def equal_masters(results: dict[Run, dict[str, Any]]) -> str:
    """Whether remainders of 16 bits have ended at the masters that fp32 masters ended at."""
    pairs = [
        (result["masters"], results[run._replace(storage="bf16 weights, fp32 states, remainder16")]["masters"])
        for run, result in results.items()
        if STORAGES[run.storage].masters
    ]
    equal = sum(ours == theirs for ours, theirs in pairs)
    return f"Masters of remainder16 equal fp32 masters bit for bit at the end of {equal} of {len(pairs)} runs."


def plot(results: dict[Run, dict[str, Any]], seeds: range, path: Path) -> None:
    """For each storage the difference to the baseline's validation loss: a point per seed."""
    figure, panels = plt.subplots(1, len(METHODS), figsize=(10, 4), sharey=True, layout="constrained")
    for axes, method in zip(panels, METHODS, strict=True):
        for run, result in results.items():
            base = results[run._replace(storage=BASELINE)]["validation_loss"]
            apart = result["validation_loss"] - base
            if run.method == method and run.storage != BASELINE and math.isfinite(apart) and abs(apart) < 1:
                axes.plot(apart, run.storage, "os^Dv"[seeds.index(run.seed) % 5], color="C0")
        axes.axvline(0, color="gray", lw=1)
        axes.set_title(method)
        axes.set_xlabel("validation loss less that with fp32")
    figure.savefig(path, dpi=150)


def best_lr(evidence: Evidence, method: str, seed: int) -> float:
    tried = evidence.run([Run(method, BASELINE, lr, seed) for lr in LRS])
    return min(tried, key=lambda run: tried[run]["validation_loss"]).lr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/storage"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--validation_rows", type=int, default=256, help="of 128 bytes")
    given = parser.parse_args()
    size = Size(given.steps, given.hidden, given.layers, given.validation_rows)
    evidence, seeds = Evidence(given.output_dir, given.jobs, size), range(given.seeds)
    lrs = {method: best_lr(evidence, method, seeds[0]) for method in METHODS}
    runs = [
        Run(method, storage, lr, seed)
        for seed in seeds
        for method, lr in lrs.items()
        for storage, kept in STORAGES.items()
        if method in kept.methods and (seed == seeds[0] or not kept.once)
    ]
    results = evidence.run(runs)
    text = f"{table(results, seeds)}\n\n{equal_masters(results)}\n"
    (given.output_dir / "storage.md").write_text(text)
    plot(results, seeds, given.output_dir / "storage.png")
    print(text)


if __name__ == "__main__":
    main()
