"""Worker of test_every_method.py: trains any registered method, of which it knows only what the method says of itself.

The hyper-parameters are those of the method's own ds_config.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from exactness_ranks import groups
from tiny import (
    batches,
    ds_config,
    full_parameters,
    initialize,
    llama,
    local,
    shard_fsdp2,
    train,
)

from ds_memopt.measure import state_bytes
from ds_memopt.optimizers import METHODS
from ds_memopt.plan import predict
from ds_memopt.shards import Seams

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
STEPS, SAVED_AFTER, RANKS = 3, 2, 2
STAGES = (0, 2, 3)
"""ZeRO-1 lays and saves what ZeRO-2 does. test_exactness.py has it."""
PLACEMENTS = (*(f"zero{stage}" for stage in STAGES), "fsdp2")


def configs_of(word: str) -> dict[str, dict]:
    """The method's configs, by file name."""
    read = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
    return {name: config for name, config in read.items() if config["optimizer"]["type"] == word}


def hyper_of(word: str) -> dict:
    """What the config says, and for "auto" the default, but no lr so small that weights would move by roundings."""
    method, config = METHODS[word], configs_of(word)[f"zero2_{file_name(word)}"]
    given = {name: value for name, value in config["optimizer"]["params"].items() if value != "auto"}
    lr = max(method.hyper_parameters().lr, 1e-4)
    rows = {"length_threshold": None, "zo_batch": 4, "fo_batch": 2} if method.splits_batch else {}
    return {"lr": lr, "weight_decay": 0.1} | given | rows


def file_name(word: str) -> str:
    """The method's module, which its config, page and tests are named after."""
    return METHODS[word].__module__.rpartition(".")[2]


def loss_of(model, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, labels=batch).loss


def plain_step(optimizer, model, batch: torch.Tensor, parts: int = 1) -> None:
    """A step without an engine. parts: of a batch that was put together from the ranks' rows."""
    if optimizer.splits_batch:
        rows = torch.arange(len(batch)).view(parts, -1)
        split = optimizer.hyper.zo_batch
        zo, fo = batch[rows[:, :split].flatten()], batch[rows[:, split:].flatten()]
        optimizer.step(lambda: loss_of(model, zo), lambda: loss_of(model, fo))
    elif optimizer.uses_losses:
        optimizer.step(lambda: loss_of(model, batch))
    else:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_alone(word: str, parts: int = RANKS, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights after plain PyTorch in one process on the whole batches: what every placement must reproduce."""
    model = llama()
    optimizer = METHODS[word].from_model(model, groups(model), **hyper_of(word))
    for batch in batches(steps):
        plain_step(optimizer, model, batch, parts)
    return full_parameters(model)


def new_engine(word: str, stage: int):
    model = llama()
    return initialize(model, ds_config(stage, word, hyper_of(word)), model_parameters=groups(model))


def train_everywhere(words: list[str], folder: Path) -> dict[str, dict]:
    """By method and placement: weights, those of a run that was resumed, bytes of state held and planned, and state by
    name; besides, at ZeRO-2, how often ranks summed what they hold of shared blocks, and the weights if they do not."""
    return {word: train_one(word, folder) for word in words}


def train_one(word: str, folder: Path) -> dict:
    found = {"weights": {}, "resumed": {}, "states": {}, "named": {}, "progress": {}}
    for stage in STAGES:
        placement, data = f"zero{stage}", local(STEPS)
        engine = new_engine(word, stage)
        train(engine, data[:SAVED_AFTER])
        engine.save_checkpoint(str(folder / word / placement), tag="saved")
        train(engine, data[SAVED_AFTER:])
        found["weights"][placement] = full_parameters(engine.module)
        model, zero = llama(), ds_config(stage)["zero_optimization"]
        place = {"stage": stage, "ranks": RANKS, "rank": dist.get_rank(), "zero": zero, "dtype": "fp32"}
        place["block"] = getattr(engine.basic_optimizer, "active_block", None)
        predicted = predict(model, word, hyper_of(word), params=groups(model), **place)
        found["states"][placement] = state_bytes(engine.optimizer), dict(predicted.states)
        engine.destroy()
        engine = new_engine(word, stage)
        engine.load_checkpoint(str(folder / word / placement), tag="saved")
        train(engine, data[SAVED_AFTER:])
        found["resumed"][placement] = full_parameters(engine.module)
        found["named"][placement] = [tuple(part) for part in engine.basic_optimizer.named_state()]
        found["progress"][placement] = engine.basic_optimizer.progress
        engine.destroy()
    sums = []
    with mock.patch.object(Seams, "begin_sum", lambda seams, slots: lambda: sums.append(slots)):
        engine = new_engine(word, 2)
        train(engine, local(STEPS))
    found["seams left open"] = len(sums), full_parameters(engine.module)
    engine.destroy()
    model = shard_fsdp2(llama())
    optimizer = METHODS[word].from_model(model, groups(model), **hyper_of(word))
    for batch in local(STEPS):
        plain_step(optimizer, model, batch)
    model.reshard()
    found["weights"]["fsdp2"] = full_parameters(model)
    return found


def rows_cut_by_zero2() -> list[str]:
    """The matrices that ZeRO-2 cuts inside a row: the arithmetic of its flat buffers, written out."""
    model, cut = llama(), []
    names = {p: name for name, p in model.named_parameters()}
    for group in groups(model):
        half, start = sum(p.numel() for p in group["params"]) / RANKS, 0
        for p in group["params"]:
            if p.ndim > 1 and start < half < start + p.numel() and (half - start) % p.shape[-1]:
                cut.append(names[p])
            start += p.numel()
    return cut
