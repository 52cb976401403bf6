"""Methods with state per block and per element in DeepSpeed: ZeRO lays flat partitions, and the method learns where.

Everything else (clipping, overflow, offload, schedulers, bucketing, overlap) stays DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch.distributed as dist

from ds_memopt.engines.adapter import Adapter
from ds_memopt.optimizers.block_state.sharded_optimizer import ShardedOptimizer
from ds_memopt.shards import MasterCopyPlacement, Placement, Zero3Placement, Zero12Placement


class BlockStateAdapter(Adapter):
    """For methods that step on the tensors that ZeRO gives them."""

    optimizer: ShardedOptimizer

    def configure_zero(self, original: Callable, engine: Any, optimizer: ShardedOptimizer) -> Any:
        placement = Zero3Placement if engine.zero_optimization_partition_weights() else Zero12Placement
        return self._bind(engine, placement, original, optimizer)

    def configure_bf16(self, original: Callable, engine: Any, optimizer: ShardedOptimizer) -> Any:
        if engine.bf16_master_weights_and_gradients():
            raise ValueError(
                'data_types.grad_accum_dtype="fp32" at ZeRO-1 makes DeepSpeed hold fp32 masters whatever '
                "bf16.bf16_master_weights_and_grads says. Remove one of the two, or use ZeRO-2 or 3."
            )
        return self._bind(engine, Zero12Placement, original, optimizer)

    def configure_fp16(self, original: Callable, engine: Any, optimizer: ShardedOptimizer, dtype: Any) -> Any:
        # To create states, DeepSpeed makes a step with zero gradients here and nowhere else: it would decay the weights
        # and count as the first step, so that stage 0 would differ from all others. Ours are created when needed.
        with mock.patch.object(optimizer, "step", lambda: None):
            return self._bind(engine, MasterCopyPlacement, original, optimizer, dtype)

    def _bind(
        self, engine: Any, placement: type[Placement], original: Callable, optimizer: ShardedOptimizer, *more: Any
    ) -> Any:
        names = optimizer.names_by_tensor()  # before ZeRO puts its flat buffers in the parameters' place
        wrapper = original(optimizer, *more)
        if engine.bf16_master_weights_and_gradients():
            _step_on_weights(wrapper)
        optimizer.bind(placement(wrapper, names))
        return wrapper


def _step_on_weights(zero: Any) -> None:
    """Put this rank's part of the stored weights in the place of ZeRO's bf16 copies of it."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for copy, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            if weights.device == copy.device:
                copy.data = weights.detach()
        return
    parts = zip(zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True)
    for group, (copy, weights) in enumerate(parts):
        copy.data = weights[dist.get_rank(zero.real_dp_process_group[group])].detach()
    zero._link_all_hp_params()  # what DeepSpeed hands out of a parameter lay in the copies
