"""Adam-mini: Adam with one second moment per block of parameters instead of one per parameter.

Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv 2406.16793), Algorithm 1 with
the partition of Algorithm 3 as released in the package adam-mini 1.1.1 (rows for V and MLP, biases elementwise).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from .base import ShardedOptimizer, check_range, is_number
from .blockwise import BlockPlan

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

    element_states = ("exp_avg",)
    block_states = ("block_exp_avg_sq",)

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
        check_range("state_dtype", state_dtype, state_dtype in STATE_DTYPES, "'fp32' or 'bf16'", "'fp32' is exact.")
        check_range(
            "value_blocks", value_blocks, value_blocks in ("rows", "whole"), "'rows' or 'whole'", "'rows' is usual."
        )
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            model=model,
            head_dim=head_dim,
            value_blocks=value_blocks,
            element_dtype=STATE_DTYPES[state_dtype],
        )

    def check_group(self, group: dict) -> None:
        lr, betas, eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        check_range("lr", lr, is_number(lr) and lr >= 0, "a number >= 0", "1e-3 to 1e-5 is usual.")
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(is_number, betas))
        check_range(
            "betas", betas, pair and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)", "Try (0.9, 0.95)."
        )
        # Not 0: a block without gradient would divide 0 by 0.
        check_range("eps", eps, is_number(eps) and 0 < eps < 1, "a number in (0, 1)", "1e-8 is usual.")
        check_range(
            "weight_decay", weight_decay, is_number(weight_decay) and weight_decay >= 0, "a number >= 0", "Try 0.1."
        )

    def update(self, tensors: tuple[torch.Tensor, ...], groups: tuple[dict, ...], plan: BlockPlan) -> None:
        gradients = [None if tensor.grad is None else self.local(tensor.grad) for tensor in tensors]
        sums = [torch.zeros_like(sizes) for sizes in plan.sizes]
        for gradient, pieces, block_sums in zip(gradients, plan.pieces, sums, strict=True):
            if gradient is not None:
                for piece in pieces:
                    piece.add_square_sums(gradient, block_sums)
        plan.complete(sums)
        for number, (tensor, gradient, group) in enumerate(zip(tensors, gradients, groups, strict=True)):
            if gradient is None:
                continue
            state, (beta1, beta2) = self.state[tensor], group["betas"]
            state["step"] += 1
            step = state["step"].item()
            parameter, m = self.local(tensor), self.local(state["exp_avg"])
            # A state that is a DTensor is padded to the longest rank's blocks.
            v = self.local(state["block_exp_avg_sq"]).narrow(0, 0, plan.num_blocks[number])
            v.mul_(beta2).addcdiv_(sums[number], plan.sizes[number], value=1 - beta2)
            denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            step_size = group["lr"] / (1 - beta1**step)
            for piece in plan.pieces[number]:
                m_piece = piece.view(m)
                new_m = m_piece.to(v.dtype).lerp_(piece.view(gradient).to(v.dtype), 1 - beta1)
                if new_m.dtype != m_piece.dtype:
                    m_piece.copy_(new_m)
                piece.view(parameter).addcdiv_(new_m, piece.per_element(denominator), value=-step_size)
