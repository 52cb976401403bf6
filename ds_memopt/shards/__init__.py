"""Where data lies: which intervals of which parameters this rank's optimizer tensors hold."""

from ds_memopt.shards.gradients import GradientBuckets
from ds_memopt.shards.in_place_shards import InPlaceShards, Part, PartitionedShards, SplitShards, WholeShards, reshard
from ds_memopt.shards.layout import (
    Interval,
    Layout,
    Placement,
    RankBorders,
    even_borders,
    even_part,
    numel_of,
    partition_each_parameter,
    partition_flat_buffer,
)
from ds_memopt.shards.plain_placement import (
    FusedCopyPlacement,
    MasterCopyPlacement,
    PlainPlacement,
    check_contiguous,
    reduced_together,
    trainable_parameters_changed,
)
from ds_memopt.shards.seams import Seams, SeamTable, is_first_rank, on_first_rank
from ds_memopt.shards.zero3 import Zero3Placement
from ds_memopt.shards.zero12 import Zero12Placement

__all__ = [
    "FusedCopyPlacement",
    "GradientBuckets",
    "InPlaceShards",
    "Interval",
    "Layout",
    "MasterCopyPlacement",
    "Part",
    "PartitionedShards",
    "Placement",
    "PlainPlacement",
    "RankBorders",
    "SeamTable",
    "Seams",
    "SplitShards",
    "WholeShards",
    "Zero12Placement",
    "Zero3Placement",
    "check_contiguous",
    "even_borders",
    "even_part",
    "is_first_rank",
    "numel_of",
    "on_first_rank",
    "partition_each_parameter",
    "partition_flat_buffer",
    "reduced_together",
    "reshard",
    "trainable_parameters_changed",
]
