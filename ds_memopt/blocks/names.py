"""Names of parameters and modules as the bare model has them, whatever wrappers lie around it or inside it.

Noise, roles, state and trajectories go by name, so a wrapper that comes or goes must not change one. What wraps a
module for good, as peft and torch.nn.utils.parametrize do, is part of the model; FSDP1 is refused by its names.

Private names used here are in engines/private_names.py.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPER_NAMES = {"_orig_mod", "_checkpoint_wrapped_module"}
"""What torch's wrappers call the module inside them; nobody else has a child of such a name."""


def bare_name(name: str, model: nn.Module | None) -> str:
    """What the bare model calls the parameter or module that `model`, wrapped or not, calls `name`; None: unknown."""
    words, module = [], model
    for word in name.split("."):
        if not (word in WRAPPER_NAMES or (word == "module" and _holds_model_as_module(module))):
            words.append(word)
        module = module._modules.get(word) if module is not None else None
    return ".".join(words)


def bare_parameters(model: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """`model.named_parameters()` by the names of the bare model."""
    named = list(model.named_parameters(remove_duplicate=remove_duplicate))
    bare = {bare_name(name, model): parameter for name, parameter in named}
    assert len(bare) == len(named), "two parameters of one bare name"
    return bare


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`model.named_modules()` by the names of the bare model; of a wrapper and what it wraps, the latter."""
    return {bare_name(path, model): module for path, module in model.named_modules()}


def wrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """As `bare_modules`, but of a wrapper and what it wraps the former, which the module around it calls."""
    return {bare_name(path, model): module for path, module in reversed(list(model.named_modules()))}


def _holds_model_as_module(module: nn.Module | None) -> bool:
    """By class: a model may have a child called `module` of its own."""
    engine = any(base.__name__ == "DeepSpeedEngine" for base in type(module).__mro__)
    return engine or isinstance(module, (DataParallel, DistributedDataParallel))
