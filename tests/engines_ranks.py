"""Worker of test_engines.py: Trainer, accelerate, refused configurations and traffic, on two ranks."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from unittest import mock

import accelerate
import deepspeed
import release_ranks
import torch
import torch.distributed as dist
from accelerate.utils import DummyOptim
from deepspeed.ops.op_builder import CPUAdamBuilder
from tiny import (
    FIRST_ORDER,
    GLOBAL_BATCH,
    HYPER,
    batches,
    ds_config,
    full_parameters,
    initialize,
    llama,
    shard_fsdp2,
    train,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import Trainer, TrainingArguments

import ds_memopt
from ds_memopt import AdamMini
from ds_memopt.measure import CommunicationMeter

STEPS = 4
CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
TRAINER_FILES = (
    "zero2_adam_mini", "zero3_adam_mini", "zero2_offload_adam_mini", "zero3_gwt", "zero2_badam", "zero3_badam",
)  # fmt: skip
SAVED, CHECKPOINT = "zero2_adam_mini", "zero2_adam_mini/checkpoint-2"
ROTATION = {"switch_every": 1, "include_embedding": True, "include_lm_head": True, "eps": 1e-5}
"""What BAdam is given besides HYPER in the runs of 4 steps: 4 blocks of one step each. For eps see exactness.py."""
OPTIONS = {"BAdam": ROTATION}
FROZEN_OPTIONS = {"BAdam": {"switch_every": 2, "blocks": [["layers.1"], ["lm_head"]]}}
SMALL_OPTIONS = {"BAdam": {"switch_every": 2, "blocks": [["0.weight", "2.bias"], ["0.bias", "2.weight"]]}}


def rows() -> list[dict]:
    """The rows of the global batches, in order: what a sequential sampler deals out."""
    return [{"input_ids": row, "labels": row} for batch in batches(STEPS) for row in batch]


class InOrderTrainer(Trainer):
    """The only change to the Trainer: rows in the order of the dataset, so that runs can be compared."""

    def _get_train_sampler(self, *arguments):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder: Path, file: str, resume: Path | None = None) -> dict[str, torch.Tensor]:
    """transformers' Trainer with nothing but the JSON of ds_configs, "auto" values included. SAVED saves portable
    checkpoints, too; resume: one to go on from."""
    ds_memopt.register()
    config = json.loads((CONFIGS / f"{file}.json").read_text())
    config["gradient_clipping"] = "auto"
    config["optimizer"]["params"] |= OPTIONS.get(config["optimizer"]["type"], {})
    config["scheduler"] = {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto", "warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto",
        },
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=GLOBAL_BATCH // 2 // dist.get_world_size(),
        gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=HYPER["lr"], adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=HYPER["weight_decay"], warmup_steps=2, max_grad_norm=0.5, deepspeed=config, report_to=[],
        adam_epsilon=(ROTATION if "badam" in file else HYPER)["eps"], gradient_checkpointing="badam" in file,
        use_cpu=True, save_strategy="steps" if file == SAVED else "no", save_steps=1, save_total_limit=3,
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    run = InOrderTrainer(model=llama(), args=arguments, train_dataset=rows())
    if file == SAVED or resume:
        run.add_callback(ds_memopt.PortableCheckpoint(run))
    run.train(resume_from_checkpoint=resume and str(resume))
    assert type(run.deepspeed.basic_optimizer).__name__ == config["optimizer"]["type"]
    weights = full_parameters(run.deepspeed.module)
    run.deepspeed.destroy()
    return weights


def with_accelerate(stage: int, method: str) -> dict[str, torch.Tensor]:
    ds_memopt.register()
    reset_accelerate()
    plugin = accelerate.DeepSpeedPlugin(
        hf_ds_config=ds_config(stage, method, FIRST_ORDER[method].accepted(HYPER) | OPTIONS.get(method, {}))
    )
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    model = llama()
    model, optimizer = accelerator.prepare(model, DummyOptim(model.parameters(), **HYPER))
    for batch in batches(STEPS, dist.get_rank(), dist.get_world_size()):
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert type(model.basic_optimizer).__name__ == method
    weights = full_parameters(model.module)
    model.destroy()
    return weights


def swapped_by_accelerate() -> str:
    """accelerate replaces an optimizer object by DeepSpeedCPUAdam where the config offloads it."""
    ds_memopt.register()
    reset_accelerate()
    config = ds_config(2, zero_optimization={"offload_optimizer": {"device": "cpu"}})
    del config["optimizer"]
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=config)
    accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
    model = llama()
    # DeepSpeedCPUAdam itself, but not its kernel, which takes minutes to compile and never gets to run here.
    with mock.patch.object(CPUAdamBuilder, "load", mock.MagicMock()):
        return message(accelerator.prepare, model, AdamMini.from_model(model, **HYPER))


def reset_accelerate() -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch --use_deepspeed` sets it
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def message(function, *arguments, **keywords) -> str:
    """The error that a call ends in, of whatever kind."""
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals() -> dict[str, str]:
    """What deepspeed.initialize says to configurations that would go wrong."""
    cpu = {"device": "cpu"}
    zero_cases = {
        "elastic_checkpoint": (2, {"elastic_checkpoint": True}),
        "nvme_offload": (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/nonexistent"}}),
        "partial_offload": (3, {"offload_optimizer": cpu | {"ratio": 0.5}}),
        "super_offload": (3, {"offload_optimizer": cpu | {"super_offload": True}}),
        "zenflow": (2, {"offload_optimizer": cpu, "zenflow": {"topk_ratio": 0.1, "update_interval": 2}}),
    }
    cases = {name: ds_config(stage, zero_optimization=change) for name, (stage, change) in zero_cases.items()}
    cases["universal_checkpoint"] = ds_config(2, checkpoint={"load_universal": True})
    cases["hyper-parameter"] = ds_config(2, hyper=HYPER | {"betta": 1})
    cases["range"] = ds_config(2, hyper=HYPER | {"eps": 0})
    cases["release_gradients"] = ds_config(2, hyper=HYPER | {"release_gradients": True})
    cases["spelling"] = ds_config(2, optimizer="adam_mini")
    results = {}
    for name, config in cases.items():
        model = llama()
        results[name] = message(initialize, model, config, model_parameters=model.parameters())
    model = llama()
    results["replaced"] = message(initialize, model, ds_config(2), model_parameters=llama().parameters())
    results["swapped"] = swapped_by_accelerate()
    results["fsdp1"] = message(AdamMini.from_model, FullyShardedDataParallel(llama(), device_id=torch.device("cpu")))
    return results


def unregistered() -> str:
    """A client optimizer under ZeRO without register(): DeepSpeed itself would step on flat buffers."""
    config = ds_config(2) | {"zero_allow_untested_optimizer": True}
    del config["optimizer"]
    model = llama()
    optimizer = AdamMini.from_model(model, **HYPER)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(config))[0]
    return message(train, engine, batches(1, dist.get_rank(), dist.get_world_size()))


class Wrapper(torch.nn.Module):
    """What a training framework puts around a model, after the optimizer was built: all names change."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def client_optimizer(stage: int, **changes) -> dict[str, torch.Tensor]:
    """The same, registered: the object takes the place of the JSON block."""
    config = ds_config(stage, **changes)
    del config["optimizer"]
    model = llama()
    engine = initialize(Wrapper(model), config, optimizer=AdamMini.from_model(model, model.parameters(), **HYPER))
    train(engine, batches(STEPS, dist.get_rank(), dist.get_world_size()))
    weights = full_parameters(engine.module.inner)
    engine.destroy()
    return weights


