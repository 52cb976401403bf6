"""Holding a whole DeepSpeed config against what DeepSpeed and the methods read of it, before anything is built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, get_args

import pydantic
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from ds_memopt.engines.config_keys import BATCH, Watched, closest
from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.base.hyper_parameters import (
    AdamHyperParameters,
    check_hyper_parameters,
    check_values,
)
from ds_memopt.optimizers.probes.probe import check_epsilon
from ds_memopt.train.config import AUTO, places, value_at

_COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_ANY_ADAM = {
    name: rule for name, rule in AdamHyperParameters.rules().items() if name != "eps"
}  # which may be 0 elsewhere
_BLOCKS = ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16")


def check_config(config: dict[str, Any], source: str) -> None:
    """ValueError for what DeepSpeed would refuse, not read, or only stumble over in training. "auto" passes everywhere.

    source: the file that it is from. What optimizer and scheduler read themselves is left to `check_rules`.
    """
    try:
        _check_shape(config)
        _check_as_deepspeed(_without_auto(config))
    except ValueError as error:
        raise ValueError(f"the DeepSpeed config {source}: {error}") from error


def _check_shape(config: dict[str, Any]) -> None:
    """What the job itself relies on."""
    for path, holder, key in places(config):
        if isinstance(holder[key], float) and not math.isfinite(holder[key]):
            raise ValueError(f"{path} is {holder[key]}: it must be a finite number")
    for name in _COUNTS:
        value = config.get(name, AUTO)
        if value != AUTO and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ValueError(f'{name} is {value!r}: it must be an integer >= 1 or "auto"')
    clipping, printing = config.get("gradient_clipping", AUTO), config.get("steps_per_print")
    for name, value in (("gradient_clipping", clipping), ("steps_per_print", printing)):
        if value not in (AUTO, None) and not (isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{name} is {value!r}: it must be a number >= 0")
    for name in _BLOCKS:
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"{name} is {config[name]!r}: it must be an object")
    for name in ("optimizer", "scheduler"):
        block = config.get(name, {})
        for key, kind, words in (("type", str, "a word"), ("params", dict, "an object")):
            if not isinstance(block.get(key, kind()), kind):
                raise ValueError(f"{name}.{key} is {block[key]!r}: it must be {words}")
    params = config.get("optimizer", {}).get("params", {})
    check_values(_ANY_ADAM, {name: value for name, value in params.items() if value != AUTO})


def _check_as_deepspeed(config: dict[str, Any]) -> None:
    watched = Watched({key: value for key, value in config.items() if key not in _COUNTS} | BATCH)
    try:
        DeepSpeedConfig(watched)
    except pydantic.ValidationError as error:
        raise ValueError(_first_of(error, config, watched.trail[0])) from error
    except Exception as error:  # of whatever type: DeepSpeed has asserts, its own errors, and stumbles over types
        place = ".".join(watched.trail)
        if isinstance(error, AttributeError | TypeError):
            value = value_at(config, place)
            raise ValueError(f"{place} is {value!r}, which DeepSpeed cannot read ({error})") from error
        raise ValueError(str(error) if place in str(error) else f"at {place}: {error}") from error
    for path, meant in watched.unread():
        hint = f" Did you mean {meant!r}?" if meant else " Remove it."
        raise ValueError(f"DeepSpeed does not read {path}, so it would have no effect.{hint}")


def _first_of(error: pydantic.ValidationError, config: dict[str, Any], block: str) -> str:
    """The first thing that a model of DeepSpeed's says about `block`, or the monitors' about their own."""
    first = error.errors()[0]
    place = tuple(map(str, first["loc"]))
    path = ".".join(place if place and place[0] in config else (block, *place))
    if first["type"] != "extra_forbidden":
        return f"{path} is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
    meant = closest(place[-1], _fields(error.title, place[:-1]))
    return f"{path} is no key that DeepSpeed knows." + (f" Did you mean {meant!r}?" if meant else " Remove it.")


def _fields(title: str, place: tuple[str, ...]) -> list[str]:
    """The keys of the object at `place` in DeepSpeed's model of this name, as far as the models' types tell."""
    model = next((one for one in DeepSpeedConfigModel.__subclasses__() if one.__name__ == title), None)
    for key in place:
        if model is None or key not in model.model_fields:
            return []
        annotation = model.model_fields[key].annotation
        kinds = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        model = next((one for one in kinds if issubclass(one, pydantic.BaseModel)), None)
    return list(model.model_fields) if model is not None else []


def check_rules(config: dict[str, Any], dtype: torch.dtype) -> None:
    """ValueError for hyper-parameters of the optimizer that cannot be right, and for a scheduler that cannot be built.

    config: resolved. dtype: of the weights. What depends on the model is left to the optimizer.
    """
    name, params = config["optimizer"]["type"], config["optimizer"]["params"]
    if name in METHODS:
        check_hyper_parameters(METHODS[name], params)
        if "epsilon" in params:
            check_epsilon(params["epsilon"], dtype)
    elif name.lower() in DEEPSPEED_OPTIMIZERS:
        _check_of_deepspeed(name, params)
    else:
        _try(f"optimizer {name}", getattr(torch.optim, name), params)
    if "type" in config.get("scheduler", {}):
        _check_scheduler(config["scheduler"]["type"], config["scheduler"].get("params", {}))


def check_optimizer_type(name: str) -> None:
    """ValueError for a type that neither DeepSpeed nor this package knows."""
    if name in METHODS or name.lower() in DEEPSPEED_OPTIMIZERS or name in _classes(torch.optim, torch.optim.Optimizer):
        return
    meant = closest(name, ["AdamW", *METHODS, *_classes(torch.optim, torch.optim.Optimizer), *DEEPSPEED_OPTIMIZERS])
    raise ValueError(
        f"optimizer type {name!r} is unknown; known are {', '.join([*METHODS, *DEEPSPEED_OPTIMIZERS])} "
        "and the classes of torch.optim." + (f" Did you mean {meant!r}?" if meant else "")
    )


def _check_scheduler(name: str, params: dict[str, Any]) -> None:
    torchs = _classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    if name not in (*lr_schedules.VALID_LR_SCHEDULES, *torchs):
        meant = closest(name, [*lr_schedules.VALID_LR_SCHEDULES, *torchs])
        raise ValueError(
            f"scheduler type {name!r} is unknown; known are {', '.join(lr_schedules.VALID_LR_SCHEDULES)} and the "
            "classes of torch.optim.lr_scheduler." + (f" Did you mean {meant!r}?" if meant else "")
        )
    build = getattr(lr_schedules if name in lr_schedules.VALID_LR_SCHEDULES else torch.optim.lr_scheduler, name)
    if "metrics" in inspect.signature(build.step).parameters:
        raise ValueError(
            f"scheduler type {name!r} follows the loss, and DeepSpeed hands it the batch size: choose another"
        )
    _try(f"scheduler {name}", lambda given, **params: build(torch.optim.Adam(given), **params), params)


def _check_of_deepspeed(name: str, params: dict[str, Any]) -> None:
    check_values(_ANY_ADAM, params)
    if name.lower() not in ("adam", "adamw"):
        return
    kinds = (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
    known = {word for kind in kinds for word in inspect.signature(kind).parameters} | {"torch_adam", "adam_w_mode"}
    for word in params:
        if word not in known:
            meant = closest(word, known)
            raise ValueError(
                f"{word!r} is no hyper-parameter of {name}." + (f" Did you mean {meant!r}?" if meant else "")
            )


def _try(what: str, build: Callable, params: dict[str, Any]) -> None:
    """A trial, on a parameter of one element."""
    try:
        build([torch.nn.Parameter(torch.zeros(1))], **params)
    except Exception as error:  # of whatever type: not all check their arguments
        raise ValueError(f"{what} cannot be built with {params}: {error}") from error


def _classes(module: Any, kind: type) -> list[str]:
    return [name for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, kind)]


def _without_auto(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_auto(value) for key, value in node.items() if value != AUTO}
    return node
