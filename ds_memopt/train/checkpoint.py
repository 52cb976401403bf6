"""What a run saves: checkpoints (portable ones, or DeepSpeed's or torch.distributed's files and what a resumed run must
know of them), and at its end the model as a Hugging Face folder. Both are written aside, and get their names when they
are whole."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import transformers

from ds_memopt import checkpoint as portable
from ds_memopt.checkpoint import durable
from ds_memopt.checkpoint.durable import LATEST
from ds_memopt.engines.checkpoint_files import errors_after_all_ranks, refuse_code
from ds_memopt.engines.held_bytes import checkpoint_bytes, first_not_finite, is_finite
from ds_memopt.engines.processes import SharedError
from ds_memopt.measure import GIB
from ds_memopt.results.record import METRICS, write_json, write_text
from ds_memopt.train.options import RunOptions
from ds_memopt.train.output_folder import CHECKPOINTS
from ds_memopt.train.presets import MODEL
from ds_memopt.train.ranks import Ranks, on_all_ranks
from ds_memopt.train.resumed_batch import of_any_place
from ds_memopt.train.settings import Settings

FACTS = "run.json"


def save(engine: Any, step: int, settings: Settings, ranks: Ranks) -> None:
    """Save the engine's state as checkpoints/step<step>, then point `latest` to it. All ranks call.

    SharedError if a weight, master or state is no finite number, or if a file cannot be written; earlier checkpoints
    stay as they are.
    """
    folder, facts = settings.output_dir / CHECKPOINTS, settings.facts
    _refuse_not_finite(engine, folder, step)
    if settings.checkpoint_format == "portable":
        portable.save(engine, folder, step, keep=settings.keep_checkpoints, settings=facts)
        return
    aside, needs = folder / f".step{step}", sum(_of_all_ranks(checkpoint_bytes(engine)))
    try:
        on_all_ranks(lambda: _make_room(aside, needs) if ranks.is_main else None)
        on_all_ranks(lambda: _write(engine, aside))
        names = _of_all_ranks(_files(aside) if ranks.is_main else None)[0]
        digests = on_all_ranks(lambda: {name: _digest(aside / name) for name in names[ranks.rank :: ranks.world_size]})
        files = {name: digest for some in _of_all_ranks(digests) for name, digest in some.items()}
        known = {**facts, "step": step, "files": dict(sorted(files.items()))}
        on_all_ranks(lambda: _publish(aside, known, settings.keep_checkpoints) if ranks.is_main else None)
    except ValueError as error:
        full = _of_all_ranks(_give_up(aside, needs) if ranks.is_main else None)[0]
        raise SharedError(full or f"the checkpoint of step {step} could not be saved: {error}") from error


def begin_save(engine: Any, step: int, settings: Settings) -> portable.SaveInFlight:
    """The same, of a portable checkpoint that is written behind the next steps."""
    folder = settings.output_dir / CHECKPOINTS
    _refuse_not_finite(engine, folder, step)
    return portable.begin_save(engine, folder, step, keep=settings.keep_checkpoints, settings=settings.facts)


def newest(folder: Path) -> str:
    """Which checkpoint there is, for a message."""
    latest = folder / LATEST
    return f"the last good one is {folder / latest.read_text()}" if latest.exists() else "there is none before"


def find(options: RunOptions, settings: Settings, ranks: Ranks) -> int:
    """The step that --resume goes on from, after reading all files of its checkpoint. All ranks call.

    It is the step that --resume gives, or that of `latest`, or of the newest whole checkpoint before; 0 of a run that
    ended before its first one. ValueError on all ranks if none is whole, if a file may run code, or if one of
    settings.facts (what the trajectory depends on: ranks, batch, data, ...) has changed since.
    """
    folder = settings.output_dir / CHECKPOINTS
    steps = _of_all_ranks(on_all_ranks(lambda: _steps(folder, options.resume) if ranks.is_main else None))[0]
    if not steps:
        if ranks.is_main:
            print(f"{folder} has no checkpoint yet: the run starts again from step 0", flush=True)
        return 0
    faults = []
    for step in steps:
        path = folder / f"step{step}"
        found = _of_all_ranks(on_all_ranks(lambda path=path: _fault(path, settings.facts, ranks)))
        fault = next(filter(None, found), None)
        if not fault:
            on_all_ranks(lambda path=path: None if options.trust_checkpoint else _refuse_code(path, ranks))
            if ranks.is_main:
                print("".join(f"WARNING: {fault}\n" for fault in faults) + f"resuming from {path}", flush=True)
            return step
        faults.append(fault)
    remedy = (
        "--resume without a number takes the newest whole one" if options.resume is not True else "no other is left"
    )
    raise SharedError(f"{'; '.join(faults)}; {remedy}")


def load(engine: Any, folder: Path, step: int, ranks: Ranks) -> None:
    """Restore the engine from folder/step<step>, which `find` has passed, and make it `latest`. All ranks call."""
    restore(engine, folder, step)
    if ranks.is_main:
        write_text(folder / LATEST, f"step{step}")


def restore(engine: Any, folder: Path, step: int) -> None:
    """Restore the engine from folder/step<step>, which `find` has passed. All ranks call."""
    if _is_portable(folder / f"step{step}"):
        loaded = portable.load_from(engine, folder / f"step{step}")
    else:
        loaded, _ = engine.load_checkpoint(str(folder), tag=f"step{step}")
    if loaded is None or engine.global_steps != step:
        raise ValueError(
            f"the engine did not restore step {step} from {folder}: it stands at step {engine.global_steps}"
        )


def save_model(engine: Any, folder: Path, tokenizer: str | None, ranks: Ranks) -> None:
    """Write the engine's model as the Hugging Face folder `folder`, in place of what is there. All ranks call.

    The weights are those that the model computes with, bf16 in a bf16 run, or under FSDP2 its fp32 masters of them.
    tokenizer: the folder of the tokenizer to save beside them, or None. The first rank holds a copy of all weights in
    CPU memory meanwhile. ValueError on all ranks if a weight is no finite number, or if the folder cannot be written.
    """
    weights = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            if ranks.is_main:
                weights[name] = whole.detach().to("cpu", copy=True)
    on_all_ranks(lambda: _write_model(engine.module, weights, folder, tokenizer) if ranks.is_main else None)


def remove_asides(output_dir: Path) -> None:
    """Remove from a run's folder what it had written aside when it was killed."""
    for folder in (output_dir, output_dir / CHECKPOINTS):
        for path in folder.glob(".*"):
            if re.fullmatch(rf"\.({MODEL}|step\d+)", path.name):
                shutil.rmtree(path)
            elif re.fullmatch(rf"\.({LATEST}|{METRICS}|\w+\.json)\.\d+", path.name):  # of write_text
                path.unlink()


