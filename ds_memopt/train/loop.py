"""The main job: pre-train a causal language model with DeepSpeed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.integrations import HfDeepSpeedConfig

import ds_memopt
from ds_memopt.measure import CommunicationMeter, StepTimer, peak_memory_gib, reset_peak_memory, state_bytes
from ds_memopt.train import checkpoint
from ds_memopt.train.config import zero_stage
from ds_memopt.train.data import IGNORED_LABEL, Corpus, StepBatches, load_corpus, train_loader, validation_batches
from ds_memopt.train.options import Options
from ds_memopt.train.plan import Plan, make_plan
from ds_memopt.train.presets import build_model, count_parameters, parameter_groups
from ds_memopt.train.ranks import Ranks, first_rank_of_node_first, on_all_ranks, start_ranks
from ds_memopt.train.record import MetricsFile, environment, write_json


def pretrain(options: Options) -> None:
    """Run the main job. Every rank calls it; see `Options`.

    ValueError on all ranks, before any training, for bad input. RuntimeError if the loss stops being a number.
    """
    ranks = start_ranks()
    plan = on_all_ranks(lambda: make_plan(options, ranks))
    corpus: Corpus = first_rank_of_node_first(
        lambda: load_corpus(options.data, options.tokenizer, plan.seq_length, plan.model_config.vocab_size),
        ranks.local_rank,
    )
    checkpoints = plan.output_dir / "checkpoints"
    first_step = checkpoint.check(checkpoints, plan.facts, ranks) if options.resume else 0
    batches = on_all_ranks(
        lambda: StepBatches(
            corpus.train,
            plan.micro_batch,
            plan.accumulation,
            ranks.rank,
            ranks.world_size,
            options.seed,
            range(first_step, plan.steps),
        )
    )
    held_out = validation_batches(
        corpus.validation,
        options.validation_batches * plan.facts["global_batch"],
        plan.micro_batch,
        ranks.rank,
        ranks.world_size,
    )
    engine = build_engine(options, plan, ranks)
    if options.resume:
        checkpoint.load(engine, checkpoints, first_step)

    metrics = None
    if ranks.is_main:
        plan.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(plan.output_dir / "resolved_config.json", {**plan.facts, "deepspeed": plan.config})
        write_json(plan.output_dir / "environment.json", environment(ranks.world_size, ranks.device))
        metrics = MetricsFile(plan.output_dir, first_step)
    _train(engine, plan, ranks, train_loader(corpus.train, batches), held_out, metrics)


def build_engine(options: Options, plan: Plan, ranks: Ranks) -> Any:
    """The model inside DeepSpeed's engine, with the optimizer and schedule of the plan."""
    ds_memopt.register()
    partitioned = zero_stage(plan.config) == 3
    keep_alive = HfDeepSpeedConfig(plan.config) if partitioned else None  # transformers finds it by a weak reference
    model = build_model(options.model, plan.model_config, options.seed, ranks.device, partitioned)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if ranks.is_main:
        size = count_parameters(model)
        print(
            f"{options.model}: {size / 1e6:.1f} M parameters, {plan.config['optimizer']['type']}, "
            f"ZeRO-{zero_stage(plan.config)}, {ranks.world_size} x {ranks.device.type}, {plan.facts['dtype']}; "
            f"{plan.steps} steps of {plan.facts['global_batch']} x {plan.seq_length} tokens "
            f"({plan.micro_batch} sequences per rank and pass, {plan.accumulation} passes)",
            flush=True,
        )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, plan.config["optimizer"]["params"].get("weight_decay")),
        config=plan.config,
        lr_scheduler=plan.lr_schedule,
    )
    del keep_alive
    return engine


