"""Forward passes at perturbed weights, with the stored weights never written.

MeZO (arXiv 2305.17333, Algorithm 1) perturbs the weights in place and back, and in bf16 that walks them away by 0.4 %
of their norm a step. Here a module reads a perturbed copy of its own parameters, for as long as its forward runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ds_memopt.blocks import Hook, full_shape

Perturb = Callable[[torch.Tensor, torch.Tensor, str, float], None]
"""perturb(copy, weights, name, factor): copy <- weights + factor x the noise of parameter `name`; both 1-D."""

REASON = (
    "the weights are perturbed between graphs. Compile the model with torch.compile(model) before the optimizer is "
    "built on it, or without fullgraph."
)


class UntracedHook(Hook):
    """The compiler calls it instead of tracing it: what it does differs at every call."""

    @partial(torch.compiler.disable, reason=REASON)
    def __call__(self, *arguments: Any) -> None:
        super().__call__(*arguments)


class Perturbation:
    """Hooks on every module that owns parameters to be perturbed, and on every module that is compiled as a whole.

    A parameter is perturbed after an engine has gathered it (DeepSpeed's and FSDP2's own hooks come first) and put back
    before it is released. What is shared by several modules is perturbed alike in each, for it has one name.

    A compiled module reads a perturbed copy of all parameters inside it, for as long as its forward runs, so that its
    graph stays whole. Where an engine gathers these piece by piece, or where a function is compiled that calls modules,
    each of them has its own hooks as without a compiler, and the graph breaks there.

    model: build it after the last wrapper (fully_shard, deepspeed) has laid its hooks.
    names: by id of a parameter, the name under which it is perturbed; others are left alone.
    """

    def __init__(self, model: nn.Module, names: Mapping[int, str]) -> None:
        self._perturb: Perturb | None = None
        self._held: dict[int, tuple[nn.Parameter, torch.Tensor, str, int]] = {}
        self._handles = []
        self.reached: set[str] = set()
        """Names of the parameters that some forward has read perturbed."""
        for module, owned in _units(model, names):
            enter, leave = (UntracedHook(partial(act, owned=owned)) for act in (self._enter, self._leave))
            self._handles += [
                module.register_forward_pre_hook(enter),
                # First of all hooks, so that ours is undone before the engine's; also after an exception.
                module.register_forward_hook(leave, prepend=True, always_call=True),
            ]
        torch.compiler.reset()  # code that was compiled before the hooks were laid would not call them

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def applied(self, perturb: Perturb, factor: float) -> Iterator[None]:
        """While this lasts forwards in this thread run at perturbed weights, with factor 0 at these as they are."""
        assert self._perturb is None and not self._held, "a perturbed forward inside another"
        self._perturb, self._factor, self._thread = perturb if factor else None, factor, threading.get_ident()
        try:
            yield
        finally:
            self._perturb = None
            for parameter, weights, _, _ in self._held.values():  # what an exception left behind
                parameter.data = weights
            self._held.clear()

    def _enter(self, module: nn.Module, *_: Any, owned: Mapping[str, str]) -> None:
        if self._perturb is None or threading.get_ident() != self._thread:
            return
        for key, name in owned.items():
            parameter = _parameter(module, key)
            _, weights, _, depth = self._held.get(id(parameter), (parameter, parameter.data, name, 0))
            # Before the copy is made: should there be no memory for it, the parameter must be known as held.
            self._held[id(parameter)] = parameter, weights, name, depth + 1
            if depth == 0:
                self._exchange(parameter, weights, name)

    def flip(self) -> None:
        """Change the sign of the noise, also in what the modules that run now read."""
        self._factor = -self._factor
        for parameter, weights, name, _ in self._held.values():
            self._exchange(parameter, weights, name)

    def _exchange(self, parameter: nn.Parameter, weights: torch.Tensor, name: str) -> None:
        copy = torch.empty_like(weights, memory_format=torch.contiguous_format)
        self._perturb(copy.view(-1), weights.reshape(-1), name, self._factor)
        parameter.data = copy
        self.reached.add(name)

    def _leave(self, module: nn.Module, *_: Any, owned: Mapping[str, str]) -> None:
        for key in owned if self._held and threading.get_ident() == self._thread else ():
            parameter = _parameter(module, key)
            if id(parameter) not in self._held:
                continue
            _, weights, name, depth = self._held.pop(id(parameter))
            if depth > 1:
                self._held[id(parameter)] = parameter, weights, name, depth - 1
            else:
                parameter.data = weights


def _units(model: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """The modules in whose forwards parameters are perturbed, and by their path in the module the names of these."""
    modules, seen = [model], set()
    while modules:
        module = modules.pop()
        if module in seen:
            continue
        seen.add(module)
        whole = _is_compiled(module) and all(map(_is_whole, module.parameters()))
        owned = {key: names[id(p)] for key, p in module.named_parameters(recurse=whole) if id(p) in names}
        if isinstance(module, nn.MultiheadAttention):  # it reads the weights of this child, which it never calls
            projection = module.out_proj.named_parameters(recurse=False)
            owned |= {f"out_proj.{key}": names[id(p)] for key, p in projection if id(p) in names}
        if owned:
            yield module, owned
        if not whole:
            modules += module.children()


def _is_compiled(module: nn.Module) -> bool:
    """Whether by module.compile(), torch.compile(module), or module.forward = torch.compile(module.forward)."""
    forward = module.forward
    compiled = hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
    return compiled or module._compiled_call_impl is not None


def _is_whole(parameter: nn.Parameter) -> bool:
    """Whether no engine has to gather it before it is read."""
    return not hasattr(parameter, "to_local") and parameter.shape == full_shape(parameter)


def _parameter(module: nn.Module, key: str) -> nn.Parameter:
    # Looked up at every call: FSDP2 puts another object in the place of a gathered parameter.
    path, _, last = key.rpartition(".")
    return module.get_submodule(path)._parameters[last]
