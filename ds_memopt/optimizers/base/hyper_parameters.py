"""What a method may be told: a frozen dataclass per method, with a default, a rule and a meaning for each field.

From it come the signature, the check of a ds_config, the texts of `ds-memopt methods` and the tables of the documents.

JSON may hold a string, a list or 1e400 where a number is meant, so a rule takes any object and answers without an
error.
"""

from __future__ import annotations

import difflib
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch

from ds_memopt.blocks import are_patterns, compiled


class Rule(NamedTuple):
    """accepts: whether a value will do. limit: what will do, in words. remedy: a sentence. words: others that will do,
    which the method gives a value itself."""

    accepts: Callable[[Any], bool]
    limit: str
    remedy: str
    words: tuple[str | None, ...] = ()

    def check(self, name: str, value: Any) -> None:
        check_range(name, value, self.accepts(value), self.limit, self.remedy)


def check_range(name: str, value: Any, valid: bool, limit: str, remedy: str) -> None:
    """Raise ValueError with the value, the limit and the remedy unless valid."""
    if not valid:
        raise ValueError(f"{name}={value!r} is out of range: it must be {limit}. {remedy}")


def real(interval: str, remedy: str, tensor: bool = False) -> Rule:
    """A real number in an interval such as "(0, 1]". tensor: one in a tensor without dimensions will do as well."""
    low, high = map(float, interval[1:-1].split(","))

    def accepts(value: Any) -> bool:
        if tensor and isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
            value = value.item()
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return (low < value if interval[0] == "(" else low <= value) and (
            value < high if interval[-1] == ")" else value <= high
        )

    return Rule(accepts, f"a number in {interval}", remedy)


def integer(low: int, high: int | None, remedy: str) -> Rule:
    """An integer from low to high (None: of any size); true and false are none."""

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
        )

    return Rule(accepts, f"an integer >= {low}" if high is None else f"an integer from {low} to {high}", remedy)


def choice(*words: str, remedy: str) -> Rule:
    *first, last = map(repr, words)
    return Rule(lambda value: isinstance(value, str) and value in words, f"{', '.join(first)} or {last}", remedy)


def flag(remedy: str) -> Rule:
    return Rule(lambda value: isinstance(value, bool), "true or false", remedy)


def path(remedy: str) -> Rule:
    return Rule(lambda value: isinstance(value, str | os.PathLike) and str(value) != "", "a path", remedy)


class _Patterns(Rule):
    def check(self, name: str, value: Any) -> None:
        super().check(name, value)
        for pattern in value:
            compiled(name, pattern)


def patterns(remedy: str) -> Rule:
    return _Patterns(are_patterns, "a list of regular expressions", remedy)


def either(rule: Rule, *others: str | None) -> Rule:
    """What the rule takes, and some words or null besides."""
    words = [repr(word) if word is not None else "null" for word in others]

    def accepts(value: Any) -> bool:
        return rule.accepts(value) or value is None and None in others or isinstance(value, str) and value in others

    return Rule(accepts, f"{rule.limit} or {' or '.join(words)}", rule.remedy, others)


CHECKED_BY_ITS_USER = Rule(lambda value: True, "", "")
"""Of a hyper-parameter whose meaning depends on the model."""

LR = real("[0, 1e6]", "1e-3 to 1e-5 is usual.", tensor=True)
WEIGHT_DECAY = real("[0, 1e6]", "Try 0.1.", tensor=True)
"""The limits of 1e6, here and elsewhere, keep products within fp32."""
_BETA = real("[0, 1)", "", tensor=True)
BETAS = Rule(
    lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(_BETA.accepts, value)),
    "two numbers in [0, 1)",
    "Try (0.9, 0.95).",
)
# Neither 0 nor what fp32 rounds to it: a block without gradient would divide 0 by 0.
EPS = real("[1e-30, 1)", "1e-8 is usual.", tensor=True)

VALUE_BLOCKS = choice("rows", "whole", remedy="'rows' is usual.")
HEAD_DIM = either(integer(1, None, "Leave it out where there is a model."), None)

OF_ADAMW_ALONE = (
    "betas", "eps", "torch_adam", "adam_w_mode", "amsgrad", "bias_correction", "foreach", "fused", "capturable",
    "maximize", "differentiable", "fp32_optimizer_states",
)  # fmt: skip
"""Words of a config that was written for an AdamW, DeepSpeed's or torch's. No word of ours is meant by them."""