def validation_loss(engine: Any, batches: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    """Mean loss per predicted token over the batches of all ranks, summed in fp64. All ranks call."""
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    engine.eval()
    with torch.no_grad():
        for inputs, labels in batches:
            logits = engine(input_ids=inputs.to(device), use_cache=False).logits[:, :-1].float()
            target = labels[:, 1:].to(device)
            loss = cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
            total += torch.stack([loss, (target != IGNORED_LABEL).sum()])
    engine.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _train(
    engine: Any,
    plan: Plan,
    ranks: Ranks,
    loader: Iterable[torch.Tensor],
    held_out: list[tuple[torch.Tensor, torch.Tensor]],
    metrics: MetricsFile | None,
) -> None:
    first_step = logged_step = engine.global_steps  # 0, or what the checkpoint says
    tokens_per_step = plan.facts["global_batch"] * plan.seq_length
    parameters = count_parameters(engine.module)
    meter, timer, batches = CommunicationMeter(), StepTimer(ranks.device, ranks.world_size), iter(loader)
    reset_peak_memory(ranks.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    on_terminal = ranks.is_main and sys.stderr.isatty()
    bar = tqdm(total=plan.steps, initial=first_step, unit="step", disable=not on_terminal)
    for step in range(first_step + 1, plan.steps + 1):
        # Dropout draws from a stream that step and rank determine: nothing to save, and a resumed run goes on exactly.
        torch.manual_seed((plan.facts["seed"] * plan.steps + step) * ranks.world_size + ranks.rank)
        lr, active_block = engine.get_lr()[0], getattr(engine.basic_optimizer, "active_block", None)
        with meter:
            for _ in range(plan.accumulation):
                ids = next(batches).to(ranks.device)
                loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
                engine.backward(loss)
                engine.step()
                loss_sum += loss.detach()
        timer.count(tokens_per_step)
        bar.update()

        validate, save = plan.is_due(step, plan.validation_interval), plan.is_due(step, plan.save_interval)
        if not (validate or save or plan.is_due(step, plan.logging_interval)):
            continue
        steps = step - logged_step
        speed = timer.read()
        sums = torch.stack([loss_sum, loss_sum.new_tensor(sum(state_bytes(engine.optimizer).values()))])
        dist.all_reduce(sums)
        memory = peak_memory_gib(ranks.device)
        peaks = loss_sum.new_tensor(list(memory.values()))
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        row = {
            "step": step,
            "tokens": step * tokens_per_step,
            "loss": sums[0].item() / (steps * plan.accumulation * ranks.world_size),
            "validation_loss": validation_loss(engine, held_out, ranks.device) if validate else None,
            "lr": lr,
            **({"active_block": active_block} if active_block else {}),
            "grad_norm": _finite(engine.get_global_grad_norm()),
            **speed,
            **dict(zip(memory, peaks.tolist(), strict=True)),
            "bytes_sent_per_step": meter.bytes_sent() // steps,
            "optimizer_state_bytes_per_parameter": sums[1].item() / parameters,
        }
        if not all(math.isfinite(row[key]) for key in ("loss", "validation_loss") if row[key] is not None):
            raise RuntimeError(
                f"the loss is {row['loss']}, in validation {row['validation_loss']}, at step {step} (lr {lr:.3g}): "
                "lower --lr, lengthen --warmup_steps"
            )
        if metrics:
            metrics.append(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed['tokens_per_s']:.0f} tokens/s")
            if validate:
                bar.write(_progress(row, plan.steps))
        if save:
            checkpoint.save(engine, plan.output_dir / "checkpoints", step, plan.facts, ranks)
        loss_sum, logged_step = torch.zeros_like(loss_sum), step
        meter.reset()
        timer.start()
    bar.close()


def _finite(value: Any) -> float | None:
    """None for what JSON cannot hold: a norm that DeepSpeed does not compute, or one that overflowed in fp16."""
    return float(value) if value is not None and math.isfinite(value) else None


def _progress(row: dict[str, Any], steps: int) -> str:
    return (
        f"step {row['step']}/{steps}: loss {row['loss']:.4f}, validation loss {row['validation_loss']:.4f}, "
        f"{row['step_ms']:.0f} ms a step, {row['tokens_per_s']:.0f} tokens/s"
    )
