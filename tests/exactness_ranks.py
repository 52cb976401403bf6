"""Worker of test_exactness.py: train the same model under one placement after another."""

from __future__ import annotations

import itertools
from unittest import mock

import torch
import torch.distributed as dist
from tiny import (
    HYPER,
    batches,
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
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.adamw import AdamW
from ds_memopt.shards import Seams

STEPS = 5
RULES = {
    "AdamW": ("AdamW", {}),
    "AdamMini": ("AdamMini", {}),
    "GWT": ("GWT", {"level": 2}),
    "GWT, adam_mini": ("GWT", {"level": 3, "base": "adam_mini"}),
    "BAdam": ("BAdam", {}),
    "BAdam, adam_mini": ("BAdam", {"base": "adam_mini"}),
    "BAdam, gwt": ("BAdam", {"base": "gwt", "base_options": {"level": 2}, "switch_every": 2}),
}
"""Each rule under test: the method and what it is given besides HYPER."""
BASE_RULES = {"BAdam": "our AdamW", "BAdam, adam_mini": "AdamMini", "BAdam, gwt": "GWT"}
"""For each rotating rule the one that a fresh optimizer runs on the active block during a visit."""
BUILT_RULES = RULES | {"our AdamW": ("our AdamW", {})}
BUILT_METHODS = METHODS | {"our AdamW": AdamW}
"""BAdam must have the bits of our AdamW: torch's differ from those of a fused kernel."""
ROTATION = {
    "switch_every": 1, "order": "ascending", "start_block": 1, "include_embedding": True, "include_lm_head": True,
    "eps": 1e-4,
}  # fmt: skip
"""4 switches in 5 steps, from the first layer on and back to it; embedding and head leave a param group without a
parameter. Over GWT there are 2, as its limiter acts on a block from the second step of a visit on.

The first step of every visit is g / (|g| + eps), which makes much of the rounding of a gradient near zero: with an eps
of 1e-8 ZeRO-3, whose matrix products round differently, is off by 1e-4 on one rank, with 1e-5 by 5e-6."""
BLOCK_ORDER = ("layers.0.", "layers.1.", "lm_head model.norm", "embed_tokens")
for _, given in (RULES[rule] for rule in BASE_RULES):
    given |= ROTATION | given
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

FP32_CASES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3, zero.Init": {"stage": 3, "zero_init": True},
    "zero2, round_robin_gradients": {"stage": 2, "zero_optimization": {"round_robin_gradients": True}},
    "zero2, offload": {"stage": 2, "zero_optimization": OFFLOAD},
    "zero3, offload": {"stage": 3, "zero_optimization": OFFLOAD},
    "zero3, offload of parameters": {"stage": 3, "zero_optimization": {"offload_param": {"device": "cpu"}}},
}
LIMIT_OF = {name: name[:5] for name in FP32_CASES} | {"zero0, bf16": "zero1, bf16"}
"""Where AdamW runs for a placement's limit, if not in itself: what is kept elsewhere is computed alike."""
FOR_HSDP = ("AdamW", "GWT, adam_mini", "BAdam, gwt")
"""What the others sum over ranks is summed in one of these."""
BF16_CASES = {
    "zero0, bf16": {"stage": 0, **BF16},
    "zero1, bf16": {"stage": 1, **BF16},
    "zero1, bf16, fp32 accumulation": {"stage": 1, **BF16, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2, bf16": {"stage": 2, **BF16},
    "zero3, bf16": {"stage": 3, **BF16},
}
PLACEMENTS = ["plain", "ddp", "fsdp2", *FP32_CASES, *BF16_CASES]
CUTTING = {
    1: [],
    2: ["fsdp2", "zero2", "zero3", "zero1, bf16", "zero3, bf16"],
    3: ["fsdp2", "zero1", "zero3"],
}
"""By number of ranks the placements for all rules: each way in which parameters are cut and bound. More ranks than
cores are slow, so there are no others on three, and a fourth rank cuts no other way."""
FAMILIES = [rule for rule in RULES if rule.startswith(("AdamMini", "GWT"))], [*BASE_RULES]
"""The rules of each of our two adapters: of these one by turns runs in any other placement."""


def groups(model, active: str = "") -> list[dict]:
    """Two groups, of the parameters of one block or of all, such that ZeRO-1/2, which cuts each into even parts, cuts a
    head, a row (and on 3 ranks a group)."""
    first = ("q_proj", "k_proj", "layers.0.input_layernorm", "model.norm", "lm_head")
    words = active.split() or [""]
    named = [(name, p) for name, p in model.named_parameters() if any(word in name for word in words)]
    return [
        {"params": [p for name, p in named if any(word in name for word in first)]},
        {"params": [p for name, p in named if not any(word in name for word in first)]},
    ]


def prepared(rule: str, model):
    """With GWT each loss counts three times the last one: its limiter has to act, for its sums over ranks to be seen.
    It does on every matrix, in each of the last three steps; inside BAdam on most, in the second step of a visit."""
    if "gwt" in rule.lower():
        factors = (3**number for number in itertools.count())

        def grow(module, inputs, output):
            output.loss = output.loss * next(factors)

        model.register_forward_hook(grow)
    return model


def build_plain(rule: str, model, active: str = "", **changes):
    method, options = BUILT_RULES[rule]
    if method == "AdamW":
        return torch.optim.AdamW(groups(model, active), **HYPER | changes)
    return BUILT_METHODS[method].from_model(model, groups(model, active), **HYPER | options | changes)


def visits(rule: str) -> list[tuple[dict, list[torch.Tensor]]]:
    """What a run is made of: what to build for a visit (rule, words that tell its parameters, eps), and its batches."""
    data = list(batches(STEPS))
    if rule not in BASE_RULES:
        return [({"rule": rule, "active": ""}, data)]
    base, length = {"rule": BASE_RULES[rule], "eps": ROTATION["eps"]}, RULES[rule][1]["switch_every"]
    starts = range(0, STEPS, length)
    return [(base | {"active": BLOCK_ORDER[i % 4]}, data[start : start + length]) for i, start in enumerate(starts)]


def one_process(rule: str) -> dict[str, torch.Tensor]:
    """Plain PyTorch on the whole batch: what every placement must reproduce. A fresh optimizer for each visit."""
    model = prepared(rule, llama())
    for visit, data in visits(rule):
        train_plain(model, build_plain(model=model, **visit), data)
        model.zero_grad()
    return full_parameters(model)


def one_process_bf16(rule: str) -> dict[str, torch.Tensor]:
    """bf16 weights and gradients with fp32 masters, written out by hand."""
    model = prepared(rule, bf16_llama())
    for visit, data in visits(rule):
        words = visit["active"].split() or [""]
        trained = {name: p for name, p in model.named_parameters() if any(word in name for word in words)}
        masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in trained.items()}
        method, options = BUILT_RULES[visit["rule"]]
        hyper = HYPER | {"eps": visit.get("eps", HYPER["eps"])}
        if method == "AdamW":
            inner = torch.optim.AdamW(masters.values(), **hyper)
        else:
            rule_of = BUILT_METHODS[method]
            inner = rule_of(masters.items(), **rule_of.accepted(hyper | options | {"head_dim": model.config.head_dim}))
        for batch in data:
            model(input_ids=batch, labels=batch).loss.backward()
            for name, p in trained.items():
                masters[name].grad = p.grad.float()
            model.zero_grad()
            inner.step()
            for name, p in trained.items():
                p.data.copy_(masters[name])
    return full_parameters(model)


