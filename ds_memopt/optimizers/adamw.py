"""AdamW over shards: the rule that a rotating block runs by default."""

from __future__ import annotations

from collections.abc import Mapping

from ds_memopt import kernels
from ds_memopt.blocks import ParamBlocks
from ds_memopt.optimizers.block_state.sharded_optimizer import OptimizerCall, ShardedOptimizer
from ds_memopt.optimizers.block_state.storage import (
    MOMENT,
    SECOND_MOMENT,
    StorageHyperParameters,
    element_blocks,
)


class AdamW(ShardedOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) under any placement: torch's formula, per element.

    State: "exp_avg" and "exp_avg_sq": 8 bytes per parameter in fp32.
    """

    states = {"exp_avg": MOMENT, "exp_avg_sq": SECOND_MOMENT}
    fused = True

    hyper_parameters = StorageHyperParameters

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        return {"element": {name: element_blocks(blocks) for name, blocks in roles.items()}}

    def log_structures(self) -> None:
        """Nothing: every element is a block of its own."""

    def update(self, call: OptimizerCall) -> None:
        m, v, scalars = call.state("exp_avg"), call.state("exp_avg_sq"), call.scalars(kernels.AdamScalars.at)
        kernels.adam_by_element(call.parameters, call.gradients, m, v, call.indexes["element"], scalars, call.storage)
