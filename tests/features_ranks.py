"""Worker of test_features.py: features of DeepSpeed beside the stages, each with all methods."""

from __future__ import annotations

import contextlib
import gc
import re
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from engines_ranks import message
from tiny import FIRST_ORDER, HYPER, batches, ds_config, full_parameters, initialize, llama, local
from torch.nn.functional import cross_entropy, pad

from ds_memopt.optimizers import METHODS

STEPS = 2
ADAM = HYPER | {"eps": 1e-5}
ROTATION = {"switch_every": 1, "include_embedding": True, "include_lm_head": True}
OPTIONS = {
    "AdamW": ADAM,
    **{word: method.accepted(ADAM) for word, method in FIRST_ORDER.items()},
    "BAdam": ADAM | ROTATION,
    "MeZO": {"lr": 1e-4, "noise": "rademacher", "compiled": False},
    "IPSGD": {"lr": 0.1},
    "Addax": {"lr": 0.1, "alpha": 0.005, "epsilon": 1e-2, "compiled": False, "length_threshold": 11},
}
BF16_MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


@contextlib.contextmanager
def running(method: str, stage: int, hyper: dict | None = None, seed: int = 0, lr_scheduler=None, **changes):
    model = llama(seed)
    config = ds_config(stage, method, OPTIONS[method] | (hyper or {}), **changes)
    engine = initialize(model, config, model_parameters=model.parameters(), lr_scheduler=lr_scheduler)
    yield engine
    engine.destroy()


def rows(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of which every other row is short."""
    there = torch.ones_like(batch)
    there[::2, 10:] = 0
    return {"input_ids": batch, "attention_mask": there, "labels": batch.where(there == 1, -100)}


def steps(engine, data) -> None:
    for batch in map(rows, data):
        engine.backward(engine(**batch).loss)
        engine.step()


def trained(method: str, stage: int, hyper: dict | None = None, **changes) -> dict[str, torch.Tensor]:
    with running(method, stage, hyper, **changes) as engine:
        steps(engine, local(STEPS))
        return full_parameters(engine.module)


PROFILED = {
    "AdamW": ("AdamW", {}), "MeZO": ("MeZO", {}), "MeZO, closure": ("MeZO", {}), "IPSGD": ("IPSGD", {}),
    "IPSGD, two passes": ("IPSGD", {"clip": "two_pass"}), "Addax": ("Addax", {}),
}  # fmt: skip


def profiled(case: str, stage: int, folder: Path) -> dict:
    """What timers and profiler say of the second step, and the weights with and without them."""
    method, hyper = PROFILED[case]
    report = folder / f"{case} {stage}"
    told = {
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(report)},
    }
    result = {}
    for key, changes in (("without", {}), ("weights", told)):
        with running(method, stage, hyper, **changes) as engine:
            for batch in local(3):
                if case == "MeZO, closure":
                    engine.train_step(lambda batch=batch, engine=engine: engine(**rows(batch)).loss)
                    continue
                loss = engine(**rows(batch)).loss
                after_forward = time.time()
                engine.backward(loss)
                # DeepSpeed measures nothing in its first two steps.
                result["began in the forward"] = 0 < engine.tput_timer.start_time <= after_forward
                engine.step()
            result[key] = full_parameters(engine.module)
            result["timers"] = engine.get_wall_clock_timers()
    text = report.read_text()
    result["flops"] = re.search(r"fwd flops per GPU: +([0-9.]+ [KMG])", text)[1]
    result["backward"] = float(re.search(r"bwd FLOPS per GPU = (\S+) \* fwd", text)[1])
    return result


CYCLE = {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3, "cycle_first_step_size": 2}
TORCHS = ((0, "OneCycleLR"), (3, "OneCycleLR"), (2, "callable"))
SCHEDULES = {method: ((3, "OneCycle"), TORCHS[number % 3]) for number, method in enumerate(METHODS)}
"""For each method the stage and the kind of a schedule of DeepSpeed's and of one of torch's."""
ONE_CYCLE = {"max_lr": 1e-3, "total_steps": 5}


def scheduled(method: str, stage: int, kind: str, momentum: bool) -> tuple[list[tuple], dict[str, torch.Tensor]]:
    """lr and betas of each step, and the weights. kind: DeepSpeed's or torch's by JSON, or torch's as a callable."""
    off = {} if momentum else {"cycle_momentum": False}
    if kind == "callable":
        given = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, **ONE_CYCLE, **off)}
    else:
        given = {"scheduler": {"type": kind, "params": (CYCLE if kind == "OneCycle" else ONE_CYCLE) | off}}
    seen = []
    with running(method, stage, **given) as engine:
        for batch in local(4):
            group = engine.basic_optimizer.param_groups[0]
            seen.append((group["lr"], tuple(group.get("betas", ()))))
            steps(engine, [batch])
        return seen, full_parameters(engine.module)