def hyper_parameter(default: Any, rule: Rule, meaning: str, per_group: bool = False) -> Any:
    """A field of `HyperParameters`. meaning: a sentence or two. per_group: param groups have it, and may change it."""
    return field(default=default, metadata={"rule": rule, "meaning": meaning, "per_group": per_group})


@dataclass(frozen=True, kw_only=True)
class HyperParameters:
    """What one method may be told. positional: the fields that may be given without their names, in this order.

    Raises ValueError for the first field whose value its rule does not accept.
    """

    positional: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_values(self.rules(), {one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        return {one.name: one.metadata["rule"] for one in fields(cls)}

    @classmethod
    def signature(cls) -> inspect.Signature:
        """Of the method's constructor: the parameters, the fields, the model."""
        by_name, made = {one.name: one for one in fields(cls)}, []
        for name in (*cls.positional, *(name for name in by_name if name not in cls.positional)):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in cls.positional else inspect.Parameter.KEYWORD_ONLY
            one = by_name[name]
            made.append(inspect.Parameter(name, kind, default=one.default, annotation=one.type))
        params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Iterable)
        model = inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="nn.Module | None")
        return inspect.Signature([params, *made, model])

    @classmethod
    def bind(cls, positional: tuple, named: Mapping[str, Any]) -> Self:
        """From what a constructor was given after the parameters. TypeError as of any function."""
        given = cls.signature().bind(None, *positional, **named).arguments
        del given["params"]
        return cls(**given)

    def of_groups(self) -> dict[str, Any]:
        """The defaults of a param group."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["per_group"]}

    @classmethod
    def listing(cls) -> str:
        """The fields for a terminal: default, rule and meaning of each."""
        return "\n".join(
            f"{one.name} = {one.default!r}"
            + (f", {one.metadata['rule'].limit}" if one.metadata["rule"].limit else "")
            + "\n"
            + textwrap.fill(one.metadata["meaning"], 100, initial_indent="    ", subsequent_indent="    ")
            for one in fields(cls)
        )

    @classmethod
    def table(cls) -> str:
        """A Markdown table of the fields."""
        rows = [
            f"| `{one.name}` | `{one.default!r}` | {one.metadata['rule'].limit} | {one.metadata['meaning']} |"
            for one in fields(cls)
        ]
        return "\n".join(["| name | default | must be | meaning |", "|---|---|---|---|", *rows])


@dataclass(frozen=True, kw_only=True)
class AdamHyperParameters(HyperParameters):
    """Those of AdamW."""

    positional = ("lr", "betas", "eps", "weight_decay")

    lr: float = hyper_parameter(1e-3, LR, "Learning rate; read from the param group at every step.", True)
    betas: tuple[float, float] = hyper_parameter(
        (0.9, 0.999), BETAS, "Decay of the first and of the second moment, as in AdamW.", True
    )
    eps: float = hyper_parameter(1e-8, EPS, "Added to the root of the second moment, as in AdamW.", True)
    weight_decay: float = hyper_parameter(0.0, WEIGHT_DECAY, "Decoupled from the gradient, as in AdamW.", True)


def check_values(rules: Mapping[str, Rule], values: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value that its rule does not accept. Values without a rule pass."""
    for name, value in values.items():
        if name in rules:
            rules[name].check(name, value)


def check_hyper_parameters(method: type, given: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of `given` that is no hyper-parameter of the method, with the nearest that is, or
    whose value can be none."""
    known = list(method.hyper_parameters.rules())
    for name in given:
        if name in known:
            continue
        listed = f"It takes {', '.join(known)}."
        if name in OF_ADAMW_ALONE:
            adams = f"{name!r} is AdamW's and has no meaning for {method.__name__}: leave it out."
            if name == "eps" and "epsilon" in known:
                adams += (
                    " The 'epsilon' here is another thing, the size of the probe, 1e-3 as a rule: with Adam's 1e-8 the "
                    "loss would differ by rounding alone."
                )
            raise ValueError(f"{adams} {listed}")
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if isinstance(name, str) else []
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{name!r} is no hyper-parameter of {method.__name__}.{hint} {listed}")
    method.hyper_parameters(**given)
