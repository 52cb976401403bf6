"""Layout of ZeRO-3: every parameter is cut into equal pieces, and sub-groups of pieces lie in flat fp32 buffers.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedZeroOptimizer_Stage3.fp16_groups, .fp32_partitioned_groups_flat, .sub_group_process_groups
  Parameter.ds_tensor.ds_numel, Parameter.ds_numel
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from .layout import FlatPlacement, Interval, RankBorders, even_borders


class Zero3Placement(FlatPlacement):
    """Placement of a DeepSpeedZeroOptimizer_Stage3.

    zero: the ZeRO object that the engine built around the optimizer.
    names: the name of every trainable model parameter.
    """

    def __init__(self, zero, names: Mapping[torch.Tensor, str]) -> None:
        super().__init__()
        sub_groups = zip(
            zero.fp16_groups, zero.fp32_partitioned_groups_flat, zero.sub_group_process_groups, strict=True
        )
        for params, flat, process_group in sub_groups:
            rank = dist.get_rank(process_group)
            members, borders, offset = [], {}, 0
            for param in params:
                name, piece = names[param], param.ds_tensor.ds_numel
                borders[name] = even_borders(0, param.ds_numel, piece)
                start = rank * piece
                # The last ranks' pieces may be partly or wholly padding, which belongs to no parameter.
                length = min(piece, param.ds_numel - start)
                if length > 0:
                    members.append(Interval(name, start, length, 0, offset))
                offset += piece
            assert offset == flat.numel(), f"sub-group holds {flat.numel()} elements, its parameters {offset}"
            self.flats.append((flat, members, RankBorders(process_group, borders)))
