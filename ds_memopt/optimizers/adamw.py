"""AdamW over shards: the rule that a rotating block runs by default."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ds_memopt.blocks import Contiguous, ParamBlocks
from ds_memopt.optimizers.adam_mini import adam_piece
from ds_memopt.optimizers.base.hyper_parameters import AdamHyperParameters
from ds_memopt.optimizers.block_state.block_index import BlockPlan
from ds_memopt.optimizers.block_state.sharded_optimizer import ELEMENT, ShardedOptimizer
from ds_memopt.shards import numel_of


class AdamW(ShardedOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) under any placement: torch's formula, per element.

    State: "exp_avg" and "exp_avg_sq", in fp32: 8 bytes per parameter.
    """

    states = {"exp_avg": ELEMENT, "exp_avg_sq": ELEMENT}

    hyper_parameters = AdamHyperParameters

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        whole = {
            name: ParamBlocks(blocks.role, "per element", blocks.shape, (Contiguous(1, numel_of(blocks.shape)),))
            for name, blocks in roles.items()
        }
        return {"element": whole}

    def log_structures(self) -> None:
        """Nothing: every element is a block of its own."""

    def update(
        self, tensors: tuple[torch.Tensor, ...], groups: tuple[dict, ...], plans: Mapping[str, BlockPlan]
    ) -> None:
        for number, (tensor, group) in enumerate(zip(tensors, groups, strict=True)):
            if tensor.grad is None:
                continue
            state, (beta1, beta2) = self.state[tensor], group["betas"]
            state["step"] += 1
            step = state["step"].item()
            decay = 1 - group["lr"] * group["weight_decay"]
            step_size = group["lr"] / (1 - beta1**step)
            laid = tensor, tensor.grad, state["exp_avg"], state["exp_avg_sq"]
            for held in plans["element"].held[number]:
                for piece in held.pieces:
                    parameter, gradient, m, v = (piece.view(held.elements(self.local(each))) for each in laid)
                    g = gradient.to(v.dtype)
                    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
                    adam_piece(parameter, gradient, m, denominator, beta1, step_size, decay)
