"""Methods with state per block and per element in DeepSpeed: ZeRO lays flat partitions, and the method learns where.

Everything else (clipping, overflow, offload, schedulers, bucketing, overlap) stays DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from ds_memopt.engines.adapter import Adapter
from ds_memopt.optimizers.block_state.sharded_optimizer import ShardedOptimizer
from ds_memopt.shards import MasterCopyPlacement, Placement, Zero3Placement, Zero12Placement


class BlockStateAdapter(Adapter):
    """For methods that step on the tensors that ZeRO gives them."""

    optimizer: ShardedOptimizer

    def configure_zero(self, original: Callable, engine: Any, optimizer: ShardedOptimizer) -> Any:
        placement = Zero3Placement if engine.zero_optimization_partition_weights() else Zero12Placement
        return self._bind(placement, original, optimizer)

    def configure_bf16(self, original: Callable, engine: Any, optimizer: ShardedOptimizer) -> Any:
        return self._bind(Zero12Placement, original, optimizer)

    def configure_fp16(self, original: Callable, engine: Any, optimizer: ShardedOptimizer, dtype: Any) -> Any:
        # To create states, DeepSpeed makes a step with zero gradients here and nowhere else: it would decay the weights
        # and count as the first step, so that stage 0 would differ from all others. Ours are created when needed.
        with mock.patch.object(optimizer, "step", lambda: None):
            return self._bind(MasterCopyPlacement, original, optimizer, dtype)

    def _bind(self, placement: type[Placement], original: Callable, optimizer: ShardedOptimizer, *more: Any) -> Any:
        names = optimizer.names_by_tensor()  # before ZeRO puts its flat buffers in the parameters' place
        wrapper = original(optimizer, *more)
        optimizer.bind(placement(wrapper, names))
        return wrapper
