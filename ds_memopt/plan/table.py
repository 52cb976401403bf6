"""The command `ds-memopt plan`: what fits under every method and stage, as a table, and a ds_config of what is best."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from ds_memopt.measure import GIB
from ds_memopt.optimizers import METHODS, InPlaceOptimizer, takes
from ds_memopt.optimizers.base import check_range
from ds_memopt.train.presets import find_model

from .activations import Activations, measure_activations
from .predict import DTYPES, RULES, Prediction, predict

STAGES = (0, 1, 2, 3)
USUAL_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements, which it allocates whole even if the model is smaller."""

BY_NEARNESS = ("AdamW", "AdamMini", "GWT", "BAdam", "IPSGD", "Addax", "MeZO")
"""The order in which methods are recommended: how near their steps are to AdamW's."""

HEADING = """\
{model}, {gpus} GPUs of {gpu_memory}, sequences of {seq_length} tokens, {dtype}. GiB of each GPU.
besides: buckets, gathered weights, gradients on their way. batch, checkp.: the largest micro-batch that fits, without
and with activation checkpointing; "-" where none does. BAdam: while its largest block trains.
"""

UNITS = {"GB": 10**9, "GiB": GIB, "MB": 10**6, "MiB": 2**20}


@dataclass(frozen=True)
class Row:
    """A method at a stage. zero: what is planned of zero_optimization; the rest has DeepSpeed's defaults.

    micro_batch: sequences that fit, 0 if none does; checkpointed: with checkpointing.
    """

    method: str
    stage: int
    zero: Mapping[str, Any]
    prediction: Prediction
    micro_batch: int
    checkpointed: int

    @property
    def batch(self) -> int:
        """The micro-batch to run it with: without checkpointing if that fits."""
        return self.micro_batch or self.checkpointed

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(self.prediction.sent.values())


def plan(
    model: str | PretrainedConfig,
    gpus: int,
    gpu_memory: int,
    seq_length: int,
    methods: Iterable[str] = BY_NEARNESS,
    dtype: str = "bf16",
) -> list[Row]:
    """Every method at every stage, with the options that a method has by default.

    model: a preset, a folder with a Hugging Face config.json, or such a configuration. gpus: ranks. gpu_memory: bytes
        of each that a run may use. seq_length: tokens of each sequence.

    Raises ValueError for a number out of range, an unknown method, or a model that is not found.
    """
    for name, value in (("gpus", gpus), ("gpu_memory", gpu_memory), ("seq_length", seq_length)):
        check_range(name, value, isinstance(value, int) and value >= 1, "an integer >= 1", "Give what you have.")
    for method in methods:
        check_range("optimizer", method, method in RULES, f"all or some of {', '.join(RULES)}", "Write it so.")
    config = find_model(model)[0] if isinstance(model, str) else model
    needs = {
        name: measure_activations(config, seq_length, DTYPES[dtype], **options)
        for name, options in (
            ("plain", {}),
            ("checkpointed", {"checkpointing": True}),
            ("forward", {"backward": False}),
        )
    }
    with no_init_weights(), torch.device("meta"):
        built = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPES[dtype])
    bucket = min(USUAL_BUCKET, sum(p.numel() for p in built.parameters()))
    zero = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    rows = []
    for method in methods:
        for stage in STAGES:
            prediction = predict(built, method, stage=stage, ranks=gpus, dtype=dtype, zero=zero)
            fits = [
                _largest(prediction, _needed(method, needs, kind), gpu_memory) for kind in ("plain", "checkpointed")
            ]
            rows.append(Row(method, stage, zero, prediction, *fits))
    return rows


def _needed(method: str, needs: dict[str, Activations], kind: str) -> Activations:
    """Of MeZO two forwards, as in lockstep; of Addax those beside backward."""
    forward = needs["forward"]
    pair = Activations(forward.first + forward.further, 2 * forward.further)
    if method == "MeZO":
        return pair
    if method == "Addax":
        return Activations(needs[kind].first + pair.first, needs[kind].further + pair.further)
    return needs[kind]


