"""GWT: Adam on the Haar approximation of the gradient; the details are normalised, and no state is kept of them.

Source: "Gradient Wavelet Transform" (arXiv 2501.07237) and its official code, whose formula `variant="paper"` follows.

No transform is ever written out. With the orthonormal Haar transform of level l along the last axis, a group of k = 2^l
elements x has the approximation A = sum(x) / sqrt(k) and k - 1 details D. All of them are divided by one number per
group, so the update's weight-domain form needs the details as a whole only, and that is x minus its mean:

    iHaar(m / d, D / d) = (x - mean(x) + m / sqrt(k)) / d        with m the moving average of A

The state is kept as m / sqrt(k), the moving average of mean(x). By Parseval A^2 + sum(D^2) = sum(x^2). A parameter that
is not transformed is the case k = 1, where this is Adam. A short last group of a row counts as padded with zeros.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ds_memopt import kernels
from ds_memopt.blocks import Columns, Contiguous, ParamBlocks, Tiled, format_assignment, matching
from ds_memopt.kernels import AdamScalars, GWTRule, GWTScalars
from ds_memopt.optimizers.base.hyper_parameters import (
    HEAD_DIM,
    VALUE_BLOCKS,
    check_range,
    choice,
    either,
    hyper_parameter,
    integer,
    patterns,
    real,
)
from ds_memopt.optimizers.block_state.gradient_release import ReleaseHyperParameters
from ds_memopt.optimizers.block_state.sharded_optimizer import OptimizerCall, ShardedOptimizer
from ds_memopt.optimizers.block_state.storage import StateLayout, StorageHyperParameters
from ds_memopt.shards import numel_of

logger = logging.getLogger("ds_memopt")

TRANSFORMED_ROLES = {"query", "key", "value", "qkv", "attention output", "mlp", "experts", "latent attention", "mixer"}
"""The matrices of attention and MLP, as in the official code, and of Mamba's mixers; the rest stays dense."""

KNOWN_DENSE = {"embedding", "position embedding", "lm_head", "head", "norm", "bias"}
"""Nobody would expect these to be transformed."""

BASES = {
    "adam": {"second_moment": "group", "exp_avg_sq": "dense"},
    "adam_mini": {"block_exp_avg_sq": "block"},
}
"""For each base rule, its second moments, and the structure that each keeps one entry per block of."""


CODES = {"approximation": "signed", "exp_avg": "signed", "second_moment": "unsigned", "exp_avg_sq": "unsigned"}
"""The states that may be kept in fewer bits, see `StateLayout`."""

LARGEST_RATIO = 1e6
"""Of dense_lr to lr: it multiplies steps in fp32."""


