"""Worker of test_resume.py: save on some ranks, continue in new processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from deepspeed.utils import safe_get_full_optimizer_state
from tiny import HYPER, ds_config, full_parameters, initialize, llama, local, shard_fsdp2, train, train_plain
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ds_memopt import AdamMini, BAdam
from ds_memopt.engines.checkpoint_files import load_only_data
from ds_memopt.optimizers import StatePart

BEFORE, AFTER = 3, 3  # BAdam is saved after the first of a visit's two steps
GWT = {"optimizer": "GWT", "hyper": HYPER | {"level": 3, "base": "adam_mini"}}
BADAM = {
    "optimizer": "BAdam",
    "hyper": HYPER | {"switch_every": 2, "include_embedding": True, "include_lm_head": True, "keep_residual": True},
}
COMPACT = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
    "hyper": HYPER | {"state_dtype": "int8", "masters": "remainder16"},
}
STAGES = {
    "zero0, bf16": {"stage": 0, "bf16": {"enabled": True}},
    "zero1": {"stage": 1},
    "zero1, bf16, fp32 accumulation": {
        "stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2, compact": {"stage": 2, **COMPACT},
    "zero3, compact": {"stage": 3, **COMPACT},
    "zero2, offload": {"stage": 2, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    "zero2, GWT": {"stage": 2, **GWT},
    "zero3, GWT": {"stage": 3, **GWT},
    "zero0, bf16, BAdam": {"stage": 0, "bf16": {"enabled": True}, **BADAM},
    "zero1, bf16, fp32 accumulation, BAdam": {
        "stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **BADAM,
    },
    "zero2, bf16, BAdam": {"stage": 2, "bf16": {"enabled": True}, **BADAM},
    "zero2, BAdam": {"stage": 2, **BADAM},
    "zero3, bf16, BAdam": {"stage": 3, "bf16": {"enabled": True}, **BADAM},
    "zero3, offload, BAdam": {"stage": 3, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}, **BADAM},
}  # fmt: skip


def local_batches() -> list[torch.Tensor]:
    return local(BEFORE + AFTER)


def fsdp2_state(model, optimizer) -> dict:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def load_fsdp2(model, optimizer, folder: Path) -> None:
    state = fsdp2_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def build(case: dict):
    model = llama()
    return initialize(model, ds_config(**case), model_parameters=model.parameters())


def save_and_go_on(folder: Path) -> dict:
    """Weights at the checkpoint, at the end, and what the optimizer holds by name, under each stage."""
    results = {}
    for name, case in STAGES.items():
        engine, data = build(case), local_batches()
        train(engine, data[:BEFORE])
        engine.save_checkpoint(folder / name)
        saved = full_parameters(engine.module)
        parts = [part._replace(values=part.values.clone()) for part in engine.basic_optimizer.named_state()]
        head = dict(engine.module.named_parameters())["lm_head.weight"]
        linked = not any(word in name for word in ("GWT", "BAdam", "zero0", "compact"))
        momentum = safe_get_full_optimizer_state(head, "exp_avg") if linked else None
        train(engine, data[BEFORE:])
        results[name] = {
            "saved": saved, "end": full_parameters(engine.module), "parts": parts, "lm_head momentum": momentum,
        }  # fmt: skip
        engine.destroy()

    model = shard_fsdp2(llama())
    optimizer, data = AdamMini.from_model(model, **HYPER), local_batches()
    train_plain(model, optimizer, data[:BEFORE])
    dcp.save(fsdp2_state(model, optimizer), checkpoint_id=folder / "fsdp2")
    train_plain(model, optimizer, data[BEFORE:])
    results["fsdp2"] = {"end": full_parameters(model)}

    model = shard_fsdp2(llama())
    optimizer = BAdam.from_model(model, **BADAM["hyper"])
    train_plain(model, optimizer, data[:BEFORE])
    dcp.save({"position": optimizer.position._asdict()}, checkpoint_id=folder / "fsdp2, BAdam, position")
    dcp.save(fsdp2_state(model, optimizer), checkpoint_id=folder / "fsdp2, BAdam")
    train_plain(model, optimizer, data[BEFORE:])
    results["fsdp2, BAdam"] = {"end": full_parameters(model)}
    return results


def resume(folder: Path) -> dict:
    """Weights at the end of the same run, continued from the checkpoints by new processes."""
    results = {}
    for name, case in STAGES.items():
        engine = build(case)
        load_only_data(engine)
        path, _ = engine.load_checkpoint(folder / name)
        assert path is not None
        train(engine, local_batches()[BEFORE:])
        results[name] = full_parameters(engine.module)
        engine.destroy()

    model = shard_fsdp2(llama(seed=9))
    optimizer = AdamMini.from_model(model, **HYPER)
    load_fsdp2(model, optimizer, folder / "fsdp2")
    train_plain(model, optimizer, local_batches()[BEFORE:])
    results["fsdp2"] = full_parameters(model)

    model = shard_fsdp2(llama(seed=9))
    optimizer = BAdam.from_model(model, **BADAM["hyper"])
    position = {"position": optimizer.position._asdict()}
    dcp.load(position, checkpoint_id=folder / "fsdp2, BAdam, position")
    optimizer.resume_at(position["position"].values())  # state is written and read for the active block alone
    load_fsdp2(model, optimizer, folder / "fsdp2, BAdam")
    train_plain(model, optimizer, local_batches()[BEFORE:])
    results["fsdp2, BAdam"] = full_parameters(model)
    return results


def continue_elsewhere(case: dict, weights: dict[str, torch.Tensor], parts: list[StatePart], keep_state: bool) -> dict:
    """Go on under ZeRO-3 on any number of ranks, from whole weights and from the state that others gave out."""
    model = llama()
    model.load_state_dict(weights)
    engine = initialize(model, ds_config(**case), model_parameters=model.parameters())
    if keep_state:
        engine.basic_optimizer.load_named_state(parts)
    train(engine, local_batches()[BEFORE:])
    results = full_parameters(engine.module)
    engine.destroy()
    return results


def continue_with_and_without_state(runs: dict[str, tuple]) -> dict[str, tuple]:
    """For each stage of a run to go on under: weights at the end with its state by name, and without."""
    return {
        stage: tuple(continue_elsewhere(STAGES[stage], weights, parts, keep) for keep in (True, False))
        for stage, (weights, parts) in runs.items()
    }
