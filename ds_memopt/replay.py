"""Rebuild the weights of a zeroth-order run from those that it started with and from its trajectory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ds_memopt.optimizers import METHODS, method_of
from ds_memopt.optimizers.mezo import MeZO
from ds_memopt.optimizers.probes.checksum import as_hex, checksum
from ds_memopt.optimizers.probes.trajectory import SKIPPED, TrajectoryHeader, read_trajectory

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
DTYPES = ("float32", "float64", "bfloat16", "float16")
HYPER = {*MeZO.hyper_parameters.rules()} - {"lr", "lockstep", "compiled", "trajectory"}
"""What MeZO writes of itself; each record has its own lr. A header decides no more than these: not how noise is
computed, and a file from elsewhere must not name another file."""


def replay(base: Path, trajectory: Path, out: Path, progress: Callable = lambda records: records) -> int:
    """Apply every step of the trajectory to the weights in `base`, and write them to `out`; returns the steps applied.

    base: a file of weights (.safetensors, or of torch.save), or a Hugging Face folder with one. out: the same kind; it
    must not exist, and appears whole or not at all. progress: wraps the records, as tqdm does.

    Raises ValueError, with nothing written, for other weights than the run began with, and for a trajectory that is
    damaged or that no run of MeZO would have written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already. Give a path that does not.")
    if not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: {out.parent} is no folder. Give a path in one.")
    header, records = read_trajectory(trajectory)
    hyper = _checked_hyper(trajectory, header)
    source = base if base.is_file() else _weight_file(base)
    weights = _load(source)
    dtype = getattr(torch, header.dtype)
    listed = [name for names in header.parameters for name in names]
    if missing := [name for name in listed if not isinstance(weights.get(name), torch.Tensor)]:
        raise ValueError(f"{source} lacks {missing[0]} and {len(missing) - 1} others of {trajectory}: another model.")
    parameters = {name: nn.Parameter(weights[name].to(dtype).contiguous()) for name in listed}
    found = as_hex(checksum((name, 0, p.detach().view(-1)) for name, p in parameters.items()))
    if found != header.base_checksum:
        raise ValueError(
            f"{source} is not what the run began with: its checksum in {header.dtype} is {found}, that of {trajectory} "
            f"{header.base_checksum}. Give the weights before the first step."
        )
    decays = hyper.pop("weight_decay")
    groups = [
        {"params": [(name, parameters[name]) for name in names], "weight_decay": decay}
        for names, decay in zip(header.parameters, decays, strict=True)
    ]
    try:
        optimizer = METHODS[header.method](groups, model=nn.Module(), **hyper)
    except ValueError as error:
        raise ValueError(f"{trajectory}, hyper-parameters: {error}") from error
    for record in progress(records):
        for group, lr in zip(optimizer.param_groups, record["lr"].tolist(), strict=True):
            group["lr"] = lr
        # Where it was skipped whatever the g: apply skips what is not finite.
        g = np.full_like(record["g"], np.nan) if record["flags"] == SKIPPED else record["g"]
        optimizer.apply(g.tolist())
    for name, parameter in parameters.items():
        weights[name].data = parameter.detach()  # tied names share a tensor
    _write(weights, source, base, out)
    return len(records)


def _checked_hyper(trajectory: Path, header: TrajectoryHeader) -> dict[str, Any]:
    """The hyper-parameters to build MeZO with, whose own checks they have yet to pass, and a list of weight_decay."""
    whole = [name for name, method in METHODS.items() if method.replayable]
    if method_of(header.method).splits_batch:
        raise ValueError(f"{trajectory} is of {header.method}: it tells half of every step, not what gradients did.")
    hyper, decays = header.hyper, header.hyper.get("weight_decay")
    for what, found, valid, limit in (
        ("method", header.method, header.method in whole, " or ".join(map(repr, whole))),
        ("dtype", header.dtype, header.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("hyper", ", ".join(sorted(hyper)), {*hyper} == HYPER, ", ".join(sorted(HYPER))),
        ("weight_decay", decays, isinstance(decays, list) and len(decays) == len(header.parameters), "one per group"),
        ("probes", hyper.get("probes"), hyper.get("probes") == header.probes, f"{header.probes}, as its records have"),
    ):
        if not valid:
            raise ValueError(
                f"{trajectory} has {what} {found!r}, but must have {limit}: no run of this ds_memopt wrote it. Use the "
                "one that did, and files of people that you trust."
            )
    return dict(hyper)


def _weight_file(folder: Path) -> Path:
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(
            f"{folder} has neither of {', '.join(WEIGHT_FILES)}. Give a file of weights, or such a folder."
        )
    return found[0]


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the libraries raise for a file that is none of theirs
        raise ValueError(f"{file} cannot be read as weights: {str(error).split('. ')[0]}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{file} has no tensors by name. Give what torch.save(model.state_dict(), ...) wrote.")
    return weights


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
