"""What a rank holds and sends under a method and a ZeRO stage, or FSDP2, from the model's shapes alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from ds_memopt.optimizers import METHODS, NamedOptimizer
from ds_memopt.optimizers.adamw import AdamW
from ds_memopt.optimizers.base.hyper_parameters import check_range
from ds_memopt.plan.planned_engines import (
    PlannedFsdp2,
    PlannedRotation,
    PlannedStoredWeights,
    PlannedZero,
    Prediction,
)
from ds_memopt.plan.planned_layout import FSDP2, PlannedRank, Stage, meta_twin
from ds_memopt.support import refuse
from ds_memopt.train.config import DTYPES

RULES: dict[str, type[NamedOptimizer]] = {"AdamW": AdamW} | METHODS
"""What can be planned: AdamW, to compare with, and every method."""


def predict(
    model: nn.Module,
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    stage: Stage,
    ranks: int,
    rank: int = 0,
    dtype: str = "bf16",
    zero: Mapping[str, Any] | None = None,
    params: Iterable | None = None,
    block: str | None = None,
    checkpointing: bool = False,
    reduce_once: bool = False,
    replicas: int = 1,
) -> Prediction:
    """What rank `rank` of `ranks` holds and sends.

    model: on any device, the meta device too; it is not changed. method: "AdamW" or one of ours, with its `options` as
        in a ds_config. stage: of ZeRO, 0 to 3, or "FSDP2" as in our job: weights and gradients in fp32, each layer
        a unit. dtype: of weights and gradients, with FSDP2 of gathered weights: "bf16", "fp16" or "fp32".
    zero: more of the ds_config's "zero_optimization". Other keys of the ds_config are taken to have their defaults, but
        with "masters": "remainder16" or "remainder8" among the options there are no fp32 masters: ZeRO has the keys
        under "bf16" that make it so, and with FSDP2 weights and gradients are in bf16.
    params: param groups of the model's parameters, or names by group; None: two groups, of matrices and of all else.
    block: of BAdam's blocks the one that trains; None: the largest, and of equal ones the first, below which backward
        has least to skip. A step that changes the block is not what is predicted.
    checkpointing: whether each layer is run forward again in backward, which ZeRO-3 may gather for.
    reduce_once: with FSDP2, as the job's option: gradients stay whole until the last micro-batch of a step. What is
        sent is then that of a step of one micro-batch: each further one gathers the weights again.
    replicas: with FSDP2, as the job's option: copies of the model, each sharded over ranks / replicas.

    Taken for granted: no gradient accumulation but with reduce_once, no MoE of DeepSpeed's own, modules run in the
    order in which the model names them, a batch of Addax has rows of both halves, and MeZO and Addax run in lockstep
    where they can at ZeRO-3.
    Left out of `sent`: flags, losses and norms, some hundred bytes.

    Raises ValueError for an unknown method, stage, dtype or block, for a rank that is none, for options that the method
    refuses, also with that stage, and for offload, whose memory is not a GPU's.
    """
    _check(method, stage, ranks, rank, dtype)
    fsdp2 = stage == FSDP2
    check_range("zero", zero, not (fsdp2 and zero), "left out with FSDP2", "It is of a ds_config's zero_optimization.")
    if reduce_once and not fsdp2:
        raise ValueError(
            f"reduce_once is FSDP2's, and stage={stage!r}: leave it out. ZeRO-0 and 1 reduce once a step by themselves."
        )
    divides = isinstance(replicas, int) and replicas >= 1 and ranks % replicas == 0
    check_range("replicas", replicas, divides, f"a divisor of ranks={ranks}", "1 is usual.")
    if replicas > 1 and not fsdp2:
        raise ValueError(f"replicas={replicas} is FSDP2's, and stage={stage!r}: leave it out.")
    config = DeepSpeedZeroConfig(**{**(zero or {}), "stage": 3 if fsdp2 else stage})
    if config.offload_optimizer is not None or config.offload_param is not None:
        raise ValueError(
            "offload is not predicted: what it moves is held by the CPU. Take it out of zero_optimization."
        )
    in_each = ranks // replicas
    place = PlannedRank(stage, in_each, rank % in_each, config)
    without_masters = RULES[method].steps_on_bf16(options or {})
    twin = meta_twin(model, torch.float32 if fsdp2 and not without_masters else DTYPES[dtype])
    own = dict(options or {}) | RULES[method].accepted({"compiled": False})
    with _silent():
        optimizer = RULES[method].from_model(twin, _groups_of(model, twin, params), **own)
    if optimizer.rotates:
        return PlannedRotation(optimizer, twin, place, checkpointing, block).predict()
    if block is not None:
        raise ValueError(f"block={block!r} is given, but {method} trains all blocks at once.")
    if fsdp2:
        if reduce_once and optimizer.releases_gradients:
            raise ValueError(
                "reduce_once keeps gradients for further micro-batches, release_gradients keeps none: give one of them."
            )
        return PlannedFsdp2(optimizer, twin, place, checkpointing, DTYPES[dtype], reduce_once, replicas).predict()
    if optimizer.releases_gradients:
        refuse(type(optimizer), "release_gradients_under_zero")
    planned = PlannedStoredWeights if optimizer.writes_weights else PlannedZero
    return planned(optimizer, twin, place, checkpointing).predict()


def stages_of(method: str) -> tuple[Stage, ...]:
    """Where a method can be planned."""
    return (0, 1, 2, 3, FSDP2) if RULES[method].family == "block state" else (0, 1, 2, 3)


def _check(method: str, stage: Stage, ranks: int, rank: int, dtype: str) -> None:
    """Raise ValueError for an argument that is none of those known."""
    check_range("method", method, method in RULES, f"one of {', '.join(RULES)}", "Write it as in a ds_config.")
    stages = stages_of(method)
    check_range("stage", stage, stage in stages, f"one of {', '.join(map(str, stages))}", "They are ZeRO's, or FSDP2.")
    check_range("dtype", dtype, dtype in DTYPES, f"one of {', '.join(DTYPES)}", "'bf16' is usual.")
    whole = isinstance(ranks, int) and ranks >= 1
    check_range("ranks", ranks, whole, "an integer >= 1", "Give the number of GPUs.")
    check_range("rank", rank, isinstance(rank, int) and 0 <= rank < ranks, f"from 0 to {ranks - 1}", "0 is usual.")


def _groups_of(model: nn.Module, twin: nn.Module, params: Iterable | None) -> list | None:
    """The twin's parameters in the param groups that are given of the model's."""
    if params is None:
        return None
    twins = {id(p): q for p, q in zip(model.parameters(), twin.parameters(), strict=True)}
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    return [group | {"params": [twins[id(p)] for p in group["params"]]} for group in groups]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what an optimizer tells when it is built: it is not the user's."""
    logger = logging.getLogger("ds_memopt")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