def schedules() -> dict[tuple, tuple]:
    results = {}
    for method, cases in SCHEDULES.items():
        for stage, kind in cases:
            results[method, stage, kind] = scheduled(method, stage, kind, method in FIRST_ORDER or kind == "OneCycle")
    for kind in ("OneCycleLR", "callable"):
        for method in ("MeZO", "IPSGD", "Addax"):
            results[method, kind] = message(scheduled, method, 2, kind, True)
    return results


def keys_for_masters() -> dict[tuple, tuple]:
    """Weights of the methods that have no masters, with the keys for these and without."""
    results, offload = {}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    for method, stages in {"MeZO": (1, 3), "IPSGD": (2, 3), "Addax": (1, 2)}.items():
        for stage in stages:
            keys = {"bf16": BF16_MASTERS | {"bf16_optimizer_states": stage != 1}, **(offload if stage == 2 else {})}
            results[method, stage] = trained(method, stage, bf16={"enabled": True}), trained(method, stage, **keys)
    hyper, fp16 = {"keep": "fp32"}, {"enabled": True}
    keys = fp16 | {"fp16_master_weights_and_grads": True}
    results["MeZO", "fp16"] = trained("MeZO", 2, hyper, fp16=fp16), trained("MeZO", 2, hyper, fp16=keys)
    hyper |= {"clip": "two_pass"}
    for method in ("IPSGD", "Addax"):
        results[method, "fp16"] = trained(method, 2, hyper, fp16=fp16), trained(method, 2, hyper, fp16=keys)
    return results


def layers() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)]


def mean_square(output, target):
    return (output - target).square().mean()


INCLUDE = {"GWT": {"include": ["weight"]}}
BLOCKS = {"switch_every": 1, "blocks": [["^0", "^2"], ["^4"]]}


def in_pipeline(method: str, stage: int, stages: int) -> dict[str, torch.Tensor]:
    """This rank's weights after 4 steps of 2 micro-batches."""
    model = PipelineModule(layers=layers(), num_stages=stages, loss_fn=mean_square, partition_method="uniform")
    replicas = dist.get_world_size() // stages
    hyper = ADAM | BLOCKS if method == "BAdam" else OPTIONS[method] | INCLUDE.get(method, {})
    config = ds_config(stage, method, hyper) | {
        "train_micro_batch_size_per_gpu": 4 // replicas, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    engine = initialize(model, config, model_parameters=list(model.parameters()))
    generator, rank = torch.Generator().manual_seed(1), engine.grid.get_data_parallel_rank()
    data = [torch.randn(4, 8, generator=generator).chunk(replicas)[rank] for _ in range(8)]
    micro_batches = iter([(rows, rows[:, :3]) for rows in data])
    for _ in range(4):
        engine.train_batch(micro_batches)
    weights = full_parameters(engine.module)
    engine.destroy()
    return weights


class Experts(torch.nn.Module):
    """Four experts of DeepSpeed between two layers. share: over how many ranks they are spread."""

    def __init__(self, share: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 12)
        expert = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 12))
        self.moe = MoE(12, expert, num_experts=4, ep_size=share, k=1, capacity_factor=4.0, use_rts=False)
        self.last = torch.nn.Linear(12, 3)

    def forward(self, inputs):
        return self.last(self.moe(torch.tanh(self.first(inputs)))[0]).square().mean()


def with_experts(method: str, stage: int, share: int) -> dict[str, torch.Tensor]:
    """Weights of all experts and of the rest after 4 steps."""
    model = Experts(share)
    own = INCLUDE | {"BAdam": {"switch_every": 2, "blocks": [["^first", "^last"], ["^moe"]]}}
    hyper = (ADAM if method in own else OPTIONS[method]) | own.get(method, {})
    engine = initialize(model, ds_config(stage, method, hyper), model_parameters=model.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        data = torch.randn(8, 4, 8, generator=generator).chunk(dist.get_world_size())[dist.get_rank()]
        engine.backward(engine(data))
        engine.step()
    held = full_parameters(model)
    engine.destroy()
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, held)
    whole = {}
    for rank, weights in enumerate(everywhere):
        for name, weight in weights.items():
            if found := re.search(r"deepspeed_experts\.(\d)", name):
                number = int(found[1]) + rank * 4 // share if share > 1 else int(found[1])
                name = name.replace(found[0], f"expert {number}")
            whole.setdefault(name, weight)
    return whole


