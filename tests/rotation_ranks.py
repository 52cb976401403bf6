"""Worker of test_rotation.py: what BAdam costs under ZeRO, and what it must not lose there, on two ranks."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from engines_ranks import message
from tiny import HYPER, ds_config, full_parameters, initialize, llama, local, shard_fsdp2, train, train_plain
from torch.distributed.fsdp import MixedPrecisionPolicy

from ds_memopt import BAdam
from ds_memopt.kernels.residual import add_residual_
from ds_memopt.measure import CommunicationMeter, state_bytes

LAYERS = 8
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}, "gradient_accumulation_steps": 2}
GATHER_TWICE = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 60_000}
"""Backward gathers weights again, ahead of their use, as it does in a large model."""
COST_CASES = {
    "zero1": {"stage": 1, **BF16},
    "zero2": {"stage": 2, **BF16},
    "zero3": {"stage": 3, **BF16, "zero_optimization": GATHER_TWICE},
    "zero2, offload": {"stage": 2, **BF16, **OFFLOAD},
}
GATHER = {"stage3_gather_16bit_weights_on_model_save": True}
SMALL_LR = 1e-6


def engine_of(method: str, stage: int, layers: int = 2, hyper: dict | None = None, **changes):
    model = llama(num_hidden_layers=layers)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1]},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    if changes.get("zero_optimization") is OFFLOAD["zero_optimization"] and method == "AdamW":
        changes["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own would compile for minutes
    config = ds_config(stage, method, HYPER | (hyper or {}), **changes)
    return initialize(model, config, model_parameters=groups)


def masters(engine) -> list[torch.Tensor]:
    """This rank's fp32 masters: the tensors that the optimizer itself updates."""
    zero = engine.optimizer
    held = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    return list(held)


def alive_bytes() -> int:
    """Bytes of all storages that some tensor of this process refers to. Those on the meta device hold nothing: all have
    the address 0, and would count as one storage of any of their sizes."""
    gc.collect()
    storages = {}
    for candidate in gc.get_objects():
        if isinstance(candidate, torch.Tensor) and not candidate.is_meta:
            storage = candidate.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def cost(case: dict) -> dict:
    """Bytes sent per step, without and with a switch, and bytes held, of BAdam and of AdamW."""
    result = {}
    for method, hyper in (("AdamW", {}), ("BAdam", {"switch_every": 3, "order": "ascending"})):
        engine, data = engine_of(method, layers=LAYERS, hyper=hyper, **case), local(6)
        train(engine, data[:1])  # states come to be, ZeRO-3 records its trace
        with CommunicationMeter() as meter:
            train(engine, data[1:2])
        result[method] = {"sent": meter.bytes_sent(), "by collective": meter.by_collective()}
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        result[method] |= {
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trained),
            "state and masters": sum(state_bytes(engine.optimizer).values()) + sum(map(_bytes, masters(engine))),
        }
        with CommunicationMeter() as meter:
            train(engine, data[2:3])
        result[method]["sent with switch"] = meter.bytes_sent()
        train(engine, data[3:4])
        with CommunicationMeter() as meter:
            train(engine, data[4:5])
        result[method]["sent in the second visit"] = meter.bytes_sent()
        engine.destroy()
    return result


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def ten_switches(case: dict) -> list[int]:
    """Bytes alive after 2, 6 and 10 switches between two layers, beside those alive before there was an engine."""
    before = alive_bytes()
    engine = engine_of("BAdam", hyper={"switch_every": 1, "order": "ascending"}, **case)
    data, alive = local(1), []
    for steps in (2, 4, 4):
        train(engine, data * steps)
        alive.append(alive_bytes() - before)
    assert engine.basic_optimizer.position.visit == 10
    engine.destroy()
    return alive


