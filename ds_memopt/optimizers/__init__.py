"""The methods: pure update rules over shards of named parameters. No engine is known here.

Each file of this folder is a method. A row in `ds_memopt.support.SUPPORT` is what lets one in.
"""

import importlib
import pkgutil

from ds_memopt.optimizers.base.capabilities import Capabilities, capabilities_of
from ds_memopt.optimizers.base.named_optimizer import NamedOptimizer
from ds_memopt.optimizers.base.named_state import StatePart, check_meaning
from ds_memopt.optimizers.base.naming import METHOD_KEY
from ds_memopt.support import SUPPORT


def _find_methods() -> dict[str, type[NamedOptimizer]]:
    files = (found.name for found in pkgutil.iter_modules(__path__) if not found.ispkg)
    classes = {}
    for file in files:
        classes |= vars(importlib.import_module(f"{__name__}.{file}"))
    missing = [word for word in SUPPORT if word not in classes]
    assert not missing, f"ds_memopt/support.py has rows for {missing}, but no file of ds_memopt/optimizers/ has them"
    return {word: classes[word] for word in SUPPORT}


METHODS: dict[str, type[NamedOptimizer]] = _find_methods()
"""Every method by the word that turns it on in a ds_config's optimizer type."""
globals().update(METHODS)


def method_of(word: str) -> type[Capabilities]:
    """What the optimizer of a ds_config's word can do, ours or not."""
    return METHODS.get(word, Capabilities)


__all__ = [
    *METHODS,
    "METHODS",
    "METHOD_KEY",
    "Capabilities",
    "NamedOptimizer",
    "StatePart",
    "capabilities_of",
    "check_meaning",
    "method_of",
]