def sequence_parallel(method: str, stage: int, mpu) -> dict[str, torch.Tensor]:
    """Whole sequences, whose halves lie on two ranks. mpu: Ulysses' groups."""
    model = llama(num_attention_heads=8, num_key_value_heads=4, hidden_size=32, head_dim=4, attn_implementation="sdpa")
    config = ds_config(stage, method, OPTIONS[method]) | {
        "train_micro_batch_size_per_gpu": 12, "sequence_parallel_size": 2,
    }  # fmt: skip
    engine = initialize(model, config, model_parameters=model.parameters(), mpu=mpu)
    rank = dist.get_rank(mpu.get_sequence_parallel_group())
    for batch in batches(STEPS):
        labels = pad(batch, (0, 1), value=-100)[:, 1:]
        tokens, positions, labels = (t.chunk(2, 1)[rank] for t in (batch, torch.arange(16).expand(12, 16), labels))
        logits = engine(input_ids=tokens, position_ids=positions).logits
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        # DeepSpeed averages the gradients of a sequence's parts at ZeRO-3, and adds them up at the other stages.
        engine.backward(total * (2 if stage == 3 else 1) / (12 * 15))
        engine.step()
    weights = full_parameters(engine.module)
    engine.destroy()
    return weights


def register_ulysses():
    model = llama(num_attention_heads=8, num_key_value_heads=4, hidden_size=32, head_dim=4, attn_implementation="sdpa")
    return UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", sequence_parallel_size=2, micro_batch_size=12, seq_length=16, seq_length_is_variable=False
    )


def two_engines(method: str, stage: int) -> list[tuple]:
    """Weights of two models, trained one after the other and both at once."""
    alone = []
    for seed in (0, 1):
        with running(method, stage, seed=seed) as engine:
            steps(engine, local(STEPS))
            alone.append(full_parameters(engine.module))
    with running(method, stage) as actor, running(method, stage, seed=1) as critic:
        for batch in map(rows, local(STEPS)):
            losses = [engine(**batch).loss for engine in (actor, critic)]
            for engine, loss in zip((actor, critic), losses, strict=True):
                engine.backward(loss)
            actor.step()
            critic.step()
        return list(zip(alone, (full_parameters(engine.module) for engine in (actor, critic)), strict=True))


def secondary(method: str, size: int, **changes) -> tuple[dict, dict, dict]:
    """ZeRO-3 with a second copy of the weights among `size` ranks: weights, and what this rank holds where."""
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed keeps it for the process
    without = trained(method, 3, **changes)
    with running(method, 3, zero_optimization={"zero_hpz_partition_size": size}, **changes) as engine:
        steps(engine, local(STEPS))
        weights = full_parameters(engine.module)  # which gathers, and makes the second copies
        parameter = engine.module.lm_head.weight
        held = {
            "first": parameter.ds_numel / parameter.ds_tensor.ds_numel,
            "second": parameter.ds_numel / parameter.ds_secondary_tensor.ds_numel,
            "group": dist.get_process_group_ranks(groups._get_zero_param_intra_parallel_group()),
        }
        optimizer = engine.basic_optimizer
        if method in FIRST_ORDER:
            held["optimizer"] = {dist.get_world_size(b.process_group) for _, _, b in optimizer.placement.flats}
        else:
            held["optimizer"] = {dist.get_world_size(optimizer.placement.process_group)}
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    return without, weights, held


