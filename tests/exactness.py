"""Worker of test_exactness.py: train the same model under one placement after another."""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from tiny import batches, ds_config, full_parameters, initialize, llama, shard_fsdp2, train, train_plain, HYPER

from ds_memopt import AdamMini

STEPS = 20


def whole_gpu(optimizer: str) -> dict[str, torch.Tensor]:
    """One process, plain PyTorch: what every placement must reproduce."""
    model = llama()
    train_plain(model, build_plain(optimizer, model), batches(STEPS))
    return full_parameters(model)


def build_plain(optimizer: str, model):
    if optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), **HYPER)
    return AdamMini.from_model(model, model.parameters(), **HYPER)


def zero(stage, optimizer, zero_init=False, **changes):
    config = ds_config(stage, optimizer, **changes)
    if zero_init:
        # zero.Init keeps rank 0's values only of parameters made under it: build, then load the same weights.
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = llama()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            if dist.get_rank() == 0:
                model.load_state_dict(llama().state_dict())
    else:
        model = llama()
    engine = initialize(model, config, model_parameters=model.parameters())
    train(engine, batches(STEPS, dist.get_rank(), dist.get_world_size()))
    parameters = full_parameters(engine.module)
    return parameters, engine


def placements(optimizer: str) -> dict[str, dict[str, torch.Tensor]]:
    results = {"fsdp2": fsdp2(optimizer)}
    cases = {
        "zero0": dict(stage=0), "zero1": dict(stage=1), "zero2": dict(stage=2), "zero3": dict(stage=3),
        "zero3_init": dict(stage=3, zero_init=True),
        "round_robin": dict(stage=2, zero_optimization={"round_robin_gradients": True}),
    }
    for name, case in cases.items():
        results[name], engine = zero(optimizer=optimizer, **case)
        engine.destroy()
    return results


def fsdp2(optimizer: str):
    model = shard_fsdp2(llama())
    train_plain(model, build_plain(optimizer, model), batches(STEPS, dist.get_rank(), dist.get_world_size()))
    return full_parameters(model)


def all_placements():
    return {optimizer: placements(optimizer) for optimizer in ("AdamW", "AdamMini")}
