"""Layout of ZeRO-1, ZeRO-2 and of ZeRO-1 with fp32 accumulation: one flat partition per rank and param group.

Private names used here are in engines/private_names.py. The parameters' own `_hp_mapping` is not used: it ignores the
order that `round_robin_gradients` gives the flat buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ds_memopt.shards.layout import FlatPlacement, RankBorders, partition_flat_buffer


class Zero12Placement(FlatPlacement):
    """Placement of a DeepSpeedZeroOptimizer or a BF16_Optimizer.

    zero: the ZeRO object that the engine built around the optimizer.
    names: the name of every model parameter that the optimizer updates; what ZeRO holds besides is left alone.
    """

    def __init__(self, zero, names: Mapping[torch.Tensor, str]) -> None:
        super().__init__()
        for group, flat in enumerate(flat_partitions(zero)):
            params, offsets = group_members(zero, group)
            process_group = zero.real_dp_process_group[group]
            members = [(names.get(p), offset, p.numel()) for p, offset in zip(params, offsets, strict=True)]
            intervals, borders = partition_flat_buffer(members, flat.numel(), dist.get_rank(process_group))
            self.flats.append((flat, intervals, RankBorders(process_group, borders)))


def flat_partitions(zero) -> Sequence[torch.Tensor]:
    """This rank's fp32 partition of each param group."""
    if hasattr(zero, "fp32_groups_flat_partition"):
        return zero.fp32_groups_flat_partition
    return zero.single_partition_of_fp32_groups


def group_members(zero, group: int) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
    """The parameters of a group in the order of its flat buffer, and where each begins in it."""
    if hasattr(zero, "fp32_groups_flat_partition"):
        params = zero.bf16_groups[group]
        offsets, offset = [], 0
        for param in params:
            offsets.append(offset)
            offset += param.numel()
        return params, offsets
    return zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group]
