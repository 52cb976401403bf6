"""Saving and loading checkpoints that any number of ranks, any stage and any engine can go on from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    plan = _plan(target, folder, step, keep, settings, extra)
    with _failures_told(plan):
        written = on_all_ranks(lambda: _write(plan, _held(plan)))
        _list_files(plan, written)
        on_all_ranks(lambda: _publish(plan))
    return plan.path


@torch.no_grad()
def begin_save(
    target: Any,
    folder: str | Path,
    step: int | None = None,
    *,
    keep: int | None = None,
    settings: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> SaveInFlight:
    """As `save`, but the run may go on when this returns: what each rank writes is in its host memory by then, and a
    thread writes it. All ranks call, and then the result's methods. Only one may be in flight."""
    plan = _plan(target, folder, step, keep, settings, extra)
    with _failures_told(plan):
        copies = on_all_ranks(lambda: _copies(plan))
    return SaveInFlight(plan, copies)


class SaveInFlight:
    """A checkpoint that a thread of each rank writes behind the next steps. The threads call no collectives."""

    def __init__(self, plan: _Plan, copies: list[tuple[str, torch.Tensor]]) -> None:
        self._plan, self._listed = plan, False
        self._thread = ThreadPoolExecutor(1)
        self._work = self._thread.submit(_write, plan, copies)

    def is_writing(self) -> bool:
        """Whether this rank's thread is at work. When none is, `advance` waits for nothing."""
        return not self._work.done()

    def advance(self) -> bool:
        """Wait until no thread is at work, and begin what comes after: first the parts are written, then the whole gets
        its name. Returns whether it has. All ranks call. Raises as `save`."""
        with _failures_told(self._plan):
            written = on_all_ranks(self._work.result)
            if not self._listed:
                _list_files(self._plan, written)
                self._listed, self._work = True, self._thread.submit(_publish, self._plan)
                return False
        self._thread.shutdown()
        return True

    def finish(self) -> Path:
        """Wait until it has its name; returns its folder. All ranks call. Raises as `save`."""
        while not self.advance():
            pass
        return self._plan.path


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


@dataclass
class _Plan:
    """What all ranks have settled of a checkpoint. shares: what each writes. path: where it will be."""

    run: Run
    index: Index
    shares: list[list[Claim]]
    path: Path
    keep: int | None

    @property
    def aside(self) -> Path:
        return self.path.with_name(f".{self.path.name}")

    @property
    def mine(self) -> list[Claim]:
        return self.shares[rank_and_world_size()[0]]


def _plan(
    target: Any,
    folder: str | Path,
    step: int | None,
    keep: int | None,
    settings: dict[str, Any] | None,
    extra: dict[str, Any] | None,
) -> _Plan:
    """Settle what is saved, and begin its folder."""
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep} is out of range: it must be at least 1, or None to keep all.")
    folder, run = Path(folder), on_all_ranks(lambda: Run.of(target))
    step = getattr(run.engine, "global_steps", None) if step is None else step
    if step is None:
        raise ValueError("A model and an optimizer do not say how many steps were made: give step=.")
    index = on_all_ranks(lambda: _index(run, step, settings or {}, extra or {}))
    mine = on_all_ranks(lambda: _claims(run))
    told = of_all_ranks((mine, set() if run.ours else run.foreign.scalars()))
    index.scalars = sorted(set().union(*(scalars for _, scalars in told)))
    plan = _Plan(run, index, share_out([claims for claims, _ in told]), folder / f"step{step}", keep)
    needs = sum(claim.nbytes for share in plan.shares for claim in share)
    with _failures_told(plan):
        on_all_ranks(lambda: durable.begin(folder, step, needs) if is_first_rank() else None)
    return plan


@contextlib.contextmanager
def _failures_told(plan: _Plan) -> Iterator[None]:
    """An error of all ranks becomes one of the checkpoint, of which nothing stays."""
    try:
        yield
    except ValueError as error:
        if is_first_rank():
            durable.give_up(plan.aside)
        raise SharedError(f"the checkpoint of step {plan.index.step} could not be saved: {error}") from error


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


def _held(plan: _Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank writes, by its key in the file: views of what the run holds."""
    left: dict[tuple[str, str, bool], list[Claim]] = {}
    for claim in plan.mine:
        left.setdefault((claim.name, claim.key, claim.master), []).append(claim)
    for part, master in plan.run.parts():
        wanted = left.get((part.name, part.key, master), [])
        for claim in [claim for claim in wanted if part.start <= claim.start and claim.stop <= part.stop]:
            wanted.remove(claim)  # tied to several tensors, such as a count of steps, it is handed out again
            yield key_in_file(*claim[:3]), part.values[claim.start - part.start : claim.stop - part.start]
    assert not any(left.values()), "what was claimed was not handed out again"


def _copies(plan: _Plan) -> list[tuple[str, torch.Tensor]]:
    """The same in host memory, pinned where it comes from a GPU, which then copies without a pause."""
    copies = []
    for key, values in _held(plan):
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        copies.append((key, copy.copy_(values, non_blocking=True)))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # what is copied may change when this returns
    return copies


def _write(plan: _Plan, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """This rank's file, if it has anything to write: its bytes and checksum."""
    if not plan.mine:
        return {}
    path = plan.aside / _file(rank_and_world_size()[0])
    described = [(key_in_file(*claim[:3]), _dtype(claim.dtype), (claim.stop - claim.start,)) for claim in plan.mine]
    write_tensors(path, described, tensors, {"format": "pt"})
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def _list_files(plan: _Plan, written: dict[str, Any]) -> None:
    """What all ranks have written becomes known to the index."""
    for number, (share, one) in enumerate(zip(plan.shares, of_all_ranks(written), strict=True)):
        plan.index.entries += [Entry(*c[:3], c.stop - c.start, _file(number), c.dtype) for c in share]
        plan.index.files |= {_file(number): one} if share else {}


def _dtype(word: str) -> torch.dtype:
    return next(dtype for dtype, name in WORDS.items() if name == word)


def _publish(plan: _Plan) -> None:
    """The first rank gives it its name."""
    if is_first_rank():
        plan.index.write(plan.aside)
        durable.publish(plan.aside, plan.keep)
