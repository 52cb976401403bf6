"""Worker of test_plan.py: what DeepSpeed's engines hold and send under every method and stage."""

from __future__ import annotations

import torch
from release_ranks import GradientsAlive
from tiny import ds_config, initialize, llama, local
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR

from ds_memopt.engines.fsdp2_engine import Fsdp2Engine, shard
from ds_memopt.engines.held_bytes import gradient_bytes, held_bytes
from ds_memopt.measure import CommunicationMeter
from ds_memopt.optimizers import METHODS as OURS

SIZES = {"hidden_size": 45, "num_hidden_layers": 3, "num_attention_heads": 15}
"""Of which no parameter divides by the ranks, and not the sum of them."""
METHODS = {
    "AdamW": {},
    "AdamMini": {},
    "AdamMini, release": {"release_gradients": True},
    "AdamMini, once": {},
    "AdamMini, replicas": {},
    "AdamMini, compact": {"state_dtype": "int8", "masters": "remainder16"},
    "GWT": {},
    "GWT, release": {"release_gradients": True},
    "GWT, adam_mini": {"base": "adam_mini"},
    "GWT, compact": {"base": "adam_mini", "state_dtype": "int8", "masters": "remainder8"},
    "BAdam": {"order": "ascending", "start_block": 1},
    "BAdam, adam_mini": {"base": "adam_mini", "order": "descending"},
    "MeZO": {"compiled": False},
    "MeZO, one-sided": {"estimator": "one_sided", "keep": "fp32", "compiled": False},
    "IPSGD": {},
    "IPSGD, adalomo": {"rule": "adalomo"},
    "IPSGD, two passes": {"clip": "two_pass"},
    "Addax": {"length_threshold": 8, "compiled": False},
}
SMALL = {
    "sub_group_size": 3000, "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 0,
    "reduce_bucket_size": 20000,
}  # fmt: skip
PLACEMENTS = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, **SMALL, "stage3_max_reuse_distance": 0},
    # A layer has 28,745 elements: as in a model of usual size it stays gathered for both signs.
    "zero3, a layer": {"stage": 3, **SMALL, "stage3_max_reuse_distance": 30000},
    "zero3, all": {"stage": 3, **SMALL},
    "fsdp2": {"stage": "FSDP2"},
}
UNDER_FSDP2 = (
    "AdamW",
    "AdamMini",
    "AdamMini, once",
    "AdamMini, release",
    "AdamMini, compact",
    "GWT",
    "GWT, release",
    "GWT, compact",
)
UNDER_FSDP2_WITH_MORE_RANKS = (
    "AdamMini",
    "AdamMini, once",
    "AdamMini, replicas",
    "AdamMini, release",
    "GWT",
    "GWT, release",
    "GWT, compact",
)
FP32 = [("AdamW", "zero2"), ("AdamMini", "zero3"), ("GWT", "zero0"), ("IPSGD", "zero1")]
"""Tried in fp32 as well."""
WITH_MORE_RANKS = ("AdamMini", "GWT", "BAdam", "MeZO", "IPSGD")
"""One for each way to divide what is held; AdamW's masters are AdamMini's, and Addax holds what IPSGD does."""
FEW = ("zero1", "zero3, a layer")
"""Placements that cut parameters in all ways that there are."""


def cases(ranks: int) -> list[tuple[str, str, str]]:
    """(method, placement, dtype). To save time, options and more ranks, which change sizes alone, under few placements,
    and the longest and the shortest distance for one method of each way through the model."""
    under_fsdp2 = UNDER_FSDP2 if ranks == 2 else UNDER_FSDP2_WITH_MORE_RANKS
    under_fsdp2 = [(method, "fsdp2", "bf16") for method in under_fsdp2]
    in_zero = [method for method in METHODS if not method.endswith(("release", "once", "replicas"))]
    if ranks > 2:
        few = [(method, placement, "bf16") for method in WITH_MORE_RANKS for placement in FEW]
        return few + under_fsdp2
    stages = [placement for placement in PLACEMENTS if placement != "fsdp2"]
    tried = [(method, placement) for method in in_zero for placement in (FEW if "," in method else stages)]
    left_out = [(method, "zero3, all") for method in ("AdamMini", "GWT", "IPSGD", "Addax")]
    left_out += [(method, "zero3") for method in ("AdamW", "AdamMini", "GWT")]  # AdamMini's is tried in fp32
    return [
        *((*case, "bf16") for case in tried if case not in left_out), *((*case, "fp32") for case in FP32), *under_fsdp2,
    ]  # fmt: skip


