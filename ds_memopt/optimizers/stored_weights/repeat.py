"""A function that is called twice with the same random numbers, so that both passes drop out the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def repeatable(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function, as it would run now: with the random numbers that follow, which others still get as well."""
    generators = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    then = [generator.get_rng_state() for generator in generators]

    def again() -> Any:
        now = [generator.get_rng_state() for generator in generators]
        _set(generators, then)
        try:
            return function()
        finally:
            _set(generators, now)

    return again


def _set(generators: list, states: list[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_rng_state(state)