GWT_ALIGNED = {"include": ["weight"], "level": 2}
TRAFFIC = {
    "cut": ("AdamMini", 2, {}),
    "cut, zero3": ("AdamMini", 3, {}),
    "aligned": ("AdamMini", 3, {}),
    "GWT, cut": ("GWT", 3, {"level": 3}),
    "GWT on Adam-mini, cut": ("GWT", 3, {"level": 3, "base": "adam_mini"}),
    "GWT, aligned": ("GWT", 3, GWT_ALIGNED),
    "GWT, aligned, no limiter": ("GWT", 3, GWT_ALIGNED | {"limiter": None}),
}


def traffic() -> dict[str, dict]:
    """What each call of the optimizer sends, and how many slots each structure's seams have there: {case: ...}."""
    results = {}
    for name, (method, stage, options) in TRAFFIC.items():
        # Two ranks split these matrices at a row, and a bias has a block per element.
        aligned = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        model = aligned if "aligned" in name else llama()
        config = ds_config(stage, method, HYPER | options)
        engine = initialize(model, config, model_parameters=model.parameters())
        optimizer, counted = engine.basic_optimizer, []
        original = optimizer.step

        def step(original=original, counted=counted):
            with CommunicationMeter() as meter:
                original()
            counted.append(meter.by_collective())

        optimizer.step = step
        if model is aligned:
            loss = engine(torch.ones(2, 8)).sum()
            engine.backward(loss)
            engine.step()
        else:
            train(engine, batches(1, dist.get_rank(), dist.get_world_size()))
        tensors = optimizer.placement.named_tensors(optimizer.param_groups)
        slots = [
            {structure: index.seams.num_slots for structure, index in optimizer._index((tensor,), (name,)).items()}
            for tensor, name in tensors
        ]
        results[name] = {"per call": counted, "slots": slots}
        engine.destroy()
    return results


