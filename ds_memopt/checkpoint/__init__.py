"""A run's state on disk by parameter name and interval: saved on any number of ranks, loaded on any other."""

from ds_memopt.checkpoint.distributed_state import OptimizerState
from ds_memopt.checkpoint.part_index import INDEX, Index, fault
from ds_memopt.checkpoint.portable import SaveInFlight, begin_save, check_target, faults_of, find, load, load_from, save

__all__ = [
    "INDEX",
    "Index",
    "OptimizerState",
    "SaveInFlight",
    "begin_save",
    "check_target",
    "fault",
    "faults_of",
    "find",
    "load",
    "load_from",
    "save",
]
