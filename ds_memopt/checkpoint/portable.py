"""Saving and loading checkpoints that any number of ranks, any stage and any engine can go on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_memopt.checkpoint import durable
from ds_memopt.checkpoint.owners import Claim, share_out
from ds_memopt.checkpoint.part_files import WORDS, PartFiles, digest, key_in_file, write_tensors
from ds_memopt.checkpoint.part_index import Entry, Index, fault
from ds_memopt.checkpoint.run_state import Run
from ds_memopt.engines.processes import SharedError, of_all_ranks, on_all_ranks, rank_and_world_size
from ds_memopt.optimizers.base.named_optimizer import make_log_visible
from ds_memopt.shards import is_first_rank

logger = logging.getLogger("ds_memopt")


@torch.no_grad()
def save(
    target: Any,
    folder: str | Path,
    step: int | None = None,
    *,
    keep: int | None = None,
    settings: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save a run as folder/step<step>, and make it folder/latest. All ranks call, between two steps.

    target: an engine of DeepSpeed's, or (model, optimizer), or (model, optimizer, lr_scheduler).
    step: steps made; an engine knows. keep: how many checkpoints to keep, the newest; None: all.
    extra: JSON that `load` gives back, such as the position in your data. settings: the same, for our jobs.

    Every rank writes a part of its own to safetensors files. Returns the checkpoint's folder. Raises ValueError, on
    all ranks, where it cannot be saved; earlier checkpoints stay as they are.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep} is out of range: it must be at least 1, or None to keep all.")
    folder, run = Path(folder), on_all_ranks(lambda: Run.of(target))
    step = getattr(run.engine, "global_steps", None) if step is None else step
    if step is None:
        raise ValueError("A model and an optimizer do not say how many steps were made: give step=.")
    rank, _ = rank_and_world_size()
    first = rank == 0
    index = on_all_ranks(lambda: _index(run, step, settings or {}, extra or {}))
    mine = on_all_ranks(lambda: _claims(run))
    told = of_all_ranks((mine, set() if run.ours else run.foreign.scalars()))
    index.scalars = sorted(set().union(*(scalars for _, scalars in told)))
    shares = share_out([claims for claims, _ in told])
    needs = sum(claim.nbytes for share in shares for claim in share)
    aside = folder / f".step{step}"
    try:
        on_all_ranks(lambda: durable.begin(folder, step, needs) if first else None)
        written = of_all_ranks(on_all_ranks(lambda: _write(run, aside / _file(rank), shares[rank])))
        for number, share in enumerate(shares):
            index.entries += [Entry(*one[:3], one.stop - one.start, _file(number), one.dtype) for one in share]
            index.files |= {_file(number): written[number]} if share else {}
        on_all_ranks(lambda: _publish(index, aside, keep) if first else None)
    except ValueError as error:
        if first:
            durable.give_up(aside)
        raise SharedError(f"the checkpoint of step {step} could not be saved: {error}") from error
    return folder / f"step{step}"


def check_target(target: Any) -> None:
    """Raise ValueError for what `save` would refuse, before a run has made its steps."""
    _index(Run.of(target), 0, {}, {})


@torch.no_grad()
def load(target: Any, folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """Let a run go on from the newest whole checkpoint in a folder, or from that of a step. All ranks call.

    target: as for `save`; any number of ranks, any stage and engine, built of the same model and method. Returns
    {"step": ..., "extra": ..., "settings": ...} of it.

    Raises ValueError, on all ranks, where there is no whole checkpoint, and for that of another model or method.
    """
    path, faults = find(Path(folder), step)
    for one in faults if is_first_rank() else ():
        make_log_visible()
        logger.warning("%s", one)
    index = load_from(target, path)
    return {"step": index.step, "extra": index.extra, "settings": index.settings}


def find(folder: Path, step: int | None = None) -> tuple[Path, list[str]]:
    """The newest checkpoint whose files are whole, or that of a step, and what is wrong with newer ones. Every rank
    reads its share of the files, to check them. Raises ValueError on all ranks if there is none."""
    candidates = of_all_ranks(on_all_ranks(lambda: durable.newest_first(folder) if is_first_rank() else None))[0]
    if step is not None:
        candidates = [step]
    faults: list[str] = []
    for candidate in candidates:
        path = folder / f"step{candidate}"
        wrong = faults_of(path)
        if wrong is None:
            return path, faults
        faults.append(wrong)
    raise SharedError("; ".join(faults) or f"there is no checkpoint in {folder}")


def faults_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is. Every rank reads its share of the files. All ranks call."""

    def mine() -> str | None:
        try:
            files = Index.read(path).files
        except ValueError as error:
            return str(error)
        rank, world_size = rank_and_world_size()
        return fault(path, files, sorted(files)[rank::world_size])

    return next(filter(None, of_all_ranks(mine())), None)