def accumulation(stage: int) -> dict[str, torch.Tensor]:
    """Weights after 6 steps, of two micro-batches each whose gradients are added up in fp32."""
    hyper = {"switch_every": 2, "order": "ascending", "eps": 1e-5}
    # ZeRO-1 reduces the sum, by default in bf16; ZeRO-2 and 3 reduce each micro-batch's gradients, which are in bf16.
    reduction = {"communication_data_type": "fp32"} if stage == 1 else {}
    engine = engine_of("BAdam", stage, hyper=hyper, **BF16, **FP32_ACCUMULATION, **reduction)
    for batch in local(6):
        for half in batch.chunk(2):
            engine.backward(engine(input_ids=half, labels=half).loss)
            engine.step()
    weights = full_parameters(engine.module)
    engine.destroy()
    return weights


def small_steps(stage: int, keep_residual: bool) -> dict[str, dict]:
    """After 3 visits to each of two layers at lr 1e-6: the weights, this rank's parts of their fp32 masters by name, as
    (start, elements), and the bytes of residuals."""
    hyper = {"switch_every": 4, "order": "ascending", "lr": SMALL_LR, "weight_decay": 0.0}
    engine = engine_of("BAdam", stage, hyper=hyper | {"keep_residual": keep_residual}, **BF16)
    data = local(24)
    optimizer = engine.basic_optimizer
    train(engine, data[:-1])
    starts = held_intervals(optimizer)
    train(engine, data[-1:])
    weights = full_parameters(engine.module)
    residuals = {name: values for name, _, _, values in optimizer.state_dict().get("residuals", ())}
    starts |= held_intervals(optimizer)
    parts = {name: (starts[name], master.clone()) for name, _, master in optimizer._active_intervals()}
    for name, residual in residuals.items():
        master = weights[name].flatten()[starts[name] : starts[name] + len(residual)].clone()
        add_residual_(master, residual)
        parts[name] = starts[name], master
    engine.destroy()
    return {"weights": weights, "masters": parts, "bytes": {name: _bytes(r) for name, r in residuals.items()}}


def held_intervals(optimizer) -> dict[str, int]:
    """Where this rank's part of each active parameter begins."""
    tensors, names = zip(*optimizer.placement.named_tensors(optimizer.param_groups), strict=True)
    return {interval.name: interval.start for interval in optimizer.placement.layout(tensors, names).intervals}


def checkpoints(folder: Path) -> dict:
    """After two switches: the weights, and files that must hold all of them."""
    results = {}
    for stage in (1, 2, 3):
        config = {"zero_optimization": GATHER} if stage == 3 else {}
        engine = engine_of("BAdam", stage, hyper={"switch_every": 2}, **BF16, **config)
        train(engine, local(5))
        engine.save_checkpoint(folder / f"zero{stage}")
        assert engine.save_16bit_model(folder / f"zero{stage}-16bit")
        results[stage] = full_parameters(engine.module)
        engine.destroy()
    return results


def refused_loads(folder: Path) -> dict[str, str]:
    """What loading says to a checkpoint that does not fit, and that a wrong one has changed no weight."""
    engine = engine_of("AdamW", 2, **BF16)
    engine.save_checkpoint(folder / "adamw")
    engine.destroy()
    messages = {}
    for name, hyper in (("adamw", {"switch_every": 2}), ("zero2", {"switch_every": 3})):
        engine = engine_of("BAdam", 2, hyper=hyper, **BF16)
        before = full_parameters(engine.module)
        try:
            engine.load_checkpoint(folder / name)
        except ValueError as error:
            messages[name] = str(error)
        after = full_parameters(engine.module)
        assert all(torch.equal(before[parameter], after[parameter]) for parameter in before)
        optimizer = engine.basic_optimizer
        messages["by name"] = message(optimizer.load_named_state, list(optimizer.named_state()))
        engine.destroy()
    return messages


