"""Adam-mini: Adam with one second moment per block of parameters instead of one per parameter.

Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv 2406.16793), Algorithm 1 with
the partition of Algorithm 3 as released in the package adam-mini 1.1.1 (rows for V and MLP, biases elementwise).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ds_memopt.blocks import ParamBlocks
from ds_memopt.optimizers.base.hyper_parameters import (
    HEAD_DIM,
    VALUE_BLOCKS,
    AdamHyperParameters,
    choice,
    hyper_parameter,
)
from ds_memopt.optimizers.block_state.block_index import BlockPlan, Piece
from ds_memopt.optimizers.block_state.sharded_optimizer import ELEMENT, ShardedOptimizer

STATE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class AdamMiniHyperParameters(AdamHyperParameters):
    """Those of AdamW, and three of Adam-mini's own."""

    state_dtype: Literal["fp32", "bf16"] = hyper_parameter(
        "fp32",
        choice(*STATE_DTYPES, remedy="'fp32' is exact."),
        "How m is kept; 'bf16' takes 2 bytes per parameter. The step itself is computed in fp32.",
    )
    value_blocks: Literal["rows", "whole"] = hyper_parameter(
        "rows",
        VALUE_BLOCKS,
        "Blocks of the attention's V: 'rows', or 'whole' (one block), which the paper advises for runs of less than "
        "10,000 to 20,000 steps.",
    )
    head_dim: int | None = hyper_parameter(
        None, HEAD_DIM, "Rows of a head in query and key matrices; only where no model is given to read it from."
    )


class AdamMini(ShardedOptimizer):
    """Adam-mini under any placement. For block b of n_b elements at its step t = 1, 2, ...:

        p   <- p * (1 - lr * weight_decay)
        m   <- m + (1 - beta1) * (g - m)
        v_b <- beta2 * v_b + (1 - beta2) * sum_{i in b} g_i^2 / n_b
        p_b <- p_b - lr * [m_b / (1 - beta1^t)] / [sqrt(v_b) / sqrt(1 - beta2^t) + eps]

    State: "exp_avg" (m), one entry per parameter; "block_exp_avg_sq" (v), one fp32 entry per block: about 4.001 bytes
    per parameter of a Llama with fp32 m.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `AdamMini.from_model`.
    model: the model that the parameters belong to, whose structure tells the blocks.
    All else: `AdamMiniHyperParameters`.

    Raises ValueError for a hyper-parameter out of range, for parameters without names, and for query or key matrices
    whose head size nothing tells.
    """

    hyper_parameters = AdamMiniHyperParameters
    hyper: AdamMiniHyperParameters
    states = {"exp_avg": ELEMENT, "block_exp_avg_sq": "block"}
    needs_heads = True

    def configure(self) -> None:
        self.element_dtype = STATE_DTYPES[self.hyper.state_dtype]

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        return {"block": dict(roles)}

    def update(
        self, tensors: tuple[torch.Tensor, ...], groups: tuple[dict, ...], plans: Mapping[str, BlockPlan]
    ) -> None:
        plan = plans["block"]
        active = [number for number, tensor in enumerate(tensors) if tensor.grad is not None]
        gradients = {number: self.local(tensors[number].grad) for number in active}
        mean_squares = plan.mean_squares(gradients)
        plan.complete(mean_squares)
        for number in active:
            tensor, group = tensors[number], groups[number]
            state, (beta1, beta2) = self.state[tensor], group["betas"]
            state["step"] += 1
            step = state["step"].item()
            parameter, m = self.local(tensor), self.local(state["exp_avg"])
            v = self.block_state(tensor, "block_exp_avg_sq", plan.num_blocks[number])
            v.mul_(beta2).add_(mean_squares[number], alpha=1 - beta2)
            denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
            decay = 1 - group["lr"] * group["weight_decay"]
            step_size = group["lr"] / (1 - beta1**step)
            for held in plan.held[number]:
                laid = held.elements(parameter), held.elements(gradients[number]), held.elements(m)
                block_adam(held.pieces, *laid, held.blocks(denominator), beta1, step_size, decay)


def block_adam(
    pieces: list[Piece],
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    m: torch.Tensor,
    denominator: torch.Tensor,
    beta1: float,
    step_size: float,
    decay: float,
) -> None:
    """Adam's update of one interval with one denominator per block."""
    for piece in pieces:
        laid = piece.view(parameter), piece.view(gradient), piece.view(m)
        adam_piece(*laid, piece.per_element(denominator), beta1, step_size, decay)


def adam_piece(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    m: torch.Tensor,
    denominator: torch.Tensor,
    beta1: float,
    step_size: float,
    decay: float,
) -> None:
    """m <- m + (1 - beta1) * (g - m), p <- p * decay - step_size * m / denominator; m may be kept in 16 bits."""
    new_m = m.to(denominator.dtype).lerp_(gradient.to(denominator.dtype), 1 - beta1)
    if new_m.dtype != m.dtype:
        m.copy_(new_m)
    if decay != 1:
        parameter.mul_(decay)
    parameter.addcdiv_(new_m, denominator, value=-step_size)