def _largest(prediction: Prediction, activations: Activations, memory: int) -> int:
    """The largest micro-batch whose peak is within these bytes."""
    room = memory - prediction.held
    if prediction.step > room:
        return 0
    rest = room - prediction.backward - activations.first
    return 0 if rest < 0 else 1 + rest // activations.further


def recommend(rows: Sequence[Row]) -> Row | None:
    """Of what fits: the method that is nearest to AdamW, where it sends least for each sequence; None if nothing fits.

    Without checkpointing if that fits anywhere.
    """
    for method in BY_NEARNESS:
        for attribute in ("micro_batch", "checkpointed"):
            fitting = [row for row in rows if row.method == method and getattr(row, attribute)]
            if fitting:
                return min(fitting, key=lambda row: row.sent / getattr(row, attribute))
    return None


def as_text(rows: Sequence[Row]) -> str:
    """A table, in GiB of each rank; what fits is marked with its largest micro-batch."""
    head = ("method", "ZeRO", "weights", "masters", "gradients", "states", "besides", "sent a step", "batch", "checkp.")
    lines = [head]
    for row in rows:
        p = row.prediction
        besides = max(p.backward, p.step)
        sizes = (p.weights, p.masters, p.gradients, sum(p.states.values()), besides, row.sent)
        fits = (str(size) if size else "-" for size in (row.micro_batch, row.checkpointed))
        lines.append((row.method, str(row.stage), *(f"{size / GIB:.2f}" for size in sizes), *fits))
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join("".join(map(str.rjust, line, widths)) for line in lines)


def ds_config(row: Row, dtype: str = "bf16") -> dict[str, Any]:
    """What to run a row with; learning rate and schedule are left "auto"."""
    adam = ("lr", "betas", "eps", "weight_decay")
    in_place = issubclass(METHODS.get(row.method, object), InPlaceOptimizer)
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": row.batch,
        "gradient_accumulation_steps": 1 if in_place else "auto",
        "gradient_clipping": 0.0 if in_place else 1.0,
        "optimizer": {
            "type": row.method,
            "params": {key: "auto" for key in adam if row.method == "AdamW" or takes(row.method, key)},
        },
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": row.stage, **row.zero},
    }


def bytes_of(text: str) -> int:
    """Bytes of "80GB" (10^9), "80GiB" (1024^3), "512MB". ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"gpu_memory={text!r} is no amount of memory. Write a number and GB or GiB, such as 80GB.")
    return int(float(match[1]) * UNITS[match[2]])


def run(
    model: str, gpus: int, gpu_memory: str, seq_length: int, optimizer: str, dtype: str, output: Path | None
) -> None:
    """Print the table and a recommendation; write its ds_config. Raises ValueError as `plan` does."""
    methods = BY_NEARNESS if optimizer == "all" else tuple(optimizer.split(","))
    rows = plan(model, gpus, bytes_of(gpu_memory), seq_length, methods, dtype)
    print(HEADING.format(model=model, gpus=gpus, gpu_memory=gpu_memory, seq_length=seq_length, dtype=dtype))
    print(as_text(rows))
    best = recommend(rows)
    if best is None:
        print("\nNothing fits. Use more GPUs or shorter sequences, or offload to the CPU, which is not planned here.")
        if output:
            raise ValueError(f"nothing fits, so {output} is not written. Use more GPUs or shorter sequences.")
        return
    checkpointing = "" if best.micro_batch else " with activation checkpointing"
    print(f"\nRecommended: {best.method} at ZeRO-{best.stage}, micro-batches of {best.batch}{checkpointing}.")
    print("Of the methods that fit it is the nearest to AdamW, and at this stage it sends least for each sequence.")
    if output:
        output.write_text(json.dumps(ds_config(best, dtype), indent=2) + "\n")
        print(f"Written: {output}")