def skipped_steps() -> list[tuple[int, tuple[int, int]]]:
    """Steps skipped so far and the position, after each of 6 steps of which the second overflows on one rank."""
    engine = engine_of("BAdam", 2, hyper={"switch_every": 2}, bf16={"enabled": True, "check_grad_overflow": True})
    positions = []
    for step, batch in enumerate(local(6), 1):
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss * float("inf") if step == 2 and dist.get_rank() == 1 else loss)
        engine.step()
        positions.append((engine.skipped_steps, tuple(engine.basic_optimizer.position)))
    engine.destroy()
    return positions


def in_plain_pytorch() -> None:
    """Our AdamW is torch's, which the tests compare with, to the bit in plain PyTorch only."""
    os.environ["DS_MEMOPT_KERNELS"] = "plain"


def on_one_rank() -> dict:
    in_plain_pytorch()
    return {
        "accumulation": {stage: accumulation(stage) for stage in (1, 2, 3)},
        "small steps": {stage: small_steps(stage, keep_residual=True) for stage in (0, 2, 3)},
        "small steps, lost": small_steps(2, keep_residual=False),
    }


def one_parameter_blocks(stage: int, folder: Path, **changes) -> dict:
    """Every block, the first one too, leaves a param group empty; then what is saved, seen and left behind."""
    hyper = {"switch_every": 2, "order": "ascending", "eps": 1e-5, "include_embedding": True, "include_lm_head": True}
    engine = engine_of("BAdam", stage, hyper=hyper, **changes)
    train(engine, local(7))
    # Of the block that is active and of those that were: DeepSpeed has no fp32 copy of what is frozen.
    copies = [safe_get_full_fp32_param(p) for p in engine.module.parameters()] if stage in (1, 2) else []
    engine.save_16bit_model(folder / f"lent{stage}", exclude_frozen_parameters=True)
    result = {"weights": full_parameters(engine.module), "zeros": sum(c is not None and not c.any() for c in copies)}
    engine.destroy()
    result["trainable"] = sum(p.requires_grad for p in engine.module.parameters())
    return result


def mixed_precision(reduce_dtype: torch.dtype | None) -> dict[str, dict[str, torch.Tensor]]:
    """FSDP2 with forwards in bf16: the weights after three visits of BAdam, and those of a model that is sharded anew
    for each visit, with an AdamW that knows only the layer that trains."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    model, data = shard_fsdp2(llama(), mp_policy=policy), local(6)
    train_plain(model, BAdam.from_model(model, **HYPER, switch_every=2, order="ascending"), data)
    weights = llama().state_dict()
    for visit in range(3):
        anew = llama()
        anew.load_state_dict(weights)
        for name, p in anew.named_parameters():
            p.requires_grad_(f"layers.{visit % 2}." in name)
        shard_fsdp2(anew, mp_policy=policy)
        trained = [p for p in anew.parameters() if p.requires_grad]
        matrices, vectors = ([p for p in trained if (p.ndim > 1) == wanted] for wanted in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        train_plain(anew, torch.optim.AdamW(groups, **HYPER), data[2 * visit : 2 * visit + 2])
        weights = full_parameters(anew)
    return {"BAdam": full_parameters(model), "sharded anew": weights}


def everything(folder: Path) -> dict:
    in_plain_pytorch()
    return {
        "mixed precision": {dtype: mixed_precision(dtype) for dtype in (None, torch.float32)},
        "costs": {name: cost(case) for name, case in COST_CASES.items()},
        "alive": {name: ten_switches(case) for name, case in COST_CASES.items()},
        "small steps": {stage: small_steps(stage, keep_residual=True) for stage in (0, 2, 3)},
        "checkpoints": checkpoints(folder),
        "refused": refused_loads(folder),
        "skipped": skipped_steps(),
        "lent": {stage: one_parameter_blocks(stage, folder) for stage in (0, 1, 2)}
        | {3: one_parameter_blocks(3, folder, zero_optimization=GATHER | OFFLOAD["zero_optimization"])},
    }
