"""Worker of test_storage.py: steps along given gradients, with states and masters kept in fewer bits."""

from __future__ import annotations

import types
from unittest import mock

import torch
import torch.distributed as dist
from tiny import HYPER, ds_config, full_parameters, initialize, llama, shard_fsdp2
from torch import nn
from torch.distributed.tensor import distribute_tensor

from ds_memopt.engines.held_bytes import held_bytes
from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.adamw import AdamW
from ds_memopt.shards import Seams

STEPS = 4
RULES = {
    "AdamMini": {},
    "GWT": {"level": 2},
    "GWT, adam_mini": {"level": 3, "base": "adam_mini"},
    "AdamW": {},
}
STORAGES = {
    "fp32, bf16": {"state_dtype": "bf16"},
    "fp32, int8": {"state_dtype": "int8"},
    "bf16, remainder16": {"masters": "remainder16"},
    "bf16, int8, remainder16": {"state_dtype": "int8", "masters": "remainder16"},
    "bf16, int8, remainder8": {"state_dtype": "int8", "masters": "remainder8"},
}
"""By the weights' dtype and what is kept in fewer bits."""
WITHOUT_MASTERS = {
    ("AdamMini", "bf16, int8, remainder16"): (1, 2, 3),
    ("GWT", "bf16, remainder16"): (2,),
    ("GWT, adam_mini", "bf16, int8, remainder8"): (3,),
}
"""The stages of ZeRO at which bf16 weights are tried without fp32 masters."""
BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Of each parameter, with 6 digits: three times as much is a number of bf16, too."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: few_digits(torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** 3)
        for name, p in llama().named_parameters()
    }


def few_digits(values: torch.Tensor) -> torch.Tensor:
    return (values.bfloat16().view(torch.int16) & ~3).view(torch.bfloat16)


def build(rule: str, storage: str, model: nn.Module):
    """storage: of STORAGES, or "fp32"."""
    method = {"AdamW": AdamW}.get(rule) or METHODS[rule.split(",")[0]]
    return method.from_model(model, list(model.parameters()), **HYPER | RULES[rule] | STORAGES.get(storage, {}))


def plain_steps(optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        found = gradients(step)
        for name, p in model.named_parameters():
            gradient = found[name].to(p.dtype)
            sharded = hasattr(p, "device_mesh")
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if sharded else gradient
        optimizer.step()


def llama_of(storage: str) -> nn.Module:
    return llama().to(torch.bfloat16 if storage.startswith("bf16") else torch.float32)


def alone(rule: str, storage: str, steps: int = STEPS):
    """A model and its optimizer after some steps in one process."""
    model = llama_of(storage)
    optimizer = build(rule, storage, model)
    plain_steps(optimizer, model, range(steps))
    return model, optimizer


def results_of(optimizer, model: nn.Module) -> dict:
    """What a rank knows after its steps: its parts of the state, whole weights, and the blocks and groups of 128 that
    are cut, by structure."""
    tensors, names = zip(*optimizer.placement.named_tensors(optimizer.param_groups), strict=True)
    indexes = optimizer._index(tensors, names)
    cut = {key: index.num_slots for key, index in indexes.items()}
    parts = [part._replace(values=part.values.clone()) for part in optimizer.named_state()]
    return {"parts": parts, "weights": full_parameters(model), "cut": cut}


def under_fsdp2(rule: str, storage: str) -> dict:
    model = shard_fsdp2(llama_of(storage))
    optimizer = build(rule, storage, model)
    plain_steps(optimizer, model, range(STEPS))
    return results_of(optimizer, model)


def _linear(module: nn.Module, found: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """A loss with these gradients."""
    return sum((p * found[prefix + name].to(p.dtype)).sum() for name, p in module.named_parameters(recurse=False))


def under_zero(rule: str, storage: str, stage: int) -> dict:
    model = llama_of(storage)
    leaves = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    for name, module in leaves.items():
        module.forward = types.MethodType(lambda self, found, prefix=f"{name}.": _linear(self, found, prefix), module)
    model.forward = lambda found: sum(module(found) for module in leaves.values())
    config = ds_config(stage, rule.split(",")[0], HYPER | RULES[rule] | STORAGES[storage])
    engine = initialize(model, config | ({"bf16": BF16} if storage.startswith("bf16") else {}))
    # One rank has all, so that the average is the same to the bit.
    share = dist.get_world_size() * (dist.get_rank() == 0)
    for step in range(STEPS):
        engine.backward(engine(gradients(step)) * share)
        engine.step()
    held = held_bytes(engine, engine.device)
    result = results_of(engine.basic_optimizer, engine.module) | {"masters": held["masters"]}
    engine.destroy()
    return result


def everywhere() -> dict[tuple[str, str, str], dict]:
    """By rule, storage and placement."""
    results = {}
    for storage in STORAGES:
        for rule in RULES:
            results[rule, storage, "fsdp2"] = under_fsdp2(rule, storage)
            fp32 = storage.startswith("fp32") and rule != "AdamW" and dist.get_world_size() == 2
            for stage in (2, 3) if fp32 else WITHOUT_MASTERS.get((rule, storage), ()):
                results[rule, storage, f"zero{stage}"] = under_zero(rule, storage, stage)
    with mock.patch.object(Seams, "begin_max", lambda seams, slots: lambda: None):
        results["AdamMini", "fp32, int8", "open maxima"] = under_fsdp2("AdamMini", "fp32, int8")
    return results
