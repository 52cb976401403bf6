"""The second job: fine-tune a trained model on prompts and their completions."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch

from ds_memopt.optimizers import capabilities_of
from ds_memopt.train import checkpoint
from ds_memopt.train.data.length_batches import Halves, LengthBatches, divide
from ds_memopt.train.data.order import StepBatches
from ds_memopt.train.data.rows import Row, collate, find_encoder, load_rows, totals, train_batches
from ds_memopt.train.evaluation import evaluate
from ds_memopt.train.loop import Work, build_engine, run
from ds_memopt.train.options import FinetuneOptions
from ds_memopt.train.output_folder import claim
from ds_memopt.train.presets import find_trained, trained_folder
from ds_memopt.train.ranks import Ranks, on_all_ranks, start_ranks
from ds_memopt.train.settings import Settings, make_settings


def finetune(options: FinetuneOptions) -> None:
    """Run the job. Every rank calls it; see `FinetuneOptions`.

    The loss of a step is the mean over all completion tokens of its global batch, whatever the ranks and micro-batches
    that share them. ValueError on all ranks, before any training, for bad input. RuntimeError if the loss stops being a
    number.
    """
    with start_ranks(options.memory_limit_gib, options.timeout_minutes) as ranks:
        _finetune(options, ranks)


def _finetune(options: FinetuneOptions, ranks: Ranks) -> None:
    options = on_all_ranks(lambda: _with_folder(options))
    settings = on_all_ranks(lambda: make_settings(options, ranks, find_trained))
    claim(settings.output_dir, ranks)
    vocab_size = settings.model_config.vocab_size
    encoder = on_all_ranks(lambda: find_encoder(options.tokenizer, options.model, vocab_size))
    rows, held_out = (
        on_all_ranks(lambda path=path: load_rows(path, encoder, settings.seq_length, vocab_size) if path else [])
        for path in (options.data, options.validation_data)
    )
    engine = build_engine(options, settings, ranks)
    _check_loss(engine.module)
    splits_batch = capabilities_of(engine.basic_optimizer).splits_batch
    halves = _find_halves(engine, settings, rows, ranks) if splits_batch else None
    first_step = checkpoint.find(options, settings, ranks) if options.resume else 0
    place, rest = (ranks.rank, ranks.world_size, options.seed), range(first_step, settings.steps)
    alone, whole = (0, 1, options.seed), range(settings.steps)
    if halves:
        sizes = engine.basic_optimizer.zo_batch, engine.basic_optimizer.fo_batch
        batches = on_all_ranks(lambda: LengthBatches(halves, *sizes, *place, rest))
        global_batches = LengthBatches(halves, *(ranks.world_size * size for size in sizes), *alone, whole)
    else:
        batches = on_all_ranks(lambda: StepBatches(rows, settings.micro_batch, settings.accumulation, *place, rest))
        global_batches = StepBatches(rows, settings.facts["global_batch"], 1, *alone, whole)
    tokens, targets = totals(rows, global_batches)
    # DeepSpeed averages the micro-batches of all ranks, so each is divided by its part of the step's completion tokens.
    parts = [target / (settings.accumulation * ranks.world_size) for target in targets[first_step:]]

    work = Work(
        batches=train_batches(rows, batches, parts, settings.accumulation),
        tokens=tokens,
        validate=lambda engine: evaluate(engine, held_out, settings.micro_batch, ranks),
        figures=("validation_loss", "validation_accuracy"),
        validate_at_start=True,
    )
    run(engine, settings, ranks, work, first_step, encoder.folder)


def _with_folder(options: FinetuneOptions) -> FinetuneOptions:
    """With the model's own folder as `model`, and no validation where there is nothing to validate on."""
    if not options.validation_data:
        if options.validation_interval:
            raise ValueError(
                f"--validation_interval {options.validation_interval} needs rows to validate on: give --validation_data"
            )
        options = replace(options, validation_interval=0)
    return replace(options, model=str(trained_folder(options.model)))


def _find_halves(engine: Any, settings: Settings, rows: list[Row], ranks: Ranks) -> Halves:
    """What the method draws its batches from. The engine divides them by the threshold that is found here, and a
    resumed run must share it."""
    method, name = engine.basic_optimizer, type(engine.basic_optimizer).__name__
    if method.length_threshold == "auto":
        longest = max(rows, key=len)
        batch = {name: tensor.to(ranks.device) for name, tensor in collate([longest.pair]).items()}
        method.length_threshold = engine.optimizer.choose_threshold(engine.module, engine, batch | {"use_cache": False})
        if ranks.is_main:
            print(f'{name}: length_threshold "auto" is {method.length_threshold} tokens here', flush=True)
    halves = divide([len(row) for row in rows], method.length_threshold)
    method.length_threshold = halves.length_threshold
    settings.facts["optimizer"]["params"]["length_threshold"] = halves.length_threshold
    if ranks.is_main:
        print(
            f"{name}: {halves}; every rank has {method.zo_batch} for the zeroth-order half of a step, "
            f"{method.fo_batch} for the first-order half",
            flush=True,
        )
    return halves


def _check_loss(model: torch.nn.Module) -> None:
    takes_more = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if not getattr(model, "accepts_loss_kwargs", takes_more):
        raise ValueError(
            f"{type(model).__name__} takes no num_items_in_batch, which makes its loss a mean over the completion "
            "tokens of all ranks: choose another model class"
        )
