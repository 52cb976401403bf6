"""Adam-mini: Adam with one second moment per block of parameters instead of one per parameter.

Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", ICLR 2025 (arXiv 2406.16793), Algorithm 1 with
the partition of Algorithm 3 as released in the package adam-mini 1.1.1 (rows for V and MLP, biases elementwise).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ds_memopt import kernels
from ds_memopt.blocks import ParamBlocks
from ds_memopt.optimizers.base.hyper_parameters import (
    HEAD_DIM,
    VALUE_BLOCKS,
    hyper_parameter,
)
from ds_memopt.optimizers.block_state.gradient_release import ReleaseHyperParameters
from ds_memopt.optimizers.block_state.sharded_optimizer import OptimizerCall, ShardedOptimizer
from ds_memopt.optimizers.block_state.storage import MOMENT, StateLayout, StorageHyperParameters


@dataclass(frozen=True, kw_only=True)
class AdamMiniHyperParameters(ReleaseHyperParameters, StorageHyperParameters):
    """Those of AdamW, of storage, release_gradients, and two of Adam-mini's own."""

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
    states = {"exp_avg": MOMENT, "block_exp_avg_sq": StateLayout("block")}
    needs_heads = fused = True

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        return {"block": dict(roles)}

    def update(self, call: OptimizerCall) -> None:
        m, v, scalars = call.state("exp_avg"), call.state("block_exp_avg_sq"), call.scalars(kernels.AdamScalars.at)
        kernels.adam_mini(call.parameters, call.gradients, m, v, call.indexes["block"], scalars, call.storage)
