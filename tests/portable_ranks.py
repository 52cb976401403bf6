"""Worker of test_portable.py: a run that goes on elsewhere after every few steps, by portable checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.runtime import engine as engine_module
from every_method_ranks import hyper_of, plain_step
from tiny import (
    GLOBAL_BATCH,
    HYPER,
    bf16_llama,
    ds_config,
    full_parameters,
    initialize,
    llama,
    llama_under_zero_init,
    local,
    shard_fsdp2,
    train,
    train_plain,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

import ds_memopt
from ds_memopt.checkpoint import OptimizerState, begin_save
from ds_memopt.engines.processes import of_all_ranks
from ds_memopt.optimizers import METHODS

STEPS = 2  # of each leg
LEGS = {"zero2": 2, "zero3": 3, "alone": 1, "fsdp2": 2, "zero1": 4}
"""Where a run goes on, one after the other, and on how many ranks."""
ZO = {"lr": 1e-3, "epsilon": 1e-3, "momentum": 0.5}
METHOD_HYPER = {
    "AdamW": HYPER,
    "AdamMini": HYPER,
    "GWT": HYPER | {"level": 2},
    "BAdam": HYPER | {"switch_every": 3, "order": "ascending", "always_active": ["norm"], "keep_residual": True},
    "MeZO": ZO,
    "CAME": {"lr": 1e-3, "weight_decay": 0.1},
    "IPSGD": {"lr": 1e-2, "weight_decay": 0.1},
    "Addax": {"lr": 1e-2, "epsilon": 1e-3, "alpha": 0.1, "length_threshold": None},
}
"""BAdam's block changes inside a leg and is resumed inside a visit."""
CASES = [
    *((method, False) for method in METHOD_HYPER), ("AdamMini", True), ("BAdam", True), ("MeZO", True),
]  # fmt: skip
"""The runs: method, and whether in bf16."""


def build(method: str, leg: str, bf16: bool) -> Any:
    """An engine, or (model, optimizer)."""
    hyper, changes = METHOD_HYPER[method], {}
    if method == "Addax":
        half = GLOBAL_BATCH // dist.get_world_size()
        hyper, changes = hyper | {"zo_batch": half, "fo_batch": half}, {"train_micro_batch_size_per_gpu": 2 * half}
    in_place = method in METHODS and METHODS[method].writes_weights
    if leg.startswith("zero") or leg == "alone" and bf16:
        config = ds_config(int(leg[-1]) if leg[-1].isdigit() else 0, method, hyper, **changes)
        if bf16:
            config["bf16"] = {"enabled": True}
        model = llama_under_zero_init(config) if leg == "zero3" and not bf16 else llama()
        return initialize(model, config, model_parameters=model.parameters())
    model = bf16_llama() if bf16 and in_place else llama()
    if leg == "fsdp2":
        policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if bf16 and not in_place else {}
        model = shard_fsdp2(model, **policy)
    if method == "AdamW":
        return model, torch.optim.AdamW(model.parameters(), **hyper)
    return model, METHODS[method].from_model(model, list(model.parameters()), **hyper)


def train_on(run: Any, data: list[torch.Tensor]) -> None:
    if not isinstance(run, tuple):
        train(run, data)
        return
    model, optimizer = run
    if isinstance(optimizer, torch.optim.AdamW):
        train_plain(model, optimizer, data)
        return
    for batch in data:
        plain_step(optimizer, model, batch)


def data_of(method: str) -> list[torch.Tensor]:
    """This rank's rows of each step. Addax's halves are global batches of their own, on any number of ranks."""
    if method != "Addax":
        return local(STEPS * len(LEGS))
    rows = local(2 * STEPS * len(LEGS))
    return [torch.cat(both) for both in zip(rows[::2], rows[1::2], strict=True)]


def module_of(run: Any) -> torch.nn.Module:
    return run[0] if isinstance(run, tuple) else run.module


def run_leg(folder: Path, number: int) -> dict:
    """Go on where the leg before ended; returns whole weights at this leg's end. Of the first and the last leg also
    those of the run that never moves; of the first those of a run that is resumed there."""
    leg, results = list(LEGS)[number], {}
    if leg in ("zero3", "alone", "fsdp2"):  # 3, 1 and 2 ranks
        results["sharded"] = sharded_state(folder)
    for method, bf16 in CASES:
        place, run = folder / f"{method}{bf16}", build(method, leg, bf16)
        if number:
            found = ds_memopt.load(run, place)
            assert found == {"step": number * STEPS, "extra": {"leg": list(LEGS)[number - 1]}, "settings": {}}
        data = data_of(method)
        train_on(run, data[number * STEPS : (number + 1) * STEPS])
        ds_memopt.save(run, place, (number + 1) * STEPS, extra={"leg": leg}, keep=2)
        results[method, bf16] = {"weights": full_parameters(module_of(run))}
        if not number:
            train_on(run, data[STEPS : 2 * STEPS])
            results[method, bf16]["unbroken"] = full_parameters(module_of(run))
            train_on(run, data[2 * STEPS :])
            results[method, bf16]["whole"] = full_parameters(module_of(run))
        getattr(run, "destroy", lambda: None)()
        if not number:
            run = build(method, leg, bf16)
            ds_memopt.load(run, place)
            train_on(run, data[STEPS : 2 * STEPS])
            results[method, bf16]["resumed"] = full_parameters(module_of(run))
            run.destroy()
        if number == len(LEGS) - 1:
            run = build(method, leg, bf16)
            train_on(run, data)
            results[method, bf16]["whole"] = full_parameters(module_of(run))
            run.destroy()
    return results


