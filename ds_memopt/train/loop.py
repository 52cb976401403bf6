"""The main job: pre-train a causal language model with DeepSpeed. And the loop that fine-tuning shares with it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from tqdm import tqdm
from transformers.integrations import HfDeepSpeedConfig

import ds_memopt
from ds_memopt.checkpoint import check_target
from ds_memopt.engines.checkpoint_files import load_only_data
from ds_memopt.engines.held_bytes import gradient_bytes, held_bytes
from ds_memopt.engines.losses import IGNORED_LABEL
from ds_memopt.measure import (
    GIB,
    CommunicationMeter,
    StepTimer,
    peak_flops,
    peak_memory_gib,
    reset_peak_memory,
    state_bytes,
    write_to_monitor,
)
from ds_memopt.optimizers import METHODS, capabilities_of, method_of
from ds_memopt.results.record import MetricsFile, as_text, environment, write_json
from ds_memopt.results.schema import MetricsRow, ValidationRow
from ds_memopt.train import checkpoint
from ds_memopt.train.config import zero_stage
from ds_memopt.train.data.corpus import Corpus, load_corpus, stream_corpus, train_loader, validation_batches
from ds_memopt.train.data.order import StepBatches
from ds_memopt.train.data.packing import check_document_borders, model_inputs
from ds_memopt.train.data.tokenised import Reading
from ds_memopt.train.flops import model_flops
from ds_memopt.train.model_speed import attention_of, check_under_deepspeed, make_ready
from ds_memopt.train.options import PretrainOptions, RunOptions
from ds_memopt.train.output_folder import RESOLVED, claim
from ds_memopt.train.presets import MODEL, build_model, count_parameters, parameter_groups
from ds_memopt.train.ranks import Ranks, first_rank_of_node_first, on_all_ranks, start_ranks
from ds_memopt.train.saving import Saving
from ds_memopt.train.settings import Settings, make_settings
from ds_memopt.train.step_trace import StepTrace
from ds_memopt.train.termination import Termination


@dataclass(frozen=True)
class Work:
    """What a job gives the loop.

    batches: keyword arguments of the model's forward, one micro-batch of this rank after the other.
    tokens[s]: tokens that all ranks see in the first s steps.
    validate: what to measure on held-out data; all ranks call, and have the same result. figures: its keys.
    seq_length: tokens of every sequence; None if they differ.
    """

    batches: Iterable[dict[str, Any]]
    tokens: Sequence[int]
    validate: Callable[[Any], dict[str, float]]
    figures: tuple[str, ...] = ("validation_loss",)
    validate_at_start: bool = False
    seq_length: int | None = None


def pretrain(options: PretrainOptions) -> None:
    """Run the main job. Every rank calls it; see `PretrainOptions`.

    ValueError on all ranks, before any training, for bad input. RuntimeError if the loss stops being a number.
    """
    pretrain_under(make_settings, build_engine, options)


def pretrain_under(
    settings_of: Callable[[PretrainOptions, Ranks], Settings],
    build: Callable[[PretrainOptions, Settings, Ranks], Any],
    options: PretrainOptions,
) -> None:
    """Run the main job under the engine that `build` makes from what `settings_of` settles."""
    with start_ranks(options.memory_limit_gib, options.timeout_minutes) as ranks:
        _pretrain(settings_of, build, options, ranks)


def _pretrain(
    settings_of: Callable[[PretrainOptions, Ranks], Settings],
    build: Callable[[PretrainOptions, Settings, Ranks], Any],
    options: PretrainOptions,
    ranks: Ranks,
) -> None:
    settings = on_all_ranks(lambda: _check_halves(settings_of(options, ranks)))
    claim(settings.output_dir, ranks)
    corpus: Corpus = first_rank_of_node_first(lambda: _load_corpus(options, settings), ranks.local_rank)
    # What is in the files counts, not their names alone.
    settings.facts["data"] = corpus.description + ("; document borders" if options.document_borders else "")
    if ranks.is_main:
        print(f"data: {settings.facts['data']}", flush=True)
    end_of_text = on_all_ranks(lambda: corpus.ends_of_documents() if options.document_borders else None)
    first_step = checkpoint.find(options, settings, ranks) if options.resume else 0
    loader = on_all_ranks(lambda: _train_loader(corpus, options, settings, ranks, range(first_step, settings.steps)))
    held_out = validation_batches(
        corpus.validation,
        options.validation_batches * settings.facts["global_batch"],
        settings.micro_batch,
        ranks.rank,
        ranks.world_size,
    )
    tokens_per_step = settings.facts["global_batch"] * settings.seq_length
    work = Work(
        batches=({**model_inputs(ids, end_of_text), "labels": ids} for ids in loader),
        tokens=range(0, (settings.steps + 1) * tokens_per_step, tokens_per_step),
        validate=lambda engine: {"validation_loss": validation_loss(engine, held_out, ranks.device, end_of_text)},
        seq_length=settings.seq_length,
    )
    engine = build(options, settings, ranks)
    if end_of_text is not None:
        check_document_borders(engine, end_of_text, settings.micro_batch, settings.seq_length, ranks.device)
    run(engine, settings, ranks, work, first_step, options.tokenizer)


def _load_corpus(options: PretrainOptions, settings: Settings) -> Corpus:
    where = (options.data, options.tokenizer, settings.seq_length, settings.model_config.vocab_size)
    how = {
        "validation_data": tuple(options.validation_data),
        "end_of_text": options.end_of_text,
        "reading": Reading(tuple(options.text_field), options.num_proc, options.bad_rows),
    }
    if options.streaming:
        sequences = options.validation_batches * settings.facts["global_batch"]
        return stream_corpus(*where, **how, validation_sequences=sequences)
    return load_corpus(*where, **how)


def _train_loader(
    corpus: Corpus, options: PretrainOptions, settings: Settings, ranks: Ranks, steps: range
) -> Iterable[torch.Tensor]:
    place = (settings.micro_batch, settings.accumulation, ranks.rank, ranks.world_size, options.seed, steps)
    pin_memory = ranks.device.type == "cuda"
    if options.streaming:
        return corpus.train.loader(*place, options.workers, pin_memory)
    batches = StepBatches(corpus.train, *place, corpus.mixture(options.seed))
    return train_loader(corpus.train, batches, options.workers, pin_memory)


def _check_halves(settings: Settings) -> Settings:
    """Sequences of one length cannot be told apart by it."""
    word, params = settings.config["optimizer"]["type"], settings.config["optimizer"]["params"]
    for name, needed in method_of(word).for_equal_lengths.items():
        given = params.get(name, getattr(METHODS[word].hyper_parameters, name))
        if given != needed:
            raise ValueError(
                f"{word} with {name}={given} divides rows by their length, but all sequences of pre-training are "
                f'equally long: set "{name}" to {json.dumps(needed)} in the DeepSpeed config, or fine-tune'
            )
    return settings


def run(engine: Any, settings: Settings, ranks: Ranks, work: Work, first_step: int, tokenizer: str | None) -> None:
    """Train from first_step (of a checkpoint, or 0) to the end, and leave the records, checkpoints and the model.

    tokenizer: the folder of the tokenizer to save with the model. RuntimeError if the loss stops being a number.
    AskedToEnd on all ranks, after a checkpoint, at the end of the step in which a rank gets SIGTERM.
    """
    if first_step:
        checkpoint.load(engine, settings.output_dir / checkpoint.CHECKPOINTS, first_step, ranks)
    elif settings.save_interval and settings.checkpoint_format == "portable":
        on_all_ranks(lambda: check_target(engine))
    metrics = None
    flops = model_flops(engine.module, engine.basic_optimizer, work.seq_length)
    peak = peak_flops(ranks.device, settings.facts["dtype"])
    if ranks.is_main:
        checkpoint.remove_asides(settings.output_dir)
        mfu = flops if isinstance(flops, str) else flops.formula(peak)
        print(mfu, flush=True)
        speed = settings.speed | {"attention": attention_of(engine.module)}
        folder = settings.output_dir
        resolved = {**settings.facts, "speed": speed, "mfu": mfu, "deepspeed": settings.config}
        write_json(folder / RESOLVED, resolved)
        write_json(folder / "environment.json", environment(ranks.device, ranks.world_size, ranks.process_gib))
        metrics = MetricsFile(folder, first_step)
    mfu = (lambda tokens_per_s: None) if isinstance(flops, str) else partial(flops.utilisation, peak=peak)
    what_is_left = partial(checkpoint.newest, settings.output_dir / checkpoint.CHECKPOINTS)
    with Termination(settings.grace_seconds, what_is_left) as termination:
        if work.validate_at_start and settings.validation_interval and not first_step:
            ranks.enter("the validation before training")
            row: ValidationRow = {"step": 0, "tokens": 0, "loss": None, **work.validate(engine)}
            _refuse_no_number(row)
            if metrics:
                metrics.append(row)
                print(f"before training: {_figures(row)}", flush=True)
        _train(engine, settings, ranks, work, metrics, mfu, termination)
        if settings.save_interval:
            ranks.enter("the saving of the model", alone=True)
            checkpoint.save_model(engine, settings.output_dir / MODEL, tokenizer, ranks)


def build_engine(options: RunOptions, settings: Settings, ranks: Ranks) -> Any:
    """The model inside DeepSpeed's engine, with the optimizer and schedule of the settings."""
    check_under_deepspeed(options, zero_stage(settings.config))
    ds_memopt.register()
    partitioned = zero_stage(settings.config) == 3
    # transformers finds it by a weak reference, so it must live until the model is built.
    keep_alive = HfDeepSpeedConfig(settings.config) if partitioned else None
    model = build_model(options.model, settings.model_config, options.seed, ranks.device, partitioned)
    make_ready(model, options)
    announce(model, options, settings, ranks, f"ZeRO-{zero_stage(settings.config)}")
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, settings.config["optimizer"]["params"].get("weight_decay")),
        config=settings.config,
        lr_scheduler=settings.lr_schedule,
    )
    del keep_alive
    if not options.trust_checkpoint:
        load_only_data(engine)
    return engine