@torch.no_grad()
def load_from(target: Any, path: Path) -> Index:
    """Let a run go on from a checkpoint that `find` has found whole. Returns its index."""

    def prepare() -> tuple[Run, Index]:
        run, index = Run.of(target), Index.read(path)
        run.check(index)
        return run, index

    run, index = on_all_ranks(prepare)
    files = PartFiles(path)
    if hasattr(run.wrapper, "checkpoint_event_prologue"):
        run.wrapper.checkpoint_event_prologue()
    on_all_ranks(lambda: run.load_weights(index, files))
    run.go_to_block(index)
    on_all_ranks(lambda: run.load_masters(index, files))
    if hasattr(run.wrapper, "checkpoint_event_epilogue"):
        run.wrapper.checkpoint_event_epilogue()
    on_all_ranks(lambda: run.load_states(index, files))
    on_all_ranks(lambda: run.load_numbers(index))
    return index


def _file(rank: int) -> str:
    return f"rank{rank:05d}.safetensors"


def _index(run: Run, step: int, settings: dict[str, Any], extra: dict[str, Any]) -> Index:
    _, world_size = rank_and_world_size()
    index = Index(
        step=step, world_size=world_size, engine=run.engine_name(), optimizer=type(run.optimizer).__name__,
        shapes=run.shapes(), entries=[], files={}, progress=run.progress(), groups=run.groups(),
        scheduler=run.scheduler_state(), loss_scale=run.loss_scale(), settings=settings, extra=extra,
        model_config=run.model_config(),
    )  # fmt: skip
    index.check_json()
    return index


def _claims(run: Run) -> list[Claim]:
    return [
        Claim(part.name, part.key, part.start, part.stop, WORDS[part.values.dtype], part.values.itemsize, master)
        for part, master in run.parts()
    ]


def _write(run: Run, path: Path, share: list[Claim]) -> dict[str, Any]:
    """This rank's file, if it has anything to write: its bytes and checksum."""
    if not share:
        return {}
    described = [(key_in_file(*claim[:3]), _dtype(claim.dtype), (claim.stop - claim.start,)) for claim in share]
    left: dict[tuple[str, str, bool], list[Claim]] = {}
    for claim in share:
        left.setdefault((claim.name, claim.key, claim.master), []).append(claim)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for part, master in run.parts():
            wanted = left.get((part.name, part.key, master), [])
            for claim in [claim for claim in wanted if part.start <= claim.start and claim.stop <= part.stop]:
                wanted.remove(claim)  # tied to several tensors, such as a count of steps, it is handed out again
                yield key_in_file(*claim[:3]), part.values[claim.start - part.start : claim.stop - part.start]

    write_tensors(path, described, tensors(), {"format": "pt"})
    assert not any(left.values()), "what was claimed was not handed out again"
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def _dtype(word: str) -> torch.dtype:
    return next(dtype for dtype, name in WORDS.items() if name == word)


def _publish(index: Index, aside: Path, keep: int | None) -> None:
    index.write(aside)
    durable.publish(aside, keep)
