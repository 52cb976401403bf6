"""What a run saves: checkpoints (DeepSpeed's or torch.distributed's files, the facts a resumed run must share, and a
`latest` that is always whole), and at its end the model as a Hugging Face folder."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import deepspeed
import transformers

from ds_memopt.engines.fsdp2 import entries
from ds_memopt.train.ranks import Ranks, on_all_ranks
from ds_memopt.train.record import write_json, write_text

FACTS = "run.json"


def save(engine: Any, folder: Path, step: int, facts: dict[str, Any], ranks: Ranks) -> None:
    """Save the engine's state as folder/step<step>, then point folder/latest to it. All ranks call.

    DeepSpeed's own `latest` is written before its barrier, when other ranks may still be writing: a kill at that moment
    would leave it pointing to half a checkpoint. So it is written here, after the barrier that ends save_checkpoint.
    """
    tag = f"step{step}"
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    if ranks.is_main:
        files = sorted(path.name for path in (folder / tag).iterdir() if path.suffix in (".pt", ".distcp"))
        write_json(folder / tag / FACTS, {**facts, "step": step, "files": files})
        write_text(folder / "latest", tag)


def check(folder: Path, facts: dict[str, Any], ranks: Ranks) -> int:
    """The step of the checkpoint that folder/latest points to, after reading all its files. All ranks call.

    ValueError on all ranks if there is no checkpoint, if a file is missing or damaged, or if one of `facts` (what the
    trajectory depends on: ranks, batch, data, ...) has changed since.
    """
    return on_all_ranks(lambda: _check(folder, facts, ranks))


def load(engine: Any, folder: Path, step: int) -> None:
    """Restore the engine from folder/step<step>, which `check` has passed. All ranks call."""
    loaded, _ = engine.load_checkpoint(str(folder), tag=f"step{step}")
    if loaded is None or engine.global_steps != step:
        raise ValueError(
            f"the engine did not restore step {step} from {folder}: it stands at step {engine.global_steps}"
        )


def save_model(engine: Any, folder: Path, tokenizer: str | None, ranks: Ranks) -> None:
    """Write the engine's model as the Hugging Face folder `folder`, in place of what is there. All ranks call.

    The weights are those that the model computes with, bf16 in a bf16 run, or under FSDP2 its fp32 masters of them.
    tokenizer: the folder of the tokenizer to save beside them, or None. The first rank holds a copy of all weights in
    CPU memory meanwhile.
    """
    weights = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            if ranks.is_main:
                weights[name] = whole.detach().to("cpu", copy=True)
    on_all_ranks(lambda: _write_model(engine.module, weights, folder, tokenizer) if ranks.is_main else None)


def _write_model(
    model: transformers.PreTrainedModel, weights: dict[str, Any], folder: Path, tokenizer: str | None
) -> None:
    kept = model.state_dict().keys()  # some buffers are computed, not saved
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in kept}
    aside = folder.with_name(f".{folder.name}")  # a run that is killed here leaves no half folder
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, state_dict=weights | buffers)
    if tokenizer:
        transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True).save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _check(folder: Path, facts: dict[str, Any], ranks: Ranks) -> int:
    latest = folder / "latest"
    if not latest.is_file():
        raise ValueError(f"--resume found no checkpoint: {latest} does not exist; start afresh in another --output_dir")
    tag = latest.read_text().strip()
    try:
        saved = json.loads((folder / tag / FACTS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder / tag} is damaged: cannot read {FACTS} ({error})") from error
    changed = [f"{key} was {saved.get(key)}, is {value}" for key, value in facts.items() if saved.get(key) != value]
    if changed:
        raise ValueError(
            f"--resume needs the settings that checkpoint {folder / tag} was made with: {'; '.join(changed)}"
        )
    for name in saved["files"][ranks.rank :: ranks.world_size]:
        path = folder / tag / name
        try:
            damaged = _first_damaged(path)
        except (OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise ValueError(f"checkpoint file {path} is missing or damaged ({error}); {_REMEDY}") from error
        if damaged:
            raise ValueError(f"checkpoint file {path} is damaged (checksum of {damaged}); {_REMEDY}")
    return saved["step"]


def _first_damaged(path: Path) -> str | None:
    """The first tensor that differs from its CRC-32, which torch.save writes into its zip files."""
    for file in entries(path) if path.suffix == ".distcp" else [path]:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                return damaged
    return None


_REMEDY = "to go back, write the name of an older checkpoint folder into `latest`"