def _write_model(
    model: transformers.PreTrainedModel, weights: dict[str, Any], folder: Path, tokenizer: str | None
) -> None:
    if wrong := [name for name, weight in weights.items() if not is_finite(weight)]:
        raise ValueError(f"{wrong[0]} holds infinities or NaNs: the model is not saved")
    kept = model.state_dict().keys()  # some buffers are computed, not saved
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in kept}
    aside, needs = folder.with_name(f".{folder.name}"), sum(weight.nbytes for weight in weights.values())
    _make_room(aside, needs)
    try:
        model.save_pretrained(aside, state_dict=weights | buffers)
        if tokenizer:
            transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).save_pretrained(aside)
    except Exception as error:
        raise ValueError(_give_up(aside, needs) or f"the model could not be saved in {folder}: {error}") from error
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _of_all_ranks(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _refuse_not_finite(engine: Any, folder: Path, step: int) -> None:
    found = _of_all_ranks(first_not_finite(engine))
    wrong = next((f"{name} on rank {rank}" for rank, name in enumerate(found) if name), None)
    if wrong:
        raise SharedError(
            f"{wrong} holds infinities or NaNs after step {step}: no checkpoint is saved, {newest(folder)}; lower "
            "--lr, lengthen --warmup_steps"
        )


def _make_room(aside: Path, needs: int) -> None:
    """An empty folder, on a disk that has the bytes for it."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    free = shutil.disk_usage(aside).free
    if free < needs:
        raise ValueError(f"no space left in {aside.parent}: needs {needs / GIB:.3g} GiB, has {free / GIB:.3g} GiB")


def _give_up(aside: Path, needs: int) -> str | None:
    """Remove what was written; returns a message if the disk is full, for which torch and safetensors have others."""
    free = shutil.disk_usage(aside.parent).free
    written = sum(path.stat().st_size for path in aside.rglob("*"))
    shutil.rmtree(aside, ignore_errors=True)
    if free + written < needs or free < needs / 100:
        return f"no space left in {aside.parent}: needs {needs / GIB:.3g} GiB, has {(free + written) / GIB:.3g} GiB"
    return None


def _write(engine: Any, aside: Path) -> None:
    # DeepSpeed's own `latest` would be written before its last barrier, when other ranks may still be writing.
    with errors_after_all_ranks(engine):
        engine.save_checkpoint(str(aside.parent), tag=aside.name, save_latest=False)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != FACTS)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _publish(aside: Path, known: dict[str, Any], keep: int | None) -> None:
    write_json(aside / FACTS, known)
    durable.sync_files(aside)
    durable.publish(aside, keep)


def _is_portable(folder: Path) -> bool:
    return (folder / portable.INDEX).exists()


def _steps(folder: Path, resume: bool | int) -> list[int]:
    """Of the checkpoints to try, one after the other; none where a run has saved none."""
    if resume is True:
        return durable.newest_first(folder)
    saved = durable.steps(folder)
    if resume not in saved:
        raise ValueError(f"--resume {resume} found no checkpoint of that step in {folder}: it has {saved or 'none'}")
    return [resume]


def _fault(folder: Path, facts: dict[str, Any], ranks: Ranks) -> str | None:
    """What is wrong with the checkpoint, as far as this rank's share of its files tells.

    ValueError if it was made with other settings, which no other checkpoint would mend.
    """
    if _is_portable(folder):
        return _fault_of_portable(folder, facts, ranks)
    try:
        saved = json.loads((folder / FACTS).read_text())
        files = saved["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"checkpoint {folder} is damaged: {FACTS} is missing or has no checksums ({error})"
    _refuse_changed(folder, saved, facts)
    unlisted = {name for name in _files(folder) if name.endswith((".pt", ".distcp"))} - {*saved["files"]}
    if unlisted:
        return f"checkpoint file {folder / min(unlisted)} is not listed in {FACTS}"
    for name, digest in list(files)[ranks.rank :: ranks.world_size]:
        try:
            if _digest(folder / name) != digest:
                return f"checkpoint file {folder / name} is damaged: its SHA-256 is not the one in {FACTS}"
        except OSError as error:
            return f"checkpoint file {folder / name} is missing or damaged ({error.strerror})"
    return None


def _fault_of_portable(folder: Path, facts: dict[str, Any], ranks: Ranks) -> str | None:
    try:
        index = portable.Index.read(folder)
    except ValueError as error:
        return str(error)
    _refuse_changed(folder, of_any_place(index.settings), of_any_place(facts))
    return portable.fault(folder, index.files, sorted(index.files)[ranks.rank :: ranks.world_size])


def _refuse_changed(folder: Path, saved: dict[str, Any], facts: dict[str, Any]) -> None:
    changed = [f"{key} was {saved.get(key)}, is {value}" for key, value in facts.items() if saved.get(key) != value]
    if changed:
        raise ValueError(f"--resume needs the settings that checkpoint {folder} was made with: {'; '.join(changed)}")


def _refuse_code(folder: Path, ranks: Ranks) -> None:
    for name in _files(folder)[ranks.rank :: ranks.world_size]:
        try:
            refuse_code(folder / name)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint file {folder / name} may run code when it is loaded: {error}. If you trust whoever wrote "
                "it, add --trust_checkpoint"
            ) from error
