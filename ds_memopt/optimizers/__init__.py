"""The methods: pure update rules over shards of named parameters. No engine is known here."""

import inspect

import torch

from .adam_mini import AdamMini
from .addax import Addax
from .badam import BAdam
from .base import ShardedOptimizer, StatePart, check_meaning
from .gwt import GWT
from .in_backward import UpdatesInBackward
from .inplace import InPlaceOptimizer
from .ipsgd import IPSGD
from .mezo import MeZO
from .naming import METHOD_KEY

FIRST_ORDER: dict[str, type[ShardedOptimizer]] = {"AdamMini": AdamMini, "BAdam": BAdam, "GWT": GWT}
"""The methods that go by gradients: an engine lays their flat partitions."""

METHODS: dict[str, type[torch.optim.Optimizer]] = FIRST_ORDER | {"MeZO": MeZO, "IPSGD": IPSGD, "Addax": Addax}
"""Every method by the word that turns it on in a ds_config's optimizer type."""


def takes(word: str, hyper_parameter: str) -> bool:
    """Whether `word` is a method of ours and has this hyper-parameter."""
    return word in METHODS and hyper_parameter in inspect.signature(METHODS[word]).parameters


__all__ = [
    "FIRST_ORDER",
    "GWT",
    "IPSGD",
    "METHODS",
    "METHOD_KEY",
    "AdamMini",
    "Addax",
    "BAdam",
    "InPlaceOptimizer",
    "MeZO",
    "ShardedOptimizer",
    "StatePart",
    "UpdatesInBackward",
    "check_meaning",
    "takes",
]