@dataclass(frozen=True, kw_only=True)
class GWTHyperParameters(ReleaseHyperParameters, StorageHyperParameters):
    """Those of AdamW, of storage, release_gradients, and GWT's own.

    Raises ValueError for a field that its rule does not accept, and for a dense_lr of more than 1e6 times lr.
    """

    level: int = hyper_parameter(2, integer(1, 5, "2 is usual."), "Depth of the transform.")
    scale: float = hyper_parameter(
        0.25, real("(0, 1e6]", "0.25 is usual."), "Factor on the updates of transformed matrices."
    )
    dense_lr: float | None = hyper_parameter(
        None,
        either(real("[0, 1e6]", "Leave it out to use lr."), None),
        "Learning rate of all other parameters where the group's is `lr`; it follows the group's schedule.",
    )
    limiter: float | None = hyper_parameter(
        1.01,
        either(real("(1, 1e6]", "Try 1.01, or null for no limit."), None),
        "Largest growth of an update that is larger than usual from one step to the next, or None.",
    )
    variant: Literal["stable", "paper"] = hyper_parameter(
        "stable", choice("stable", "paper", remedy="'stable' is safe."), "See `GWT`: 'paper' needs a warm-up from 0."
    )
    base: Literal["adam", "adam_mini"] = hyper_parameter(
        "adam",
        choice(*BASES, remedy="'adam' is the paper's."),
        "'adam', or 'adam_mini': one v per row or head, from all of the row's or head's elements.",
    )
    include: Sequence[str] = hyper_parameter(
        (), patterns('Try ["mlp"].'), "Regular expressions for parameter names to transform besides."
    )
    exclude: Sequence[str] = hyper_parameter(
        (), patterns('Try ["mlp"].'), "Regular expressions for parameter names to leave dense; it wins over include."
    )
    head_dim: int | None = hyper_parameter(None, HEAD_DIM, "As in AdamMini; it matters for base='adam_mini' only.")
    value_blocks: Literal["rows", "whole"] = hyper_parameter(
        "rows", VALUE_BLOCKS, "As in AdamMini; it matters for base='adam_mini' only."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = "at most 1e6 times lr"
        check_range("dense_lr", self.dense_lr, self.dense_ratio <= LARGEST_RATIO, limit, "Leave it out to use lr.")

    @property
    def dense_ratio(self) -> float:
        """dense_lr / lr."""
        return 1.0 if self.dense_lr is None else self.dense_lr / self.lr if self.lr else math.inf


class GWT(ShardedOptimizer):
    """Adam (or Adam-mini) with wavelet-compressed states, under any placement.

    For each group x of k = 2^level gradient elements along a row, at step t:

        M   <- M + (1 - beta1) * (mean(x) - M)
        v   <- v + (1 - beta2) * (mean(x^2) - v)
        u   =  (x - mean(x) + M / (1 - beta1^t)) / [sqrt(v / (1 - beta2^t)) + eps]
        p   <- p * (1 - lr * weight_decay) - lr * scale * u / L

    and with k = 1, scale = dense_lr / lr, L = 1, hence Adam, for parameters that are not transformed. L stops bursts:

        L   =  max(|u| / max(n, 1), limiter) / limiter,    n <- |u| / L

    with |u| the root mean square over the whole matrix. It is 1 where the gradient is as large as v says, as in the
    first step: up to there an update may come back at once, as after steps without a gradient, and beyond it grows by
    no more than `limiter` a step. In units of lr, on 64 x 64 noise, level 2, beta2 = 0.999, scale 0.25; at the right
    with n in the place of max(n, 1), as the paper has it:

        steps from a zero gradient back to 90 % of the usual 0.22               1               202
        the same from a gradient of a tenth                                     1               176
        mean update with zero gradients in 2 % or 50 % of the steps             0.217, 0.139    0.066, 0.021
        largest update in a burst of 100 x or 1,000 x (unlimited 2.10, 2.11)    0.253, 0.253    0.218, 0.218

    State: "approximation" (M) and "second_moment" (v), one entry per group, "update_norm" (n), one per matrix, and
    "exp_avg" and "exp_avg_sq" of what is not transformed: with a share rho of the parameters transformed,
    8 * (rho / k + 1 - rho) bytes per parameter. With base="adam_mini" "block_exp_avg_sq", one entry per row and head,
    takes the place of both second moments: 4 * (rho / k + 1 - rho) bytes and a little.

    With variant="paper" v is the moving average of A^2, both bias corrections multiply the whole update, eps is added
    to sqrt(v) before them, L looks at the norm of the approximation only, has n in the place of max(n, 1) and freezes a
    matrix whose first gradient is zero, and weight decay comes last. Its first steps are up to 300 times larger than
    later ones: it needs a warm-up from a learning rate of 0.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `GWT.from_model`.
    model: as in `AdamMini`. Weights stored [in, out] have blocks of rows here. All else: `GWTHyperParameters`.

    Raises ValueError for a hyper-parameter out of range and for a pattern that matches nothing or what cannot be
    transformed (fewer than two dimensions, or a last axis shorter than k).
    """

    hyper_parameters = GWTHyperParameters
    hyper: GWTHyperParameters

    def configure(self) -> None:
        hyper = self.hyper
        self.period, self.limiter, self.paper = 2**hyper.level, hyper.limiter, hyper.variant == "paper"
        self.by_block = self.needs_heads = hyper.base == "adam_mini"
        self.fused = not self.paper
        self.scale, self.dense_scale = hyper.scale, hyper.dense_ratio
        self.include, self.exclude = tuple(hyper.include), tuple(hyper.exclude)
        structures = {"approximation": "group", "exp_avg": "dense", "update_norm": "matrix", **BASES[hyper.base]}
        self.states = {key: StateLayout(structure, code=CODES.get(key)) for key, structure in structures.items()}

    def state_meaning(self) -> str:
        return f"GWT, level {self.period.bit_length() - 1}, {'paper' if self.paper else 'stable by root mean square'}"

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        self.transformed = self._choose(roles)
        transformed = {name: blocks for name, blocks in roles.items() if name in self.transformed}
        dense = {name: blocks for name, blocks in roles.items() if name not in self.transformed}
        structures = {
            "group": {name: self._groups(blocks) for name, blocks in transformed.items()},
            "matrix": {name: _relabel(b, "whole", Contiguous(numel_of(b.shape), 1)) for name, b in transformed.items()},
            "dense": {name: _relabel(b, "dense", Contiguous(1, numel_of(b.shape))) for name, b in dense.items()},
        }
        if self.by_block:
            structures["block"] = {name: _without_columns(blocks) for name, blocks in roles.items()}
        return structures

    def log_structures(self) -> None:
        cuts = self.structures["group"] | self.structures["dense"]
        logger.info("GWT, transformed and dense:\n%s", format_assignment(_in_order(cuts, self.roles)))
        if self.by_block:
            logger.info("GWT, second moments:\n%s", format_assignment(self.structures["block"]))
        self._warn_of_dense_matrices()

    def _warn_of_dense_matrices(self) -> None:
        """Say it if most of the matrices, counted by their elements, save nothing, though the user excluded none."""
        dense = {
            name: numel_of(blocks.shape)
            for name, blocks in self.structures["dense"].items()
            if len(blocks.shape) > 1 and blocks.role not in KNOWN_DENSE
            if name not in self.excluded
        }
        transformed = sum(numel_of(blocks.shape) for blocks in self.structures["group"].values())
        if sum(dense.values()) > transformed:
            largest = max(dense, key=dense.get)
            share = sum(dense.values()) / (sum(dense.values()) + transformed)
            logger.warning(
                "GWT leaves %.0f %% of the elements of this model's matrices dense, with all of Adam's state: they are "
                "not recognised as attention or MLP, or their rows are shorter than 2^level. The largest is %s, %s. To "
                "transform such matrices list regular expressions of their names in include.",
                100 * share,
                largest,
                self.roles[largest].shape,
            )

    def _choose(self, roles: Mapping[str, ParamBlocks]) -> set[str]:
        """The parameters to transform."""
        chosen = {
            name
            for name, blocks in roles.items()
            if blocks.role in TRANSFORMED_ROLES and len(blocks.shape) > 1 and blocks.shape[-1] >= self.period
        }
        for pattern in self.include:
            matches = matching("include", pattern, list(roles))
            for name in matches:
                shape = roles[name].shape
                if len(shape) < 2 or shape[-1] < self.period:
                    raise ValueError(
                        f"include={pattern!r} matches {name} of shape {shape}, which cannot be transformed: it needs "
                        f"two dimensions and a last axis of 2^level = {self.period} or more. Narrow the pattern."
                    )
            chosen.update(matches)
        self.excluded = {name for pattern in self.exclude for name in matching("exclude", pattern, list(roles))}
        return chosen - self.excluded

    def _groups(self, blocks: ParamBlocks) -> ParamBlocks:
        numel, columns = numel_of(blocks.shape), blocks.shape[-1]
        rule = f"groups of {self.period}"
        if columns % self.period == 0:
            return _relabel(blocks, rule, Contiguous(self.period, numel // self.period))
        return _relabel(blocks, rule, Tiled(numel // columns, columns, self.period))

    def bytes_moved(self, states: Mapping[torch.Tensor, Mapping[str, torch.Tensor]]) -> int:
        """A limit is known after a pass over all groups: their gradients and states are then read again. With
        base="adam_mini" the gradients are read once before, for the second moments."""
        moved, local = super().bytes_moved(states), self.placement.local
        of_groups = [key for key, kept in self.kept.items() if kept.layout.structure == "group"]
        for tensor, state in states.items():
            gradient = local(tensor.grad)
            moved += gradient.nbytes if self.by_block else 0
            if self.limiter is not None:
                groups = local(state[of_groups[0]]).numel()
                transformed = min(groups * self.period, gradient.numel())
                moved += transformed * gradient.itemsize + sum(local(state[key]).nbytes for key in of_groups)
        return moved

    def update(self, call: OptimizerCall) -> None:
        states = {key: call.state(key) for key in self.states}
        rule = GWTRule(self.period, self.limiter, self.paper)
        scalars = call.scalars(self._scalars)
        kernels.gwt(call.parameters, call.gradients, states, call.indexes, rule, scalars, call.storage)

    def _scalars(self, time: float, group: Mapping[str, Any]) -> GWTScalars:
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1**time, 1 - beta2**time
        decay, lr = 1 - group["lr"] * group["weight_decay"], group["lr"] * self.dense_scale
        if self.paper:
            factor = correction2**0.5 / correction1
            dense = AdamScalars(beta1, beta2, group["eps"], 1.0, lr * factor, 1.0)
            return GWTScalars(dense, 1.0, group["lr"] * factor * self.scale, decay, time == 1)
        dense = AdamScalars(beta1, beta2, group["eps"], decay, lr * (1 / correction1), correction2**0.5)
        return GWTScalars(dense, correction1, group["lr"] * self.scale, 1.0, time == 1)


def _in_order(blocks: Mapping[str, ParamBlocks], names: Iterable[str]) -> dict[str, ParamBlocks]:
    return {name: blocks[name] for name in names if name in blocks}


def _relabel(blocks: ParamBlocks, rule: str, section: Contiguous | Tiled) -> ParamBlocks:
    return ParamBlocks(blocks.role, rule, blocks.shape, (section,))


def _without_columns(blocks: ParamBlocks) -> ParamBlocks:
    """Blocks of rows where Adam-mini has columns: a group along the last axis would lie in several of those."""
    if not any(isinstance(section, Columns) for section in blocks.sections):
        return blocks
    return _relabel(blocks, "per row", Contiguous(blocks.shape[-1], numel_of(blocks.shape[:-1])))