def without_deepspeed(rule: str, wrap) -> dict[str, torch.Tensor]:
    model = wrap(prepared(rule, llama()))
    train_plain(model, build_plain(rule, model), local(STEPS))
    return full_parameters(model)


def zero(rule: str, stage: int, zero_init: bool = False, **changes) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights after STEPS under ZeRO, and what rank borders cut: {structure: {parameter name: number of blocks}}."""
    method, options = RULES[rule]
    if method == "AdamW" and changes.get("zero_optimization") is OFFLOAD:
        # DeepSpeed's CPU Adam would compile for minutes; torch's is the same formula.
        changes["zero_force_ds_cpu_optimizer"] = False
    config = ds_config(stage, method, HYPER | options, **changes)
    model = prepared(rule, llama_under_zero_init(config) if zero_init else llama())
    engine = initialize(model, config, model_parameters=groups(model))
    inner = engine.basic_optimizer
    assert type(inner).__name__ == method
    cut = {}
    if method != "AdamW":
        for tensor, name in inner.placement.named_tensors(inner.param_groups):
            for structure, index in inner._index((tensor,), (name,)).items():
                intervals = cut.setdefault("intervals", {}).setdefault(structure, [])
                intervals += [(part.interval, part.first, part.count) for part in index.intervals[0]]
                for _, table in index.seams.tables:
                    cut.setdefault(structure, {}).update((name, len(ids)) for name, ids in table._units.items())
    train(engine, local(STEPS))
    parameters = full_parameters(engine.module)
    engine.destroy()
    return parameters, cut


def without_seams(rule: str, stage: int) -> dict[str, torch.Tensor]:
    """The bug that seams prevent: each rank takes what it holds of a block for the whole."""
    with mock.patch.object(Seams, "begin_sum", lambda seams, slots: lambda: None):
        return zero(rule, stage)[0]


def is_tried(rule: str, placement: str) -> bool:
    """AdamW where it makes a limit: on one rank at ZeRO-3 in fp32 only."""
    ranks = dist.get_world_size()
    if ranks == 3 or placement in CUTTING[ranks]:
        return placement in CUTTING[ranks]
    if rule == "AdamW":
        return LIMIT_OF.get(placement, placement) == placement if ranks == 2 else placement == "zero3"
    (family,) = (family for family in FAMILIES if rule in family)
    return (PLACEMENTS.index(placement) + ranks) % len(family) == family.index(rule)


def all_placements():
    """{rule: {placement: weights}}, {rule: {placement: what is cut}}, {rule: weights with the seams left open}."""
    results = {rule: {} for rule in RULES}
    cuts = {rule: {} for rule in RULES}
    ranks, wraps = dist.get_world_size(), {"ddp": DistributedDataParallel, "fsdp2": shard_fsdp2}
    if ranks == 1:
        wraps["plain"] = lambda model: model
    for rule in RULES:
        for placement, wrap in wraps.items():
            if is_tried(rule, placement) and not (placement == "ddp" and rule in BASE_RULES):
                results[rule][placement] = without_deepspeed(rule, wrap)
        for placement, case in (FP32_CASES | BF16_CASES).items():
            if is_tried(rule, placement):
                results[rule][placement], cuts[rule][placement] = zero(rule, **case)
    summed = [rule for rule in RULES if rule not in ("AdamW", "BAdam") and ranks == 3]
    return results, cuts, {rule: without_seams(rule, stage=2) for rule in summed}


def shards_held_twice() -> dict[str, dict[str, torch.Tensor]]:
    """HSDP: shards on two of four ranks, twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return {rule: without_deepspeed(rule, lambda model: shard_fsdp2(model, mesh)) for rule in FOR_HSDP}
