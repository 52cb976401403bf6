"""Which parameter of the model each tensor of an optimizer is, by the names of the bare model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ds_memopt.blocks import assign_blocks, bare_name, bare_parameters
from ds_memopt.shards import reshard
from ds_memopt.support import refuse

METHOD_KEY = "ds_memopt_method"
"""Key of every param group of ours. Where another library builds its own optimizer from our groups, it shows."""


TRAINED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def named_groups(model: nn.Module, params: Iterable | None) -> list[dict]:
    """Param groups of (name, parameter) pairs from a model's parameters, from groups of them, or from None for all."""
    reshard(model)
    if params is None:
        trainable = [(name, p) for name, p in bare_parameters(model).items() if p.requires_grad]
        # Some norms and biases have a row for each head.
        vectors = {name for name, b in assign_blocks(model).items() if len(b.shape) < 2 or b.role in ("norm", "bias")}
        groups = [
            {"params": [pair for pair in trainable if pair[0] not in vectors]},
            {"params": [pair for pair in trainable if pair[0] in vectors], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]] or _no_parameters()
    names = {id(p): name for name, p in bare_parameters(model).items()}
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    named = [group | {"params": [_named(entry, names) for entry in group["params"]]} for group in groups]
    # With adapters the usual second group, of norms and biases, is empty; a scheduler counts it.
    return named if any(group["params"] for group in named) else _no_parameters()


def _no_parameters():
    raise ValueError("There is no parameter to train. Leave requires_grad set on some, and list them.")


def _named(entry: Any, names: Mapping[int, str]) -> tuple[str, torch.Tensor]:
    parameter = entry[1] if isinstance(entry, tuple) else entry
    if id(parameter) not in names:
        raise ValueError(
            f"A parameter of shape {tuple(parameter.shape)} to be trained is not among the model's: its parameters "
            "were replaced after they were listed. List model.parameters() after the last wrapper that replaces them."
        )
    return names[id(parameter)], parameter


def with_names(group: dict) -> dict:
    """A param group as torch takes it among groups with names, also where it is empty."""
    params = group["params"]
    return group | {"param_names": []} if isinstance(params, (list, tuple)) and not params else group


def check_named_group(optimizer: torch.optim.Optimizer, group: dict, model: nn.Module | None) -> None:
    """Mark a param group as ours, and give its parameters the names that they have in the bare model.

    Without a model to look at, `module.` stays in a name: it may be the model's own.
    Raises ValueError where it lacks names, where the names are FSDP1's, and for a dtype that no method trains.
    """
    method = type(optimizer).__name__
    if "param_names" not in group:
        raise ValueError(
            f"{method} needs the parameters' names. Pass model.named_parameters(), or build it with "
            f"{method}.from_model(model, ...)."
        )
    group[METHOD_KEY] = method
    if any("_fsdp_wrapped_module" in name or "_flat_param" in name for name in group["param_names"]):
        refuse(type(optimizer), "fsdp1")
    names = {} if model is None else {id(p): name for name, p in bare_parameters(model).items()}
    named = zip(group["params"], group["param_names"], strict=True)
    group["param_names"] = [names.get(id(p), bare_name(name, model)) for p, name in named]
    for name, p in zip(group["param_names"], group["params"], strict=True):
        if p.requires_grad and p.dtype not in TRAINED_DTYPES:
            raise ValueError(
                f"{name} is {p.dtype}, but {method} trains real numbers of 16, 32 or 64 bits. Keep real and imaginary "
                "part as two parameters, or train it with another optimizer."
            )


def check_current(
    optimizer: torch.optim.Optimizer, tensor: torch.Tensor, name: str, current: Mapping[str, torch.Tensor]
) -> None:
    """Raise ValueError where a tensor is no longer the model's parameter. current: those, by name, if known."""
    # FSDP2 shows whole parameters in the place of its shards while they are gathered.
    gathered = hasattr(tensor, "to_local") and not hasattr(current.get(name), "to_local")
    if current and current.get(name) is not tensor and not gathered:
        raise ValueError(
            f"{name} in the optimizer is no longer the model's parameter: the model's parameters were replaced after "
            f"{type(optimizer).__name__} was built, so its steps would change nothing. Build the optimizer after "
            "fully_shard, to_empty or whatever replaced them."
        )
