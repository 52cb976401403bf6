"""Worker of test_portable_job.py: the main job, saved on some ranks and resumed on others."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from spawn import begin

from ds_memopt.checkpoint import portable
from ds_memopt.engines.processes import AskedToEnd
from ds_memopt.train import checkpoint, loop
from ds_memopt.train.fsdp2_job import pretrain_fsdp2
from ds_memopt.train.loop import pretrain
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.reshard import convert

SIZE = dict(
    steps=6, seq_length=16, micro_batch=2, validation_interval=0, logging_interval=1, save_interval=2, end_of_text=0,
    document_borders=True, workers=1, lr=2e-3, warmup_steps=1, schedule="warmup_stable_decay",
    schedule_kwargs=("num_decay_steps=3", "decay_type=linear", "min_lr_ratio=0.4"),
)  # fmt: skip


def run_job(place: Path, folder: Path, config: str, options: dict[str, Any]) -> tuple[str | None, str]:
    """Returns the error's message, if any, and what was printed."""
    torch.set_num_threads(1)
    given = PretrainOptions(
        deepspeed_config=str(place / f"{config}.json"), output_dir=str(folder), model=str(place / "config"),
        data=(f"a={place}/a.bin:0.7", f"b={place}/b.bin:0.3"), **SIZE | options,
    )  # fmt: skip
    printed, message = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            (pretrain_fsdp2 if config == "fsdp2" else pretrain)(given)
        except ValueError as error:
            message = str(error)
        except AskedToEnd as end:
            message = f"{end.code}: {end}"
    return message, printed.getvalue()


def run_jobs(place: Path, jobs: list[tuple[Path, str, dict[str, Any]]]) -> list[tuple[str | None, str]]:
    return [run_job(place, *job) for job in jobs]


def run_odd_jobs(place: Path, stopped: list, slow: list, failing: list) -> list[tuple[str | None, str]]:
    """Jobs that are told to stop, whose second rank writes slowly, and whose second rank cannot write step 4."""
    write = portable.write_tensors

    def write_slowly(path: Path, *args: Any) -> None:
        time.sleep(0.2 if "rank00001" in path.name else 0)
        write(path, *args)

    def fail_to_write(path: Path, *args: Any) -> None:
        if path.match(".step4/rank00001*"):
            raise OSError("the disk is on fire")
        write(path, *args)

    results = run_stopped_jobs(place, stopped)
    for way, jobs in ((write_slowly, slow), (fail_to_write, failing)):
        with mock.patch.object(portable, "write_tensors", way):
            results += run_jobs(place, jobs)
    return results


def run_stopped_jobs(place: Path, jobs: list[tuple[Path, str, dict[str, Any]]]) -> list[tuple[str | None, str]]:
    """Rank 1 gets SIGTERM in step 3, all ranks another one while that is saved."""
    load, save = loop.train_loader, checkpoint.save

    def load_until_told(*args: Any):
        for number, batch in enumerate(load(*args)):
            if number == 2 * 2 and torch.distributed.get_rank() == 1:  # of 2 passes a step
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def save_and_tell(*args: Any) -> None:
        if args[1] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    with (
        mock.patch.object(loop, "train_loader", load_until_told),
        mock.patch.object(checkpoint, "save", save_and_tell),
    ):
        return run_jobs(place, jobs)


def run_alone(place: Path, folder: Path, options: dict[str, Any], stuck_at: int | None = None) -> None:
    """One process. stuck_at: the step whose checkpoint is written by half, and no further."""
    begin()
    write = portable.write_tensors

    def write_by_half(path: Path, *args: Any) -> None:
        write(path, *args)
        if path.parent.name == f".step{stuck_at}":
            os.truncate(path, path.stat().st_size // 2)
            (folder / "stuck").touch()
            time.sleep(1000)

    with mock.patch.object(portable, "write_tensors", write_by_half):
        run_job(place, folder, "zero2_adam_mini", options)


def resume_and_reshard(place: Path, jobs: list[tuple], whole: Path, engine: Path, back: Path) -> list[tuple]:
    """Some jobs; then of `whole` step 4 becomes DeepSpeed's own files, from which a run goes on; and they become
    portable again."""
    outcomes = run_jobs(place, jobs)
    told = convert(whole, engine, 2, 4)
    convert(engine, back, None, None)
    resume = {"resume": True, "checkpoint_format": "engine", "accumulation": 2}
    return [*outcomes, (None, told), run_job(place, engine, "zero2_adam_mini", resume)]
