"""Both signs of a probe in one pass over the model, so that an engine gathers each layer's weights once.

The batch is doubled. Every layer, and every other module that owns parameters, runs the first half at theta + epsilon z
and then, its weights being gathered still, the second at theta - epsilon z; what lies between is done on both at once.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_memopt.blocks import bare_modules, wrapped_modules


class Lockstep:
    """A model whose forward can run two halves of a batch in lockstep.

    model: a transformers model, which computes its loss in `loss_function`. layers: paths of its layers.
    flip: changes the sign at which the model runs, which is positive at first.

    Raises ValueError where the model cannot be split: no loss_function, or parameters owned by a module that holds
    layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], flip: Callable[[], None]) -> None:
        if not hasattr(model, "loss_function"):
            raise ValueError(f"{type(model).__name__} has no loss_function")
        owners = [name for name, module in bare_modules(model).items() if list(module.parameters(recurse=False))]
        outside = [name for name in owners if not any(f"{name}.".startswith(f"{layer}.") for layer in layers)]
        if holder := next(
            (name for name in outside if any(f"{layer}.".startswith(f"{name}.") for layer in layers)), ""
        ):
            raise ValueError(f"{holder} owns parameters and holds layers")
        if "" in outside:
            raise ValueError(f"{type(model).__name__} itself owns parameters")
        self._model, self._flip = model, flip
        modules = wrapped_modules(model)
        self.units = [modules[name] for name in (*layers, *outside)]
        self._batch, self._sign = 0, 1
        self._second_loss: torch.Tensor | None = None

    def run(
        self, forward: Callable[..., Any], inputs: tuple, keywords: Mapping[str, Any]
    ) -> tuple[Any, torch.Tensor | None]:
        """What forward(*inputs, **keywords) returns at the positive sign, and the loss at the negative one.

        The loss is None where the model did not call its loss_function.
        """
        tensors = [value for value in (*inputs, *keywords.values()) if isinstance(value, torch.Tensor) and value.dim()]
        self._batch, self._sign, self._second_loss = len(tensors[0]), 1, None
        self._thread = threading.get_ident()  # another may run the model in turn with this one, as it is
        doubled = _map((tuple(inputs), dict(keywords)), lambda t: torch.cat([t, t]) if len(t) == self._batch else t)
        if "use_cache" in inspect.signature(self._model.forward).parameters:
            doubled[1]["use_cache"] = False  # the second half would find the first one's keys in it
        with self._split():
            output = forward(*doubled[0], **doubled[1])
        first = _map(output, self._first)
        return first, self._second_loss

    @contextlib.contextmanager
    def _split(self) -> Iterator[None]:
        own = [unit.__dict__.get("forward") for unit in self.units]  # most have their class's
        loss_function = self._model.loss_function
        for unit in self.units:
            unit.forward = self._in_halves(unit.forward)
        self._model.loss_function = self._loss_in_halves(loss_function)
        try:
            yield
        finally:
            for unit, forward in zip(self.units, own, strict=True):
                del unit.forward
                if forward is not None:
                    unit.forward = forward
            self._model.loss_function = loss_function

    def _in_halves(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def both(*inputs, **keywords):
            if threading.get_ident() != self._thread:
                return forward(*inputs, **keywords)
            halves = {}
            for sign in (self._sign, -self._sign):  # begin where the last module ended: to change signs takes new noise
                if sign != self._sign:
                    self._sign = sign
                    self._flip()
                half = self._first if sign == 1 else self._second
                halves[sign] = forward(*_map(inputs, half), **_map(keywords, half))
            return _join(halves[1], halves[-1], self._batch)

        return both

    def _loss_in_halves(self, loss_function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def first_of_both(*inputs, **keywords):
            if threading.get_ident() != self._thread:
                return loss_function(*inputs, **keywords)
            self._second_loss = loss_function(*_map(inputs, self._second), **_map(keywords, self._second))
            return loss_function(*_map(inputs, self._first), **_map(keywords, self._first))

        return first_of_both

    def _first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self._batch] if len(tensor) == 2 * self._batch else tensor

    def _second(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self._batch :] if len(tensor) == 2 * self._batch else tensor


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested value with the function applied to every tensor that has a dimension."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.dim() else value
    if isinstance(value, Mapping):
        copy = value.copy()
        for key, entry in value.items():
            copy[key] = _map(entry, function)
        return copy
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_map(entry, function) for entry in value)
    return value


def _join(first: Any, second: Any, batch: int) -> Any:
    """One value of two halves. What a module returns once for the whole batch, as position embeddings, is repeated."""
    if isinstance(first, torch.Tensor):
        if first.dim() and len(first) == 1 < batch:
            first, second = (half.expand(batch, *half.shape[1:]) for half in (first, second))
        return torch.cat([first, second]) if first.dim() else first
    if isinstance(first, (tuple, list)):
        return type(first)(_join(a, b, batch) for a, b in zip(first, second, strict=True))
    if isinstance(first, Mapping):
        return type(first)({key: _join(first[key], second[key], batch) for key in first})
    return first
