"""`ds-memopt checkpoint reshard`: a run's checkpoint in the other format, for other ranks and another stage.

It is a resume of the job without a step: ranks on this machine's CPUs build the model and DeepSpeed's engine from what
the run has recorded, load the one format and save the other. Data is not read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.multiprocessing as processes

from ds_memopt.checkpoint import INDEX
from ds_memopt.results.record import METRICS, write_json
from ds_memopt.train import checkpoint
from ds_memopt.train.config import AUTO
from ds_memopt.train.launcher import free_port
from ds_memopt.train.loop import build_engine
from ds_memopt.train.lr_schedule import has_warm_up
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.output_folder import CHECKPOINTS, RESOLVED, claim
from ds_memopt.train.ranks import on_all_ranks, start_ranks
from ds_memopt.train.settings import make_settings


def reshard(run: Path, out: Path, ranks: int | None, stage: int | None, step: int | None) -> str:
    """Write the run's newest whole checkpoint, or that of a step, to a new run folder `out`.

    A portable one becomes DeepSpeed's own files of so many ranks at a ZeRO stage, which must be given; DeepSpeed's own
    files become a portable one, on the ranks and at the stage that wrote them. Returns what was written.

    Raises ValueError where the run is none of pre-training under DeepSpeed or FSDP2, and for what a resume refuses.
    """
    saved = _recorded(run)
    if out.exists():
        raise ValueError(f"{out} is there already: name a new folder")
    to_engine = any((run / CHECKPOINTS).glob(f"step*/{INDEX}"))
    if to_engine != (ranks is not None and stage is not None):
        needs = (
            "is portable: give --ranks and --zero_stage of the run that goes on from DeepSpeed's own files"
            if to_engine
            else "has DeepSpeed's own files: leave --ranks and --zero_stage out, its run's are taken"
        )
        raise ValueError(f"the checkpoint in {run} {needs}")
    ranks = ranks or saved["world_size"]
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    told = processes.get_context("spawn").SimpleQueue()
    processes.spawn(_rank, (ranks, free_port(), told, (run, out, stage, step)), ranks)
    error, written = told.get()
    if error:
        raise ValueError(error)
    return written


def _rank(rank: int, ranks: int, port: str, told: Any, task: tuple) -> None:
    """One of the processes. The first tells the error, which all share, and what was written."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    try:
        outcome = None, convert(*task)
    except ValueError as error:
        outcome = str(error), None
    if rank == 0:
        told.put(outcome)


def convert(run: Path, out: Path, stage: int | None, step: int | None) -> str:
    """What each rank does. stage: for DeepSpeed's own files; None: a portable checkpoint."""
    with start_ranks() as ranks, tempfile.TemporaryDirectory() as folder:
        options = on_all_ranks(lambda: _options(run, Path(folder, "ds_config.json"), stage, step))
        settings = on_all_ranks(lambda: make_settings(options, ranks))
        step = checkpoint.find(options, settings, ranks)
        if not step:
            raise ValueError(f"{run} has no checkpoint yet: there is nothing to convert")
        engine = build_engine(options, settings, ranks)
        checkpoint.restore(engine, run / CHECKPOINTS, step)
        claim(out, ranks)
        checkpoint.save(engine, step, replace(settings, output_dir=out), ranks)
        if ranks.is_main:
            write_json(out / RESOLVED, {**_recorded(run), **settings.facts, "deepspeed": settings.config})
            if (run / METRICS).exists():
                shutil.copy(run / METRICS, out)
        engine.destroy()
    batch = f"--micro_batch {settings.micro_batch} --accumulation {settings.accumulation}"
    goes_on = f"; resume with --resume --checkpoint_format engine {batch}" if stage is not None else ""
    return f"{out / CHECKPOINTS}/step{step}: {options.checkpoint_format}, ranks {ranks.world_size}{goes_on}"


def _options(run: Path, config_file: Path, stage: int | None, step: int | None) -> PretrainOptions:
    """Those of a resume of the run; writes its DeepSpeed config to a file."""
    saved = _recorded(run)
    config, schedule = saved["deepspeed"], saved["schedule"]
    config["train_batch_size"] = AUTO
    if stage is not None:  # the ranks share the global batch anew
        config["zero_optimization"]["stage"] = stage
        config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = AUTO
    config_file.write_text(json.dumps(config))
    own = {}
    if isinstance(schedule, list):
        name, warmup_steps, *kwargs = schedule
        if warmup_steps and not has_warm_up(name):
            warmup_steps = None  # the default, which may not be given
        own = {"schedule": name, "schedule_kwargs": kwargs, "warmup_steps": warmup_steps}
    return PretrainOptions(
        deepspeed_config=str(config_file), output_dir=str(run), resume=True if step is None else step,
        checkpoint_format="portable" if stage is None else "engine",
        **{name: saved[name] for name in ("model", "data", "steps", "seq_length", "seed")}, **own,
    )  # fmt: skip


def _recorded(run: Path) -> dict[str, Any]:
    """The settings of the run, with its whole DeepSpeed config."""
    try:
        saved = json.loads((run / RESOLVED).read_text())
        whole = {"deepspeed", "model", "data", "steps", "seq_length", "seed", "schedule", "world_size"} <= saved.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{run} is no output folder of a run: {RESOLVED} cannot be read ({error})") from error
    if (
        not whole
        or str(saved["zero_stage"]).startswith("FSDP2")
        and not any((run / CHECKPOINTS).glob(f"step*/{INDEX}"))
    ):
        raise ValueError(
            f"{run} has no checkpoint that can be converted: only runs of pre-training have, under FSDP2 portable ones"
        )
    return saved
