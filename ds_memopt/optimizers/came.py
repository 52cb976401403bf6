"""CAME: Adam with a factored second moment, and smaller steps where the update is not steady.

Source: Luo et al., "CAME: Confidence-guided Adaptive Memory Efficient Optimization", ACL 2023 (arXiv 2307.02047),
Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ds_memopt import kernels
from ds_memopt.blocks import Columns, Contiguous, ParamBlocks, Section
from ds_memopt.optimizers.base.hyper_parameters import (
    BETAS,
    LR,
    WEIGHT_DECAY,
    hyper_parameter,
    real,
)
from ds_memopt.optimizers.block_state.block_index import step_dtype
from ds_memopt.optimizers.block_state.gradient_release import ReleaseHyperParameters
from ds_memopt.optimizers.block_state.sharded_optimizer import OptimizerCall, ShardedOptimizer
from ds_memopt.optimizers.block_state.storage import ELEMENT, StateLayout
from ds_memopt.shards import numel_of

FACTORS = {"row": -0.5, "column": -0.5, "matrix": 0.5, "element": -0.5}
"""For each structure the power that its mean square has in 1 / sqrt(V), where V is mean of row x mean of column / mean
of matrix, and for vectors the square of each element."""


@dataclass(frozen=True, kw_only=True)
class CAMEHyperParameters(ReleaseHyperParameters):
    """Those of AdamW but eps, release_gradients, and CAME's own."""

    positional = ("lr", "betas", "weight_decay")

    lr: float = hyper_parameter(2e-4, LR, "Learning rate; read from the param group at every step.", True)
    betas: tuple[float, float] = hyper_parameter(
        (0.9, 0.999), BETAS, "Decay of the update's average and of the squared gradient's.", True
    )
    weight_decay: float = hyper_parameter(0.0, WEIGHT_DECAY, "Decoupled from the gradient, as in AdamW.", True)
    confidence_beta: float = hyper_parameter(
        0.9999, real("[0, 1)", "0.9999 is the paper's."), "Decay of the average of squared deviations, beta3."
    )
    clip_threshold: float = hyper_parameter(
        1.0, real("(0, 1e6]", "1.0 is the paper's."), "Largest root mean square of a matrix's u, d."
    )
    square_eps: float = hyper_parameter(
        1e-30, real("[1e-37, 1)", "1e-30 is the paper's."), "Added to the squared gradient, eps1."
    )
    confidence_eps: float = hyper_parameter(
        1e-16, real("[1e-37, 1)", "1e-16 is the paper's."), "Added to squared deviations, eps2."
    )


class CAME(ShardedOptimizer):
    """CAME under any placement. For a matrix g of R rows and C columns, at each step:

        V   =  row i's average of (mean of g^2 over the row + eps1) x column j's / that of the whole matrix
        u   =  g / sqrt(V) / max(1, rms(g / sqrt(V)) / d)
        m   <- beta1 * m + (1 - beta1) * u
        S   =  as V, of (u - m)^2 + eps2, with beta3 for beta2
        p   <- p * (1 - lr * weight_decay) - lr * m / sqrt(S)

    and for a parameter of one dimension V is the average of g^2 + eps1 itself, and S is 1. Where parameters of three or
    more dimensions hold a matrix for each expert, each matrix is treated by itself. No bias is corrected: the averages
    start at zero, and so V and S at (1 - beta) of their mean.

    State: "exp_avg" (m), in fp32, and two numbers per row and per column: 4 + 8 (R + C) / RC bytes per parameter on one
    rank; each rank that holds a part of a matrix holds the numbers of all its columns. A step takes 4 bytes for each
    parameter that an engine hands over at once besides.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `CAME.from_model`.
    model: the model that the parameters belong to. All else: `CAMEHyperParameters`.

    Raises ValueError for a hyper-parameter out of range.
    """

    hyper_parameters = CAMEHyperParameters
    hyper: CAMEHyperParameters
    states = {
        "exp_avg": ELEMENT,
        **{f"exp_avg_sq_{structure}": StateLayout(structure) for structure in FACTORS},
        **{f"exp_avg_res_{structure}": StateLayout(structure) for structure in FACTORS if structure != "element"},
    }

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        """What V has a number for each of, and "clipped", whose root mean square is limited."""
        structures: dict[str, dict[str, ParamBlocks]] = {name: {} for name in (*FACTORS, "clipped")}
        for name, blocks in roles.items():
            for structure, sections in _sections(blocks.shape).items():
                structures[structure][name] = ParamBlocks(blocks.role, structure, blocks.shape, sections)
        return structures

    def log_structures(self) -> None:
        """Nothing: every matrix is cut alike."""

    def update(self, call: OptimizerCall) -> None:
        call.advance()
        u = {number: gradient.to(step_dtype(gradient.dtype), copy=True) for number, gradient in call.gradients.items()}
        betas = {number: group["betas"] for number, group in call.groups.items()}
        second = {number: beta2 for number, (_, beta2) in betas.items()}
        self._normalise(call, u, u, "exp_avg_sq", second, self.hyper.square_eps)
        index = call.indexes["clipped"]
        squares = index.mean_squares(u)
        index.complete(squares)
        limits = {number: (self.hyper.clip_threshold / mean.sqrt()).clamp(max=1) for number, mean in squares.items()}
        kernels.multiply_elements(u, limits, index.pieces)
        for number, m in call.state("exp_avg").items():
            m.lerp_(u[number], 1 - betas[number][0])
            u[number].sub_(m)
        third = dict.fromkeys(u, self.hyper.confidence_beta)
        self._normalise(call, u, call.state("exp_avg"), "exp_avg_res", third, self.hyper.confidence_eps)
        for number, group in call.groups.items():
            parameter = call.parameters[number]
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(u[number], alpha=-group["lr"])

    def _normalise(
        self,
        call: OptimizerCall,
        u: dict[int, torch.Tensor],
        source: dict[int, torch.Tensor],
        key: str,
        betas: Mapping[int, float],
        eps: float,
    ) -> None:
        """u <- source / sqrt(V), where V is the factored average, kept under the key, of u^2 + eps."""
        factors = {}
        for structure, power in FACTORS.items():
            if f"{key}_{structure}" not in self.states:
                continue
            index, averages = call.indexes[structure], call.state(f"{key}_{structure}")
            squares = index.mean_squares(u)
            index.complete(squares)
            for number, average in averages.items():
                average.lerp_(squares[number].add_(eps), 1 - betas[number])
            factors[structure] = {number: average.pow(power) for number, average in averages.items()}
        for number, values in source.items():
            u[number].copy_(values)
        for structure, factor in factors.items():
            kernels.multiply_elements(u, factor, call.indexes[structure].pieces)


def _sections(shape: tuple[int, ...]) -> dict[str, tuple[Section, ...]]:
    """How each structure that a parameter belongs to cuts it."""
    numel = numel_of(shape)
    if len(shape) < 2:
        return {"element": (Contiguous(1, numel),), "clipped": (Contiguous(numel, 1),)}
    rows, columns = shape[-2:]
    matrices = numel // (rows * columns)
    whole = (Contiguous(rows * columns, matrices),)
    return {
        "row": (Contiguous(columns, numel // columns),),
        "column": (Columns(rows, ((1, columns),)),) * matrices,
        "matrix": whole,
        "clipped": whole,
    }