def replicas_of(method: str) -> int:
    return 2 if method.endswith("replicas") else 1


def type_of(method: str) -> str:
    return method.split(",")[0]


def param_groups(model) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def halves(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every third row is short."""
    mask = torch.ones_like(tokens)
    mask[::3, 8:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def under_fsdp2(method: str) -> dict:
    model = llama(**SIZES)
    compact = "masters" in METHODS[method]
    for p in model.parameters() if compact else ():  # buffers stay in fp32
        p.data = p.data.bfloat16()
    shard(model, bf16=not compact, replicas=replicas_of(method))
    alive = GradientsAlive(model)
    if method == "AdamW":
        optimizer = torch.optim.AdamW(param_groups(model), lr=1e-4)
    else:
        optimizer = OURS[type_of(method)].from_model(model, param_groups(model), lr=1e-4, **METHODS[method])
    once, schedule = method.endswith("once"), LambdaLR(optimizer, lambda _: 1.0)
    engine = Fsdp2Engine(model, optimizer, schedule, 2 if once else 1, 0.0, None, reduce_once=once)
    whole, step = [], engine.step
    engine.step = lambda: (whole.append(kept_whole(model)), step())
    result = measured_in(engine, torch.device("cpu"), method) | {"most": alive.most}
    return result | {"gradients": whole[0]} if once else result


def kept_whole(model) -> int:
    """Bytes of the gradients that FSDP2 has not reduced yet."""
    units = [one._get_fsdp_state()._fsdp_param_group for one in model.modules() if isinstance(one, FSDPModule)]
    kept = [p.unsharded_accumulated_grad for unit in units for p in unit.fsdp_params]
    return sum(gradient.nbytes for gradient in kept if gradient is not None)


def measured(method: str, placement: str, dtype: str) -> dict:
    if placement == "fsdp2":
        return under_fsdp2(method)
    model, zero = llama(**SIZES), PLACEMENTS[placement]
    bf16 = {"bf16": {"enabled": dtype == "bf16"}}
    if "masters" in METHODS[method]:
        bf16["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = ds_config(zero["stage"], type_of(method), {"lr": 1e-4} | METHODS[method], **bf16)
    config["zero_optimization"] = zero
    engine = initialize(model, config, model_parameters=param_groups(model))
    # Until states are there, and ZeRO-3 has traced a step; these try a step in two passes first.
    traced = 5 if type_of(method) in ("MeZO", "Addax") else 3
    result = measured_in(engine, engine.device, method, traced if zero["stage"] == 3 else 2)
    engine.destroy()
    return result


def measured_in(engine, device: torch.device, method: str, number_of_steps: int = 2) -> dict:
    steps = local(number_of_steps)
    batches = [halves(batch) if method == "Addax" else {"input_ids": batch, "labels": batch} for batch in steps]
    meter = CommunicationMeter()
    for number, batch in enumerate(batches):
        if number == len(batches) - 1:
            meter.start()
        engine.backward(engine(**batch).loss)
        gradients = gradient_bytes(engine, device)
        engine.step()
    meter.stop()
    held = held_bytes(engine, device)
    return {
        "weights": held.pop("weights"),
        "masters": held.pop("masters"),
        "gradients": gradients,
        "states": held,
        "sent": {name: traffic.sent_bytes for name, traffic in meter.by_collective().items()},
        "block": getattr(engine.basic_optimizer, "active_block", None),
    }


def everything(ranks: int) -> dict:
    return {case: measured(*case) for case in cases(ranks)}
