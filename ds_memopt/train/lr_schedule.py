"""The learning rate's schedule: one of transformers', by its name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

RUNS_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch")
"""Arguments of transformers' functions that other options settle."""


def make_lr_schedule(
    name: str, words: Sequence[str], lr: float, warmup_steps: int, steps: int
) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """A function that builds the schedule for an optimizer.

    name: a value of transformers.SchedulerType. words: NAME=VALUE, further arguments of transformers' function for it.
    lr: after warm-up. steps: of the whole run, of which warmup_steps are warm-up where the schedule has one.

    Raises ValueError for an unknown name, for a schedule that wants the loss, for an argument that is missing, unknown
    or out of range, and for a rate above lr or below 0.
    """
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    follow_loss = [one for one, function in functions.items() if "kwargs" in inspect.signature(function).parameters]
    if name in follow_loss:  # DeepSpeed would hand it the batch size for a loss
        raise ValueError(f"--schedule {name} follows the loss, which no engine hands to it: choose another")
    if name not in functions:
        known = [one for one in functions if one not in follow_loss]
        raise ValueError(f"--schedule {name} is unknown: choose one of {', '.join(known)}")
    build = functions[name]
    parameters = inspect.signature(build).parameters
    given = _parse(words)
    takes = {key: one for key, one in parameters.items() if key not in RUNS_OWN}
    listed = ", ".join(takes) or "none"
    for key in given:
        if key not in takes:
            raise ValueError(f"--schedule_kwargs {key}: {name} takes {listed}")
    for key, one in takes.items():
        if one.default is inspect.Parameter.empty and key not in given:
            raise ValueError(f"--schedule {name} needs {key}: add --schedule_kwargs {key}=...")
    if "num_decay_steps" in given:
        decay, most = given["num_decay_steps"], max(0, steps - warmup_steps)
        if type(decay) is not int or not 0 <= decay <= most:
            raise ValueError(
                f"--schedule_kwargs num_decay_steps={decay}: it must be an integer from 0 to {most}, what "
                f"{warmup_steps} steps of warm-up leave of {steps}"
            )
    settled = {"num_warmup_steps": warmup_steps, "num_training_steps": steps}
    schedule = partial(build, **{key: value for key, value in settled.items() if key in parameters}, **given)
    said = " ".join([f"--schedule {name}", *words])
    try:
        _check_rates(schedule, lr, steps)
    except (TypeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"{said} with --lr {lr}: {error}. --schedule_kwargs sets {listed}") from error
    return schedule


def has_warm_up(name: str) -> bool:
    """Whether the schedule, whose name `make_lr_schedule` takes, begins with one."""
    return "num_warmup_steps" in inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters


def _parse(words: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name in given:
            fault = "is there twice" if equals else "is not NAME=VALUE, as in num_decay_steps=1000"
            raise ValueError(f"--schedule_kwargs {name} {fault}")
        try:
            given[name] = json.loads(value, parse_constant=str)  # NaN is no number here
        except json.JSONDecodeError:
            given[name] = value
    return given


def _check_rates(schedule: Callable, lr: float, steps: int) -> None:
    """At a thousand steps of the run and its end."""
    [factor] = schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)).lr_lambdas
    for step in (*range(0, steps, max(1, steps // 1000)), steps):
        if not 0 <= factor(step) <= 1:
            raise ValueError(f"step {step} has {factor(step):.3g} x --lr, which must stay between 0 and 1 x")
