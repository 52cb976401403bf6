"""A run's state on disk by parameter name and interval: saved on any number of ranks, loaded on any other."""

from ds_memopt.checkpoint.part_index import INDEX, Index
from ds_memopt.checkpoint.portable import faults_of, find, load, load_from, save

__all__ = ["INDEX", "Index", "faults_of", "find", "load", "load_from", "save"]
