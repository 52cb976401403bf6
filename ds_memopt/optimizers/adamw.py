"""AdamW over shards: the rule that a rotating block runs by default."""

from __future__ import annotations

from collections.abc import Mapping

from ds_memopt import kernels
from ds_memopt.blocks import Contiguous, ParamBlocks
from ds_memopt.optimizers.base.hyper_parameters import AdamHyperParameters
from ds_memopt.optimizers.block_state.sharded_optimizer import ELEMENT, OptimizerCall, ShardedOptimizer
from ds_memopt.shards import numel_of


class AdamW(ShardedOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) under any placement: torch's formula, per element.

    State: "exp_avg" and "exp_avg_sq", in fp32: 8 bytes per parameter.
    """

    states = {"exp_avg": ELEMENT, "exp_avg_sq": ELEMENT}
    fused = True

    hyper_parameters = AdamHyperParameters

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        whole = {
            name: ParamBlocks(blocks.role, "per element", blocks.shape, (Contiguous(1, numel_of(blocks.shape)),))
            for name, blocks in roles.items()
        }
        return {"element": whole}

    def log_structures(self) -> None:
        """Nothing: every element is a block of its own."""

    def update(self, call: OptimizerCall) -> None:
        m, v, scalars = call.state("exp_avg"), call.state("exp_avg_sq"), call.adam_scalars()
        kernels.adam_by_element(call.parameters, call.gradients, m, v, call.indexes["element"], scalars)
