"""Which role each parameter of a model plays, and how it is cut into blocks that share one second moment.

The partition is that of Adam-mini (arXiv 2406.16793, Algorithm 3) as released in the package adam-mini 1.1.1,
read from the model's structure first (module types, head sizes) and from names second.
"""

from ds_memopt.blocks.assign import assign_blocks, assign_blocks_by_name, full_shape
from ds_memopt.blocks.hook import Hook
from ds_memopt.blocks.names import bare_modules, bare_name, bare_parameters, wrapped_modules
from ds_memopt.blocks.partition import Partition, partition_into_blocks
from ds_memopt.blocks.patterns import are_patterns, compiled, matching
from ds_memopt.blocks.report import format_assignment
from ds_memopt.blocks.structure import Columns, Contiguous, ParamBlocks, Section, Tiled

__all__ = [
    "Columns",
    "Contiguous",
    "Hook",
    "ParamBlocks",
    "Partition",
    "Section",
    "Tiled",
    "are_patterns",
    "compiled",
    "assign_blocks",
    "assign_blocks_by_name",
    "bare_modules",
    "bare_name",
    "bare_parameters",
    "format_assignment",
    "full_shape",
    "matching",
    "partition_into_blocks",
    "wrapped_modules",
]
