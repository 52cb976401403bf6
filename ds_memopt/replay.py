"""Rebuild the weights of a zeroth-order run from those that it started with and from its trajectory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.checksum import as_hex, checksum
from ds_memopt.optimizers.trajectory import read_trajectory

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def replay(base: Path, trajectory: Path, out: Path, progress: Callable = lambda records: records) -> int:
    """Apply every step of the trajectory to the weights in `base`, and write them to `out`; returns the steps applied.

    base: a file of weights (.safetensors, or of torch.save), or a Hugging Face folder with one. out: the same kind; it
    must not exist, and appears whole or not at all. progress: wraps the records, as tqdm does.

    Raises ValueError, with nothing written, for other weights than the run began with, and for a damaged trajectory.
    """
    if out.exists():
        raise ValueError(f"{out} exists already. Give a path that does not.")
    header, records = read_trajectory(trajectory)
    if header.method != "MeZO":
        raise ValueError(f"{trajectory} is of {header.method}: it tells half of every step, not what gradients did.")
    source = base if base.is_file() else _weight_file(base)
    weights = _load(source)
    dtype = getattr(torch, header.dtype)
    listed = [name for names in header.parameters for name in names]
    if missing := [name for name in listed if name not in weights]:
        raise ValueError(f"{source} lacks {missing[0]} and {len(missing) - 1} others of {trajectory}: another model.")
    parameters = {name: nn.Parameter(weights[name].to(dtype).contiguous()) for name in listed}
    found = as_hex(checksum((name, 0, p.detach().view(-1)) for name, p in parameters.items()))
    if found != header.base_checksum:
        raise ValueError(
            f"{source} is not what the run began with: its checksum in {header.dtype} is {found}, that of {trajectory} "
            f"{header.base_checksum}. Give the weights before the first step."
        )
    hyper = dict(header.hyper)
    hyper.pop("epsilon")  # nothing is probed here, and a run of an older version may have had too small a one
    groups = [
        {"params": [(name, parameters[name]) for name in names], "weight_decay": decay}
        for names, decay in zip(header.parameters, hyper.pop("weight_decay"), strict=True)
    ]
    optimizer = METHODS[header.method](groups, model=nn.Module(), **hyper)
    for record in progress(records):
        for group, lr in zip(optimizer.param_groups, record["lr"].tolist(), strict=True):
            group["lr"] = lr
        optimizer.apply(record["g"].tolist())
    for name, parameter in parameters.items():
        weights[name].data = parameter.detach()  # tied names share a tensor
    _write(weights, source, base, out)
    return len(records)


def _weight_file(folder: Path) -> Path:
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(
            f"{folder} has neither of {', '.join(WEIGHT_FILES)}. Give a file of weights, or such a folder."
        )
    return found[0]


def _load(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _write(weights: dict[str, torch.Tensor], source: Path, base: Path, out: Path) -> None:
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if base.is_dir():
            shutil.copytree(base, aside)
        target = aside / source.name if base.is_dir() else aside
        if source.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(weights, target, metadata={"format": "pt"})
        else:
            torch.save(weights, target)
        aside.rename(out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
