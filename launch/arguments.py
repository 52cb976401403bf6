"""The command line of the jobs, launch/pretrain.py, pretrain_fsdp2.py and finetune.py, and how they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ds_memopt.train.options import RunOptions

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
AnyOptions = TypeVar("AnyOptions", bound=RunOptions)


def parse_options(options: type[AnyOptions], description: str, default_config: str) -> AnyOptions:
    """What the command line says. Each field of the class `options` is an option of its name. default_config: of
    ds_configs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups, types = {}, get_type_hints(options)
    for field in fields(options):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = str(CONFIGS / default_config) if field.name == "deepspeed_config" else field.default
        presence = {"required": True} if default is MISSING else {"default": default}
        _add(groups[title], field, types[field.name], field.metadata["help"].format(job=options.job), **presence)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # always on; launchers pass it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    given = parser.parse_args()
    return options(**{field.name: getattr(given, field.name) for field in fields(options)})


def add_options(parser: Any, options: type[RunOptions], group: str) -> list[str]:
    """Add to a parser the options of one group, as they are in the class; returns their names."""
    types, chosen = get_type_hints(options), [one for one in fields(options) if one.metadata["group"] == group]
    for one in chosen:
        _add(parser, one, types[one.name], one.metadata["help"], default=one.default)
    return [one.name for one in chosen]


def _add(parser: Any, option: Field, kind: Any, help: str, **presence: Any) -> None:
    parser.add_argument(f"--{option.name}", help=help, **presence, **(option.metadata["argparse"] or _reading(kind)))


def _reading(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type, which may be `... | None`."""
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"nargs": len(get_args(kind)), "type": get_args(kind)[0]}
    return {"type": kind}


def run_job(job: Callable[[AnyOptions], None], options: AnyOptions) -> None:
    from ds_memopt.engines.processes import fail
    from ds_memopt.train.ranks import stop_ranks

    try:
        job(options)
    except BaseException as error:  # also an exit or interrupt: a rank that leaves early leaves the others waiting
        fail(error)
    stop_ranks()