def refusals() -> dict[tuple, str]:
    """What deepspeed.initialize says."""
    cpu, deepcompile = {"offload_optimizer": {"device": "cpu"}}, {"compile": {"deepcompile": True}}
    quantized = {"zero_optimization": {"zero_quantized_gradients": True}}
    both = BF16_MASTERS | {"bf16_optimizer_states": True}
    fp16 = {"enabled": True, "fp16_master_weights_and_grads": True}
    cases = {
        **{("bf16_masters", m, 2): {"bf16": both} for m in ("CAME", "BAdam")},
        **{("bf16_masters_on_cpu", m, n): {"bf16": BF16_MASTERS} for n, m in enumerate(FIRST_ORDER) if n},
        ("bf16_masters_on_cpu", "AdamMini", 3): {"bf16": both, "zero_optimization": cpu},
        **{("fp16_masters", m, 1): {"fp16": fp16} for m in FIRST_ORDER},
        **{("bf16_autocast", m, stage): AUTOCAST for m, stage in (("MeZO", 0), ("MeZO", 3), ("Addax", 2))},
        **{("quantized_gradients", m, 3): quantized for m in ("IPSGD", "Addax")},
        **{("deepcompile", m, 2): deepcompile for m in ("BAdam", "MeZO", "IPSGD", "Addax")},
    }
    told = {}
    for (feature, method, stage), changes in cases.items():
        with contextlib.ExitStack() as stack:
            told[feature, method, stage] = message(stack.enter_context, running(method, stage, **changes))
    for method in ("BAdam", "MeZO", "IPSGD", "Addax"):
        told["pipeline", method, 1] = message(in_pipeline, method, 1, 1)
    for method in ("MeZO", "IPSGD", "Addax"):
        told["deepspeed_moe", method, 2] = message(with_experts, method, 2, 1)
    return told


def alive_after_destroy(method: str, stage: int) -> tuple[bool, bool]:
    """Whether the model of a destroyed engine is still there, and whether once DeepSpeed's own lists are emptied."""
    with running(method, stage) as engine:
        steps(engine, local(1))
        model = weakref.ref(engine.module)
    del engine
    gc.collect()
    before = model() is not None
    # At ZeRO-3 a list of modules, and a cache of a method, with what it was called on.
    parameter_offload.FWD_MODULE_STACK.clear()
    release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    release.__closure__[0].cell_contents.cache_clear()
    gc.collect()
    return before, model() is not None


def on_one_rank(folder: Path) -> dict:
    # ZeRO-3 replaces torch's linear function for good, by one that the profiler counts otherwise: first of all.
    return {
        "profiled": {(case, stage): profiled(case, stage, folder) for stage in (3, 0) for case in PROFILED},
        "schedules": schedules(),
        "keys_for_masters": keys_for_masters(),
        "refusals": refusals(),
        "alive": {(m, stage): alive_after_destroy(m, stage) for m in OPTIONS for stage in (0, 2, 3)},
    }


AUTOCAST_AT = {"AdamMini": (0, 2, 3), "BAdam": (3,), "GWT": (0,), "CAME": (2,), "IPSGD": (0, 3)}
SEQUENCE_PARALLEL_AT = {"AdamW": (0, 2, 3), "AdamMini": (2, 3), "BAdam": (3,), "GWT": (0,), "CAME": (2,)}
TWO_ENGINES_AT = {"AdamMini": 3, "BAdam": 2, "GWT": 3, "CAME": 2, "MeZO": 3, "IPSGD": 3, "Addax": 2}
"""Where a method is tried. Each is, and each stage: methods of a family meet a feature in the same code."""


def on_two_ranks() -> dict:
    tried = ("AdamW", *FIRST_ORDER)
    results = {
        "autocast": {(m, stage): trained(m, stage, **AUTOCAST) for m, at in AUTOCAST_AT.items() for stage in at},
        "two engines": {method: two_engines(method, stage) for method, stage in TWO_ENGINES_AT.items()},
        "secondary": {method: secondary(method, 2) for method in METHODS if method not in ("GWT", "CAME")},
        "experts": {
            (method, stage, share): with_experts(method, stage, share)
            for method in tried for stage in (0, 2) for share in (1, 2)
        },
        "pipeline": {
            (method, stage, stages): in_pipeline(method, stage, stages)
            for method in ("AdamMini", "GWT") for stage in (0, 1) for stages in (1, 2)
        },
    }  # fmt: skip
    mpu = register_ulysses()  # for good
    results["sequence"] = {
        (method, stage): sequence_parallel(method, stage, mpu)
        for method, stages in SEQUENCE_PARALLEL_AT.items()
        for stage in stages
    }
    results["refused"] = {m: message(sequence_parallel, m, 2, mpu) for m in ("MeZO", "IPSGD", "Addax")}
    return results


def on_four_ranks() -> dict:
    return {method: secondary(method, 2) for method in ("AdamMini", "IPSGD")}
