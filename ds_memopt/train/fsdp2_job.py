"""The main job under FSDP2 instead of DeepSpeed's engine."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
import transformers
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from ds_memopt.engines.fsdp2_engine import Fsdp2Engine, fill, shard
from ds_memopt.engines.processes import on_all_ranks
from ds_memopt.optimizers import METHODS, method_of
from ds_memopt.train.config import SHARED_HYPERPARAMETERS
from ds_memopt.train.float8 import check_float8, use_float8
from ds_memopt.train.loop import announce, pretrain_under
from ds_memopt.train.model_speed import make_ready
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.presets import build_model, build_without_weights, parameter_groups
from ds_memopt.train.ranks import Ranks
from ds_memopt.train.settings import Settings, make_settings

logger = logging.getLogger("ds_memopt")

READ_KEYS = {
    "optimizer", "gradient_clipping", "bf16", "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps", "tensorboard", "wandb", "comet", "csv_monitor",
}  # fmt: skip
"""Keys of a DeepSpeed config that apply here."""

IGNORED_KEYS = {"zero_optimization", "steps_per_print", "wall_clock_breakdown"}
"""Keys that may stand in it and change nothing here."""


def pretrain_fsdp2(options: PretrainOptions) -> None:
    """Run the main job, as `pretrain` does, with the method and batch of the DeepSpeed config but FSDP2's sharding."""
    pretrain_under(fsdp2_settings, build_fsdp2, options)


def fsdp2_settings(options: PretrainOptions, ranks: Ranks) -> Settings:
    """The settings without ZeRO. ValueError for what the config asks of DeepSpeed alone."""
    settings = make_settings(options, ranks)
    config = settings.config
    fp16 = config.get("fp16", {}).get("enabled")
    unsupported = sorted({*config} - READ_KEYS - IGNORED_KEYS - (set() if fp16 else {"fp16"}))
    unsupported += [key for key in config.get("zero_optimization", {}) if "offload" in key]
    if unsupported:
        raise ValueError(
            f"{', '.join(unsupported)} in {options.deepspeed_config} is DeepSpeed's, and FSDP2 would not hear it: "
            "remove it, or run launch/pretrain.py"
        )
    name, params = config["optimizer"]["type"], config["optimizer"]["params"]
    if name != "AdamW" and name not in METHODS:
        raise ValueError(f"optimizer {name} runs inside DeepSpeed alone: choose AdamW or {', '.join(METHODS)}")
    if method_of(name).splits_batch:
        raise ValueError(
            f"{name} has its batches divided by DeepSpeed's engine: run launch/pretrain.py, or call "
            "optimizer.step(zo_closure, fo_closure) in a loop of your own"
        )
    if params.get("clip") == "two_pass":
        raise ValueError(
            f'{name} with clip="two_pass" runs each batch twice, which is not done here: take "tensor" or "none", or '
            "run launch/pretrain.py"
        )
    method = method_of(name)
    without_masters = method.writes_weights or method.steps_on_bf16(params)
    if config.get("bf16", {}).get("bf16_master_weights_and_grads") and not without_masters:
        raise ValueError(
            "bf16.bf16_master_weights_and_grads is DeepSpeed's: remove it, or with AdamMini or GWT ask for bf16 "
            'weights by "masters": "remainder16" in optimizer.params'
        )
    if ranks.world_size % options.replicas:
        raise ValueError(
            f"--replicas {options.replicas} does not divide the {ranks.world_size} ranks: each copy of the model has "
            "as many of them"
        )
    if options.float8:
        check_float8(options.float8, name, ranks.device, settings.facts["dtype"])
    if params.get("release_gradients"):
        _check_release(settings, name)
    if name == "AdamW":
        params.pop("torch_adam", None)  # it is torch's
        if other := sorted({*params} - {*SHARED_HYPERPARAMETERS}):
            raise ValueError(f"{', '.join(other)} is no hyper-parameter of torch's AdamW: remove it")
    config = {key: value for key, value in config.items() if key in READ_KEYS}
    sharding = "FSDP2" if options.replicas == 1 else f"FSDP2 in {options.replicas} replicas"
    return replace(settings, config=config, facts=settings.facts | {"zero_stage": sharding})


