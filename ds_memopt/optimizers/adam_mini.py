"""Adam-mini: Adam with one second moment per block of parameters instead of one per parameter.

Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv 2406.16793), Algorithm 1 with
the partition of Algorithm 3 as released in the package adam-mini 1.1.1 (rows for V and MLP, biases elementwise).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from ds_memopt.blocks import ParamBlocks
from ds_memopt.optimizers.base.hyper_parameters import ADAM, HEAD_DIM, VALUE_BLOCKS, checked, choice
from ds_memopt.optimizers.block_state.block_index import BlockPlan, Piece
from ds_memopt.optimizers.block_state.sharded_optimizer import ELEMENT, ShardedOptimizer

STATE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class AdamMini(ShardedOptimizer):
    """Adam-mini under any placement. For block b of n_b elements at its step t = 1, 2, ...:

        p   <- p * (1 - lr * weight_decay)
        m   <- m + (1 - beta1) * (g - m)
        v_b <- beta2 * v_b + (1 - beta2) * sum_{i in b} g_i^2 / n_b
        p_b <- p_b - lr * [m_b / (1 - beta1^t)] / [sqrt(v_b) / sqrt(1 - beta2^t) + eps]

    State: "exp_avg" (m), one entry per parameter; "block_exp_avg_sq" (v), one fp32 entry per block: about 4.001 bytes
    per parameter of a Llama with fp32 m.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `AdamMini.from_model`.
    lr, betas, eps, weight_decay: as in AdamW; read from the param group at every step.
    state_dtype: how m is kept, "fp32" or "bf16" (2 bytes per parameter; the step itself is computed in fp32).
    value_blocks: blocks of the attention's V: "rows", or "whole" (one block), which the paper advises for runs of less
        than 10,000 to 20,000 steps.
    head_dim: rows of a head in query and key matrices; only where no model is given to read it from.
    model: the model that the parameters belong to, whose structure tells the blocks.

    Raises ValueError for a hyper-parameter out of range, for parameters without names, and for query or key matrices
    whose head size nothing tells.
    """

    states = {"exp_avg": ELEMENT, "block_exp_avg_sq": "block"}

    @checked(
        **ADAM,
        state_dtype=choice(*STATE_DTYPES, remedy="'fp32' is exact."),
        value_blocks=VALUE_BLOCKS,
        head_dim=HEAD_DIM,
    )
    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_dtype: Literal["fp32", "bf16"] = "fp32",
        value_blocks: Literal["rows", "whole"] = "rows",
        head_dim: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            model=model,
            head_dim=head_dim,
            value_blocks=value_blocks,
            element_dtype=STATE_DTYPES[state_dtype],
        )

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
