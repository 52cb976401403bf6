"""The methods: pure update rules over shards of named parameters. No engine is known here."""

import inspect

from .adam_mini import AdamMini
from .badam import BAdam
from .base import METHOD_KEY, ShardedOptimizer, StatePart
from .gwt import GWT

METHODS: dict[str, type[ShardedOptimizer]] = {"AdamMini": AdamMini, "BAdam": BAdam, "GWT": GWT}
"""Every method by the word that turns it on in a ds_config's optimizer type."""


def takes(word: str, hyper_parameter: str) -> bool:
    """Whether `word` is a method of ours and has this hyper-parameter."""
    return word in METHODS and hyper_parameter in inspect.signature(METHODS[word]).parameters


__all__ = ["GWT", "METHODS", "METHOD_KEY", "AdamMini", "BAdam", "ShardedOptimizer", "StatePart", "takes"]
