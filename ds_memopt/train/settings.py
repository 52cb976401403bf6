"""Settling every setting of a run before a model exists: command line, then DeepSpeed config, then recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
import transformers
from deepspeed.git_version_info import installed_ops
from torch.utils.cpp_extension import CUDA_HOME

from ds_memopt.optimizers import NamedOptimizer, method_of
from ds_memopt.optimizers.base.hyper_parameters import check_values
from ds_memopt.results.record import METRICS, first_free
from ds_memopt.train.config import (
    AUTO,
    DTYPES,
    SHARED_HYPERPARAMETERS,
    choose,
    load_config,
    override_optimizer,
    resolve_config,
    zero_stage,
)
from ds_memopt.train.config_check import check_config, check_optimizer_type, check_rules
from ds_memopt.train.lr_schedule import has_warm_up, make_lr_schedule
from ds_memopt.train.model_speed import check_speed
from ds_memopt.train.options import RunOptions
from ds_memopt.train.output_folder import refuse_no_run
from ds_memopt.train.presets import Recipe, find_model, split_batch
from ds_memopt.train.ranks import Ranks
from ds_memopt.train.resumed_batch import keep_global_batch, keep_halves, saved_facts
from ds_memopt.train.step_trace import PASSED_OVER


@dataclass(frozen=True)
class Settings:
    """Everything about a run that is settled before a model exists. lr_schedule builds the scheduler, None if the
    DeepSpeed config has its own."""

    output_dir: Path
    config: dict[str, Any]  # resolved DeepSpeed config
    model_config: transformers.PretrainedConfig
    seq_length: int
    micro_batch: int
    accumulation: int
    steps: int
    logging_interval: int
    validation_interval: int
    save_interval: int
    checkpoint_format: str
    async_save: bool
    keep_checkpoints: int | None
    grace_seconds: float
    profile: int  # steps to trace
    lr_schedule: Callable[[torch.optim.Optimizer], Any] | None
    facts: dict[str, Any]  # what the trajectory depends on: a resumed run must share it
    speed: dict[str, Any]  # what it depends on by rounding alone, and a resumed run may change

    def is_due(self, step: int, interval: int) -> bool:
        return bool(interval) and (step % interval == 0 or step == self.steps)


def make_settings(
    options: RunOptions,
    ranks: Ranks,
    find: Callable[[str], tuple[transformers.PretrainedConfig, Recipe]] = find_model,
) -> Settings:
    """Settle all settings, from command line, DeepSpeed config and recipe. ValueError for any that is wrong.

    find: the configuration and recipe of the model that `--model` names.
    """
    options.check()
    output_dir = Path(options.output_dir) if options.output_dir else _new_folder(options, ranks)
    if options.resume:
        refuse_no_run(output_dir)
    elif (output_dir / METRICS).exists():
        raise ValueError(
            f"--output_dir {output_dir} already holds a run ({METRICS} exists): "
            "continue it with --resume, or choose another --output_dir"
        )
    if options.async_save and options.checkpoint_format != "portable":
        raise ValueError(
            f"--async_save writes portable checkpoints: leave out --checkpoint_format {options.checkpoint_format}"
        )
    raw = load_config(options.deepspeed_config)
    check_config(raw, options.deepspeed_config)
    raw = _with_command_line(raw, options)
    model_config, recipe = find(options.model)

    method = method_of(raw["optimizer"]["type"])
    saved = saved_facts(output_dir, options.resume) if options.resume else None
    if saved and method.splits_batch:
        keep_halves(saved, raw["optimizer"]["params"], ranks.world_size)
    accumulation = choose(raw, "gradient_accumulation_steps", options.accumulation, None if method.accumulates else 1)
    micro_batch = choose(raw, "train_micro_batch_size_per_gpu", options.micro_batch, None)
    if method.splits_batch:
        micro_batch = _with_halves(method, raw["optimizer"]["params"], micro_batch, recipe, ranks.world_size)
    if saved:
        micro_batch, kept = keep_global_batch(saved, micro_batch, ranks.world_size, method.accumulates)
        if accumulation not in (None, kept) and ranks.is_main:
            print(f"accumulation is {kept} instead of {accumulation}, to keep the global batch", flush=True)
        accumulation, raw["gradient_accumulation_steps"] = kept, AUTO
    else:
        micro_batch, accumulation = split_batch(recipe, micro_batch, accumulation, ranks.world_size)
    if _lacks_fused_adam(raw, ranks):
        raw["optimizer"]["params"]["torch_adam"] = True
        if ranks.is_main:
            print("no CUDA toolkit to compile DeepSpeed's FusedAdam with: AdamW runs as torch.optim.AdamW", flush=True)

    steps = options.steps or recipe.steps
    if options.profile and steps < PASSED_OVER + options.profile:
        raise ValueError(
            f"--profile {options.profile} traces steps after the first {PASSED_OVER}, and this run has {steps}: give "
            f"at least --steps {PASSED_OVER + options.profile}"
        )
    defaults = options.defaults(steps, recipe.warmup_fraction, ranks.device.type == "cpu")

    def setting(name: str) -> Any:
        given = getattr(options, name)
        return defaults[name] if given is None else given

    warmup_steps, dtype = setting("warmup_steps"), setting("dtype")
    config = resolve_config(
        raw,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=ranks.world_size,
        lr=choose(raw, "optimizer.params.lr", options.lr, recipe.lr),
        betas=choose(raw, "optimizer.params.betas", options.betas and list(options.betas), recipe.betas),
        eps=choose(raw, "optimizer.params.eps", options.eps, defaults["eps"]),
        weight_decay=choose(raw, "optimizer.params.weight_decay", options.weight_decay, recipe.weight_decay),
        gradient_clipping=choose(raw, "gradient_clipping", options.gradient_clipping, defaults["gradient_clipping"]),
        dtype=dtype,
        hidden_size=model_config.hidden_size,
        steps=steps,
        warmup_steps=warmup_steps,
    )
    for name, value in method.accepted({"total_steps": steps, "seed": options.seed}).items():
        config["optimizer"]["params"].setdefault(name, value)
    dtype = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")
    check_rules(config, DTYPES[dtype])
    speed = check_speed(options, config["optimizer"]["type"], ranks.device, dtype)
    lr_schedule = None if config.get("scheduler") else _lr_schedule(
        setting("schedule"), options, config["optimizer"]["params"]["lr"], warmup_steps, steps
    )  # fmt: skip
    seq_length = options.seq_length or recipe.seq_length
    facts = {
        "model": options.model,
        "data": " ".join(options.sources),
        "optimizer": config["optimizer"],
        "zero_stage": zero_stage(config),
        "world_size": ranks.world_size,
        "global_batch": micro_batch * accumulation * ranks.world_size,
        "micro_batch": micro_batch,
        "seq_length": seq_length,
        "steps": steps,
        "schedule": config.get("scheduler") or [setting("schedule"), warmup_steps, *sorted(options.schedule_kwargs)],
        "gradient_clipping": config["gradient_clipping"],
        "dtype": dtype,
        "float8": getattr(options, "float8", None),
        "seed": options.seed,
    }
    return Settings(
        output_dir=output_dir,
        config=config,
        model_config=model_config,
        seq_length=seq_length,
        micro_batch=micro_batch,
        accumulation=accumulation,
        steps=steps,
        logging_interval=setting("logging_interval"),
        validation_interval=setting("validation_interval"),
        save_interval=setting("save_interval"),
        checkpoint_format=options.checkpoint_format,
        async_save=options.async_save,
        keep_checkpoints=options.keep_checkpoints,
        grace_seconds=options.grace_seconds,
        profile=options.profile,
        lr_schedule=lr_schedule,
        facts=json.loads(json.dumps(facts)),  # as a checkpoint gives them back: tuples are lists
        speed=speed,
    )


def _new_folder(options: RunOptions, ranks: Ranks) -> Path:
    """The first free folder of runs/<job>-1, runs/<job>-2, ..., the same on all ranks."""
    if options.resume:
        raise ValueError("--resume continues the run of an --output_dir: name it")
    chosen = [first_free(f"runs/{options.job}")]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _with_command_line(raw: dict[str, Any], options: RunOptions) -> dict[str, Any]:
    """The config with --optimizer in it, and with "auto" wherever the command line must be heard."""
    if options.optimizer:
        raw = override_optimizer(raw, options.optimizer)
    if "type" not in raw.get("optimizer", {}):
        raise ValueError(f"{options.deepspeed_config} has no optimizer.type: add that block or pass --optimizer")
    if raw.get("scheduler") and (options.schedule or options.schedule_kwargs or options.warmup_steps is not None):
        raise ValueError(
            "--schedule, --schedule_kwargs and --warmup_steps have no effect beside the DeepSpeed config's scheduler "
            "block"
        )
    check_optimizer_type(raw["optimizer"]["type"])
    params = raw["optimizer"].setdefault("params", {})
    for name in SHARED_HYPERPARAMETERS:
        if name == "lr" or getattr(options, name) is not None:
            params.setdefault(name, AUTO)
    if options.dtype:
        enabled = raw.setdefault("bf16", {}).setdefault("enabled", AUTO)
        if enabled not in (AUTO, options.dtype == "bf16") or raw.get("fp16", {}).get("enabled") is True:
            raise ValueError(f"--dtype {options.dtype} contradicts bf16 or fp16 in {options.deepspeed_config}")
    return raw


def _with_halves(
    method: type[NamedOptimizer], params: dict[str, Any], micro_batch: int | None, recipe: Recipe, world_size: int
) -> int:
    """Settle zo_batch and fo_batch; where they are not given, each is half of the micro-batch. Returns its size."""
    zo_batch, fo_batch = params.get("zo_batch"), params.get("fo_batch")
    check_values(method.hyper_parameters.rules(), {"zo_batch": zo_batch, "fo_batch": fo_batch})
    if micro_batch is None:
        micro_batch = zo_batch + fo_batch if zo_batch and fo_batch else split_batch(recipe, None, 1, world_size)[0]
    zo_batch = zo_batch or (micro_batch - fo_batch if fo_batch else micro_batch // 2)
    fo_batch = fo_batch or micro_batch - zo_batch
    if min(zo_batch, fo_batch) < 1 or zo_batch + fo_batch != micro_batch:
        raise ValueError(
            f"a micro-batch of {micro_batch} sequences per rank cannot be zo_batch={zo_batch} long and "
            f"fo_batch={fo_batch} short ones: both must be at least 1, and their sum the micro-batch; leave "
            "--micro_batch and train_micro_batch_size_per_gpu out, or change one"
        )
    params.update(zo_batch=zo_batch, fo_batch=fo_batch)
    return micro_batch


def _lacks_fused_adam(config: dict[str, Any], ranks: Ranks) -> bool:
    """Whether DeepSpeed would compile its FusedAdam on a GPU machine that has no nvcc, and fail."""
    return (
        ranks.device.type == "cuda"
        and CUDA_HOME is None
        and not installed_ops.get("fused_adam")
        and config["optimizer"]["type"].lower() in ("adam", "adamw")
        and "torch_adam" not in config["optimizer"]["params"]
        and "offload_optimizer" not in config.get("zero_optimization", {})
    )


def _lr_schedule(name: str, options: RunOptions, lr: float, warmup_steps: int, steps: int) -> Callable:
    schedule = make_lr_schedule(name, options.schedule_kwargs, lr, warmup_steps, steps)
    if options.warmup_steps and not has_warm_up(name):
        raise ValueError(
            f"--warmup_steps {warmup_steps} has no effect with --schedule {name}: choose another, or leave it out"
        )
    return schedule
