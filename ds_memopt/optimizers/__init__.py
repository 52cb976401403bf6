"""The methods: pure update rules over shards of named parameters. No engine is known here."""

from ds_memopt.optimizers.adam_mini import AdamMini
from ds_memopt.optimizers.addax import Addax
from ds_memopt.optimizers.badam import BAdam
from ds_memopt.optimizers.base.capabilities import Capabilities, capabilities_of
from ds_memopt.optimizers.base.named_optimizer import NamedOptimizer
from ds_memopt.optimizers.base.named_state import StatePart, check_meaning
from ds_memopt.optimizers.base.naming import METHOD_KEY
from ds_memopt.optimizers.block_state.sharded_optimizer import ShardedOptimizer
from ds_memopt.optimizers.gwt import GWT
from ds_memopt.optimizers.ipsgd import IPSGD
from ds_memopt.optimizers.mezo import MeZO
from ds_memopt.optimizers.stored_weights.in_place_optimizer import InPlaceOptimizer
from ds_memopt.optimizers.stored_weights.updates_in_backward import UpdatesInBackward

FIRST_ORDER: dict[str, type[ShardedOptimizer]] = {"AdamMini": AdamMini, "BAdam": BAdam, "GWT": GWT}
"""The methods that go by gradients: an engine lays their flat partitions."""

METHODS: dict[str, type[NamedOptimizer]] = FIRST_ORDER | {"MeZO": MeZO, "IPSGD": IPSGD, "Addax": Addax}
"""Every method by the word that turns it on in a ds_config's optimizer type."""


def method_of(word: str) -> type[Capabilities]:
    """What the optimizer of a ds_config's word can do, ours or not."""
    return METHODS.get(word, Capabilities)


__all__ = [
    "FIRST_ORDER",
    "GWT",
    "IPSGD",
    "METHODS",
    "METHOD_KEY",
    "AdamMini",
    "Addax",
    "BAdam",
    "Capabilities",
    "InPlaceOptimizer",
    "MeZO",
    "NamedOptimizer",
    "ShardedOptimizer",
    "StatePart",
    "UpdatesInBackward",
    "capabilities_of",
    "check_meaning",
    "method_of",
]