def _check_release(settings: Settings, name: str) -> None:
    """ValueError for what needs all gradients at once, where the method frees each one in backward."""
    accumulation, clipping = settings.accumulation, settings.config["gradient_clipping"]
    if accumulation > 1:
        raise ValueError(
            f"gradient_accumulation_steps={accumulation}, but {name} with release_gradients uses each gradient up in "
            "backward, at 1: set it to 1 and train_micro_batch_size_per_gpu to "
            f"{accumulation * settings.micro_batch}, which with --gradient_checkpointing takes little more memory"
        )
    if clipping:
        raise ValueError(
            f"gradient_clipping={clipping}, but {name} with release_gradients never has all gradients, whose norm it "
            "limits: set it to 0, or release_gradients to false"
        )


def build_fsdp2(options: PretrainOptions, settings: Settings, ranks: Ranks) -> Any:
    """The model under FSDP2, with the optimizer and schedule of the settings."""
    name, params = settings.config["optimizer"]["type"], settings.config["optimizer"]["params"]
    method = method_of(name)
    model = _build_model(options, settings, ranks, method.writes_weights or method.steps_on_bf16(params))
    groups = parameter_groups(model, params.get("weight_decay"))
    if name == "AdamW":
        optimizer = torch.optim.AdamW(groups, **params)
    else:
        optimizer = METHODS[name].from_model(model, groups, **params)
    clipping = settings.config["gradient_clipping"]
    if method.writes_weights and clipping and ranks.is_main:
        logger.warning("%s never has all gradients at once: gradient_clipping=%s is not applied.", name, clipping)
    monitor = MonitorMaster(get_monitor_config(settings.config))
    schedule, accumulation = settings.lr_schedule(optimizer), settings.accumulation
    return Fsdp2Engine(model, optimizer, schedule, accumulation, clipping, monitor, options.reduce_once)


def _build_model(
    options: PretrainOptions, settings: Settings, ranks: Ranks, without_masters: bool
) -> transformers.PreTrainedModel:
    """The sharded model. The first rank alone builds a whole one, from which all get their shards.

    without_masters: in bf16, the stored weights are those that it computes with."""
    model = build_without_weights(settings.model_config)
    whole = on_all_ranks(lambda: _build_whole(model, options, settings, ranks) if ranks.is_main else None)
    sharding = settings.facts["zero_stage"]
    if options.float8:
        sharding += f", {use_float8(model, options.float8, ranks.device)}"
    make_ready(model, options)
    announce(model, options, settings, ranks, sharding)
    bf16 = settings.facts["dtype"] == "bf16"
    if bf16 and without_masters:
        for parameter in (*model.parameters(), *(whole.parameters() if whole is not None else ())):
            parameter.data = parameter.data.bfloat16()
    shard(model, bf16 and not without_masters, options.replicas)
    fill(model, whole, ranks.device)
    if whole is not None:
        model.generation_config = whole.generation_config  # it is saved with the model
    return model


def _build_whole(model: torch.nn.Module, options: PretrainOptions, settings: Settings, ranks: Ranks) -> torch.nn.Module:
    """model: the same without weights. ValueError where it ties what a folder holds apart."""
    whole = build_model(options.model, settings.model_config, options.seed, ranks.device, partitioned=False)
    names, tied = ({name for name, _ in one.named_parameters()} for one in (whole, model))
    if apart := sorted(names - tied):
        raise ValueError(
            f"{options.model} holds a {apart[0]} of its own, which its config.json ties to another weight: set "
            "tie_word_embeddings to false there"
        )
    return whole