def fsdp2_traffic() -> tuple[dict, int]:
    """The collectives of one optimizer step over all DTensors, and how many blocks are cut."""
    model = shard_fsdp2(llama())
    optimizer = AdamMini.from_model(model, **HYPER)
    for batch in batches(1, dist.get_rank(), dist.get_world_size()):
        model(input_ids=batch, labels=batch).loss.backward()
    with CommunicationMeter() as meter:
        optimizer.step()
    ((_, indexes),) = optimizer._indexes.values()
    return meter.by_collective(), indexes["block"].seams.num_slots


def small_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 15), torch.nn.Tanh(), torch.nn.Linear(15, 1))


def train_small(model, optimizer, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randn(4, 8, generator=generator).chunk(world_size)[rank]
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_parameters(model)


def empty_shards(method) -> tuple[list[int], dict[str, torch.Tensor]]:
    """FSDP2 over layers of 15 and 1 rows: uneven parts, and a rank that holds nothing of the last layer."""
    model = small_model()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    held = [p.to_local().numel() for p in model.parameters()]
    optimizer = method.from_model(model, lr=1e-2, **SMALL_OPTIONS.get(method.__name__, {}))
    weights = train_small(model, optimizer, dist.get_rank(), dist.get_world_size())
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, held)
    return gathered, weights


def frozen_parameters(method: str, stage: int) -> dict[str, torch.Tensor]:
    """A model of which only some parameters train, as with adapters."""
    model = llama()
    freeze(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    config = ds_config(stage, method, FIRST_ORDER[method].accepted(HYPER) | FROZEN_OPTIONS.get(method, {}))
    engine = initialize(model, config, model_parameters=trained)
    train(engine, batches(STEPS, dist.get_rank(), dist.get_world_size()))
    weights = full_parameters(engine.module)
    engine.destroy()
    return weights


def freeze(model) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name or "lm_head" in name)


def everything(folder: Path) -> dict:
    results = {"unregistered": unregistered(), "release": release_ranks.everything()}
    results["refusals"] = refusals()
    for stage in (2, 3):
        results[f"client {stage}"] = client_optimizer(stage)
    results["client 0"] = client_optimizer(0, bf16={"enabled": True})
    results["traffic"], results["fsdp2 traffic"] = traffic(), fsdp2_traffic()
    for file in TRAINER_FILES:
        results[file] = trainer(folder / file, file)
    results["resumed"] = trainer(folder / "resumed", "zero3_adam_mini", folder / CHECKPOINT)
    results["folder"] = folder
    for name, method in FIRST_ORDER.items():
        results[f"empty shards {name}"] = empty_shards(method)
        for stage in (2, 3):
            results[f"frozen {name} {stage}"] = frozen_parameters(name, stage)
    for number, name in enumerate(FIRST_ORDER):
        results[f"accelerate {name}"] = with_accelerate((1, 3, 2)[number % 3], name)
    return results