SHARDED = {
    "AdamMini": HYPER, "GWT": HYPER | {"level": 2}, "CAME": {"lr": 1e-3}, "IPSGD": {"lr": 1e-3},
    "AdamMini, int8": HYPER | {"state_dtype": "int8", "masters": "remainder16"},
}  # fmt: skip
"""What torch.distributed.checkpoint carries over: method and hyper-parameters; all but the first three in bf16."""


def sharded_state(folder: Path) -> dict[str, list]:
    """Under FSDP2 on three ranks: train and save with torch.distributed.checkpoint. On fewer: load.

    Returns the optimizer's state that each rank has, and its learning rate.
    """
    results = {}
    for case, hyper in SHARDED.items():
        word, loads = case.partition(",")[0], dist.get_world_size() < 3
        model = bf16_llama(seed=int(loads)) if word == "IPSGD" or "int8" in case else llama(seed=int(loads))
        model = shard_fsdp2(model) if dist.get_world_size() > 1 else model
        optimizer = METHODS[word].from_model(model, **hyper)
        if not loads:
            for batch in local(STEPS):
                plain_step(optimizer, model, batch)
            optimizer.param_groups[0]["lr"] = 0.5
        state = {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}
        (dcp.load if loads else dcp.save)(state, checkpoint_id=folder / f"{case}, sharded")
        parts = [part._replace(values=part.values.clone()) for part in optimizer.named_state()]
        results[case] = of_all_ranks((parts, optimizer.param_groups[0]["lr"])), full_parameters(model)
    return results


BF16, ACCUMULATED = {"bf16": {"enabled": True}}, {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
FROZEN = "model.layers.0.mlp.up_proj.weight"
MOVES: dict[str, tuple[str, tuple[int, dict], tuple[int, dict]]] = {
    "CAME": ("CAME", (2, {}), (3, {})),
    "IPSGD": ("IPSGD", (3, BF16), (1, BF16)),
    "Addax": ("Addax", (2, BF16), (3, BF16)),
    "AdamMini, bf16": ("AdamMini", (1, BF16 | ACCUMULATED), (2, BF16 | OFFLOAD)),
    "AdamMini, bf16, back": ("AdamMini", (3, BF16 | OFFLOAD), (1, BF16 | ACCUMULATED)),
    "AdamW, bf16": ("AdamW", (0, BF16), (3, BF16)),
    "AdamW, bf16, fused": ("AdamW", (0, BF16), (2, BF16)),
    "AdamW, fp16": (
        "AdamW",
        (2, {"fp16": {"enabled": True}}),
        (1, {"fp16": {"enabled": True, "initial_scale_power": 8}}),
    ),
}
"""Method, and from which stage to which, with what else in the config; fp16 begins at another loss scale there."""


def move(folder: Path) -> dict[str, tuple]:
    """On two ranks, with one parameter frozen: weights at the end of a run, of the same moved to another stage in its
    middle, and what of its masters was not restored exactly."""
    results = {}
    for name, (method, *places) in MOVES.items():
        runs = []
        for stage, changes in places:
            model = llama()
            model.get_parameter(FROZEN).requires_grad_(name == "IPSGD")
            hyper = HYPER if method.startswith("Adam") else hyper_of(method)
            config = ds_config(stage, method, hyper, **changes)
            config["zero_force_ds_cpu_optimizer"] = False
            trained = [p for p in model.parameters() if p.requires_grad]
            # On a GPU AdamW is DeepSpeed's FusedAdam, around which ZeRO-0 has another object.
            fused = mock.patch.object(engine_module, "FusedAdam", torch.optim.AdamW)
            with fused if name.endswith("fused") else contextlib.nullcontext():
                runs.append(initialize(model, config, model_parameters=trained))
        engine, other = runs
        assert (type(engine.optimizer).__name__ == "FP16_Optimizer") == name.endswith("fused")
        data = local(2 * STEPS)
        train(engine, data[:STEPS])
        ds_memopt.save(engine, folder / name)
        saved = full_parameters(engine.module)
        ds_memopt.load(other, folder / name)
        restored = full_parameters(other.module)
        ds_memopt.save(other, folder / f"{name}, again")
        scales = [getattr(getattr(run.optimizer, "loss_scaler", None), "cur_scale", None) for run in runs]
        for run in runs:
            train(run, data[STEPS:])
        results[name] = saved, restored, *(full_parameters(run.module) for run in runs), scales
        for run in runs:
            run.destroy()
    return results


def save_again_and_again(folder: Path, start: int, behind: bool) -> None:
    """Until it is killed: every number of checkpoint k is k. behind: a thread writes it, and they change meanwhile."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(start, 10**9):
        numbers(model, optimizer, step)
        if behind:
            in_flight = begin_save((model, optimizer), folder, step, keep=2)
            numbers(model, optimizer, -1)
            in_flight.finish()
        else:
            ds_memopt.save((model, optimizer), folder, step, keep=2)


def numbers(model: torch.nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give weights and states one value."""
    for p in model.parameters():
        p.data.fill_(value)
        optimizer.state[p] = {
            "step": torch.tensor(float(value)), "exp_avg": torch.full_like(p, value),
            "exp_avg_sq": torch.full_like(p, value),
        }  # fmt: skip
