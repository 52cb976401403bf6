"""Layout of ZeRO-3: every parameter is cut into equal pieces, and sub-groups of pieces lie in flat fp32 buffers.

Private names used here are in engines/private_names.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ds_memopt.shards.layout import FlatPlacement, RankBorders, partition_each_parameter


class Zero3Placement(FlatPlacement):
    """Placement of a DeepSpeedZeroOptimizer_Stage3.

    zero: the ZeRO object that the engine built around the optimizer.
    names: the name of every model parameter that the optimizer updates; what ZeRO holds besides is left alone.
    """

    def __init__(self, zero, names: Mapping[torch.Tensor, str]) -> None:
        super().__init__()
        sub_groups = zip(
            zero.fp16_groups, zero.fp32_partitioned_groups_flat, zero.sub_group_process_groups, strict=True
        )
        for params, flat, process_group in sub_groups:
            members = [(names.get(param), param.ds_numel, param.ds_tensor.ds_numel) for param in params]
            intervals, borders = partition_each_parameter(members, dist.get_rank(process_group))
            pieces = sum(piece for _, _, piece in members)
            assert pieces == flat.numel(), f"sub-group holds {flat.numel()} elements, its parameters {pieces}"
            self.flats.append((flat, intervals, RankBorders(process_group, borders)))
