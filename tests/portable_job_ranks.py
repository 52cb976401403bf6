"""Worker of test_portable_job.py: the main job, saved on some ranks and resumed on others."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from ds_memopt.train.fsdp2_job import pretrain_fsdp2
from ds_memopt.train.loop import pretrain
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.reshard import convert

SIZE = dict(
    steps=6, seq_length=16, micro_batch=2, validation_interval=0, logging_interval=1, save_interval=2, data="synthetic",
)  # fmt: skip


def run_job(place: Path, folder: Path, config: str, options: dict[str, Any]) -> tuple[str | None, str]:
    """Returns the error's message, if any, and what was printed."""
    torch.set_num_threads(1)
    given = PretrainOptions(
        deepspeed_config=str(place / f"{config}.json"), output_dir=str(folder), model=str(place / "config"),
        **SIZE | options,
    )  # fmt: skip
    printed, message = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            (pretrain_fsdp2 if config == "fsdp2" else pretrain)(given)
        except ValueError as error:
            message = str(error)
    return message, printed.getvalue()


def run_jobs(place: Path, jobs: list[tuple[Path, str, dict[str, Any]]]) -> list[tuple[str | None, str]]:
    return [run_job(place, *job) for job in jobs]


def resume_and_reshard(place: Path, jobs: list[tuple], whole: Path, engine: Path, back: Path) -> list[tuple]:
    """Some jobs; then of `whole` step 4 becomes DeepSpeed's own files, from which a run goes on; and they become
    portable again."""
    outcomes = run_jobs(place, jobs)
    told = convert(whole, engine, 2, 4)
    convert(engine, back, None, None)
    resume = {"resume": True, "checkpoint_format": "engine", "accumulation": 2}
    return [*outcomes, (None, told), run_job(place, engine, "zero2_adam_mini", resume)]