def announce(model: torch.nn.Module, options: RunOptions, settings: Settings, ranks: Ranks, sharding: str) -> None:
    """Print, on the first rank, what is about to run."""
    if not ranks.is_main:
        return
    up_to = "up to " if options.job == "finetune" else ""
    print(
        f"{options.model}: {count_parameters(model) / 1e6:.1f} M parameters, {settings.config['optimizer']['type']}, "
        f"{sharding}, {ranks.world_size} x {ranks.device.type}, {settings.facts['dtype']}; "
        f"{settings.steps} steps of {settings.facts['global_batch']} x {up_to}{settings.seq_length} tokens "
        f"({settings.micro_batch} sequences per rank and pass, {settings.accumulation} passes)",
        flush=True,
    )


def validation_loss(
    engine: Any, batches: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device, end_of_text: int | None = None
) -> float:
    """Mean loss per predicted token over the batches of all ranks, summed in fp64. All ranks call.

    end_of_text: see `model_inputs`.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    engine.eval()
    with torch.no_grad():
        for inputs, labels in batches:
            tokens = (labels[:, 1:] != IGNORED_LABEL).sum().to(device)
            loss = engine(
                **model_inputs(inputs.to(device), end_of_text), labels=labels.to(device), use_cache=False
            ).loss
            total += torch.stack([torch.where(tokens > 0, loss * tokens, 0.0), tokens])
    engine.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _train(
    engine: Any,
    settings: Settings,
    ranks: Ranks,
    work: Work,
    metrics: MetricsFile | None,
    mfu: Callable[[float], float | None],
    termination: Termination,
) -> None:
    first_step = logged_step = engine.global_steps  # 0, or what the checkpoint says
    parameters = count_parameters(engine.module)
    timer, batches = StepTimer(ranks.device, ranks.world_size), iter(work.batches)
    timer.watch(engine.module)
    meter = CommunicationMeter(timer)
    reset_peak_memory(ranks.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    saving = Saving(engine, settings, ranks)
    trace = StepTrace(settings.output_dir, settings.profile, ranks)
    on_terminal = ranks.is_main and sys.stderr.isatty()
    bar = tqdm(total=settings.steps, initial=first_step, unit="step", disable=not on_terminal)
    engine.train()  # transformers loads models for evaluation
    for step in range(first_step + 1, settings.steps + 1):
        ranks.enter(f"step {step}")
        # Dropout draws from a stream that step and rank determine: nothing to save, and a resumed run goes on exactly.
        torch.manual_seed((settings.facts["seed"] * settings.steps + step) * ranks.world_size + ranks.rank)
        lr, method = engine.get_lr()[0], capabilities_of(engine.basic_optimizer)
        active_block = {} if method.active_block is None else {"active_block": method.active_block}
        validate = settings.is_due(step, settings.validation_interval)
        save = settings.is_due(step, settings.save_interval)
        due = validate or save or settings.is_due(step, settings.logging_interval)
        gradients = {}
        with meter:
            for micro_step in range(settings.accumulation):
                batch = {
                    name: value.to(ranks.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for name, value in next(batches).items()
                }
                loss = engine(**batch, use_cache=False).loss
                with timer.phase("backward"):
                    engine.backward(loss)
                if due and micro_step == settings.accumulation - 1:
                    gradients = {"gradients": gradient_bytes(engine, ranks.device)}
                with timer.phase("optimizer"):
                    engine.step()
                loss_sum += loss.detach()
        trace.step()
        timer.count(work.tokens[step] - work.tokens[step - 1])
        bar.update()
        elapsed_s, writing = ranks.largest(termination.elapsed_s(), saving.is_writing())
        stop = elapsed_s >= 0
        if not writing:
            saving.advance()
        if stop:
            termination.tell(elapsed_s)
            validate = False  # it may take longer than there is time
        if not due and not stop:
            continue
        steps = step - logged_step
        speed = timer.read()
        held_by_kind = held_bytes(engine, ranks.device) | gradients
        sums = torch.stack([loss_sum, loss_sum.new_tensor(sum(state_bytes(engine.optimizer).values()))])
        dist.all_reduce(sums)
        memory = peak_memory_gib(ranks.device)
        peaks = loss_sum.new_tensor(list(memory.values()))
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        if validate:
            ranks.enter(f"the validation after step {step}")
        row: MetricsRow = {
            "step": step,
            "tokens": work.tokens[step],
            "loss": sums[0].item() / (steps * settings.accumulation * ranks.world_size),
            **(work.validate(engine) if validate else dict.fromkeys(work.figures)),
            "lr": lr,
            **active_block,
            **({} if method.update_kept is None else {"update_kept": _finite(method.update_kept)}),
            "grad_norm": _finite(engine.get_global_grad_norm()),
            **speed,
            "mfu": mfu(speed["tokens_per_s_per_gpu"]),
            **dict(zip(memory, peaks.tolist(), strict=True)),
            "held_gib": {name: size / GIB for name, size in held_by_kind.items()},
            "bytes_sent_per_step": meter.bytes_sent() // steps,
            "sent_by_collective": {name: one.sent_bytes // steps for name, one in meter.by_collective().items()},
            "sent_by_group": {as_text(group): one.sent_bytes // steps for group, one in meter.by_group().items()},
            "optimizer_state_bytes_per_parameter": sums[1].item() / parameters,
        }
        _refuse_no_number(row)
        try:
            if stop:
                saving.save_and_end(step, termination)
            if save:
                saving.save(step)
        finally:
            row["save_stall_s"] = saving.stall_s()
            if metrics:
                metrics.append(row)
                write_to_monitor(engine.monitor, row, step * settings.facts["global_batch"])
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed['tokens_per_s']:.0f} tokens/s")
                if validate:
                    bar.write(_progress(row, settings.steps))
        loss_sum, logged_step = torch.zeros_like(loss_sum), step
        meter.reset()
        timer.start()
    bar.close()
    trace.stop()


def _finite(value: Any) -> float | None:
    """None for what JSON cannot hold: a norm that DeepSpeed does not compute, one that overflowed in fp16, or the
    share that was kept of an update that is no number, after which the next loss is none either."""
    return float(value) if value is not None and math.isfinite(value) else None


def _refuse_no_number(row: ValidationRow) -> None:
    if not all(math.isfinite(row[key]) for key in ("loss", "validation_loss") if row[key] is not None):
        raise RuntimeError(
            f"the loss is {row['loss']}, in validation {row['validation_loss']}, at step {row['step']} "
            f"(lr {row.get('lr', 0):.3g}): lower --lr, lengthen --warmup_steps"
        )


def _progress(row: MetricsRow, steps: int) -> str:
    return (
        f"step {row['step']}/{steps}: loss {row['loss']:.4f}, {_figures(row)}, "
        f"{row['step_ms']:.0f} ms a step, {row['tokens_per_s']:.0f} tokens/s"
        + ("" if row["mfu"] is None else f", MFU {row['mfu']:.1%}")
    )


def _figures(row: ValidationRow) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items() if name.startswith("validation_")
    )
