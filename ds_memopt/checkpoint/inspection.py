"""Looking at checkpoints without a run: what is in one, whether it is whole; its weights as a Hugging Face folder."""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ds_memopt.checkpoint.durable import newest_first, steps, sync_folder, write_synced
from ds_memopt.checkpoint.part_files import PartFiles, key_in_file, write_tensors
from ds_memopt.checkpoint.part_index import BUFFER, INDEX, WEIGHT, Index, fault
from ds_memopt.measure import GIB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def the_checkpoint(folder: Path) -> Path:
    """The folder itself, or the newest whole checkpoint in it. Raises ValueError if it is neither."""
    if (folder / INDEX).exists():
        return folder
    for step in newest_first(folder):
        path = folder / f"step{step}"
        if _fault(path) is None:
            return path
    raise ValueError(f"{folder} is no portable checkpoint and has no whole one in it")


def describe(folder: Path) -> str:
    """What a checkpoint holds: bytes by kind, step, method, ranks."""
    path = the_checkpoint(folder)
    index = Index.read(path)
    elements, sizes, dtypes = Counter(), Counter(), {}
    for entry in index.entries:
        elements[entry.key] += entry.length
        sizes[entry.key] += entry.nbytes
        dtypes.setdefault(entry.key, set()).add(entry.dtype)
    lines = [
        f"{path}: {index.optimizer}, step {index.step}, saved by {index.world_size} ranks ({index.engine})",
        f"{'':16}{'elements':>16}{'GiB':>10}  dtype",
    ]
    for key in [WEIGHT, *sorted(sizes.keys() - {WEIGHT})]:
        lines.append(f"{key:16}{elements[key]:16,}{sizes[key] / GIB:10.3g}  {', '.join(sorted(dtypes[key]))}")
    told = {
        "parameters": len(index.names(WEIGHT)), "files": len(index.files),
        "learning rates": [group.get("lr") for group in index.groups], "progress": index.progress,
        "settings": index.settings, "extra": index.extra,
    }  # fmt: skip
    lines += [f"{name}: {value if isinstance(value, int) else json.dumps(value)[:400]}" for name, value in told.items()]
    return "\n".join(lines)


def verify(folder: Path) -> Iterator[str]:
    """A line for each checkpoint in a folder, or for the one that it is, after reading all of its files.

    Raises ValueError at the end if one is damaged, or if there is none.
    """
    paths = [folder] if (folder / INDEX).exists() else [folder / f"step{step}" for step in steps(folder)]
    if not paths:
        raise ValueError(f"there is no checkpoint in {folder}")
    damaged = 0
    for path in paths:
        wrong = _fault(path)
        damaged += wrong is not None
        yield wrong or f"{path}: whole"
    if damaged:
        raise ValueError(f"{damaged} of {len(paths)} checkpoints are damaged")


def _fault(path: Path) -> str | None:
    try:
        return fault(path, Index.read(path).files)
    except ValueError as error:
        return str(error)


def export(folder: Path, out: Path, dtype: str | None = None) -> str:
    """Write a checkpoint's weights as a Hugging Face folder. dtype: of them; None: as they were saved, masters in fp32.

    Raises ValueError where the checkpoint is damaged, or `out` is there already. Returns what was written.
    """
    path = the_checkpoint(folder)
    if wrong := _fault(path):
        raise ValueError(wrong)
    if out.exists():
        raise ValueError(f"{out} is there already: name a new folder")
    index, files = Index.read(path), PartFiles(path)
    keys = {name: key for key in (WEIGHT, BUFFER) for name in index.names(key)}
    dtypes = {name: _dtype(index, name, key, dtype) for name, key in keys.items()}
    aside = out.with_name(f".{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    described = ((name, dtypes[name], tuple(index.shapes[name])) for name in keys)
    whole = ((name, _whole(index, files, name, key, dtypes[name])) for name, key in keys.items())
    try:
        write_tensors(aside / "model.safetensors", described, whole, {"format": "pt"})
        if index.model_config is not None:
            word = str(_most_used(dtypes.values())).removeprefix("torch.")
            write_synced(aside / "config.json", json.dumps(index.model_config | {"dtype": word}, indent=2) + "\n")
        aside.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ValueError(f"{out} could not be written: {error.strerror}") from error
    return f"{out}: {len(index.names(WEIGHT))} parameters of step {index.step}"


def _dtype(index: Index, name: str, key: str, wanted: str | None) -> torch.dtype:
    saved = functools.reduce(torch.promote_types, (entry.torch_dtype for entry in index.parts(name, key)))
    return DTYPES[wanted] if wanted and saved.is_floating_point else saved


def _whole(index: Index, files: PartFiles, name: str, key: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(index.numel(name), dtype=dtype)
    for entry in index.parts(name, key):
        part = files.read(entry.file, key_in_file(name, key, entry.start), 0, entry.length)
        tensor[entry.start : entry.stop].copy_(part)
    return tensor.view(index.shapes[name])


def _most_used(dtypes) -> torch.dtype:
    return Counter(dtypes).most_common(1)[0][0]
