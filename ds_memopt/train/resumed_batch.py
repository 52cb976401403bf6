"""A resumed run keeps its global batch, and so its data order, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_memopt.checkpoint import Index
from ds_memopt.checkpoint.durable import newest_first
from ds_memopt.train.output_folder import CHECKPOINTS

OF_THE_PLACE = ("world_size", "zero_stage", "micro_batch")
"""Facts that may change where a portable checkpoint is resumed."""

HALVES = ("zo_batch", "fo_batch")
"""Hyper-parameters that count rows of a rank."""


def saved_facts(output_dir: Path, resume: bool | int) -> dict[str, Any] | None:
    """Of the run whose portable checkpoint --resume will go on from; None where there is none to read."""
    folder = output_dir / CHECKPOINTS
    for step in newest_first(folder) if resume is True else [resume]:
        try:
            return Index.read(folder / f"step{step}").settings
        except ValueError:  # it will be told when the checkpoints are read
            continue
    return None


def keep_global_batch(
    saved: dict[str, Any], micro_batch: int | None, world_size: int, accumulates: bool
) -> tuple[int, int]:
    """(micro_batch, accumulation) that make up the saved run's global batch on this many ranks.

    micro_batch: None where it is free; then it is the saved one, or the largest below it that divides. ValueError, with
    what would do, where the ranks or the micro-batch do not divide it.
    """
    whole = saved["global_batch"]
    kept = f"--resume keeps the global batch of {whole} sequences"
    if whole % world_size:
        raise ValueError(f"{kept}, which {world_size} ranks do not divide: run on {_listed(_divisors(whole))} ranks")
    share = whole // world_size
    if not accumulates:
        if micro_batch not in (None, share):
            raise ValueError(f"{kept}, without accumulation: a micro-batch of {micro_batch} must be {share}")
        return share, 1
    if micro_batch is None:
        micro_batch = max(size for size in _divisors(share) if size <= saved["micro_batch"])
    if share % micro_batch:
        raise ValueError(
            f"{kept}, {share} for each of {world_size} ranks, which micro-batches of {micro_batch} do not divide: "
            f"choose {_listed(_divisors(share))}"
        )
    return micro_batch, share // micro_batch


def keep_halves(saved: dict[str, Any], params: dict[str, Any], world_size: int) -> None:
    """Set zo_batch and fo_batch so that both halves of the global batch stay. ValueError where ranks do not divide."""
    before, ranks = saved["optimizer"]["params"], saved["world_size"]
    for name in HALVES:
        whole = before[name] * ranks
        if whole % world_size:
            both = [n for n in _divisors(before["zo_batch"] * ranks) if before["fo_batch"] * ranks % n == 0]
            raise ValueError(
                f"--resume keeps {name} at {whole} sequences of all ranks, which {world_size} ranks do not divide: run "
                f"on {_listed(both)} ranks"
            )
        params[name] = whole // world_size


def of_any_place(facts: dict[str, Any]) -> dict[str, Any]:
    """What of a run's facts must be the same wherever it is resumed."""
    optimizer = facts["optimizer"]
    params = {name: value for name, value in optimizer["params"].items() if name != "torch_adam"}
    params |= {name: params[name] * facts["world_size"] for name in HALVES if name in params}
    kept = {name: value for name, value in facts.items() if name not in OF_THE_PLACE}
    return kept | {"optimizer": optimizer | {"params": params}}


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
