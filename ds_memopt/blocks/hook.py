"""Hooks on a model that is copied or saved while a method is at work on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A forward hook that stays where it is: in a copy of the model, or a file of it, there is one that does nothing.

    The method is at work on this model alone, and what it needs for that cannot be pickled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __reduce__(self) -> tuple:
        return Hook, (_nothing,)


def _nothing(*arguments: Any) -> None:
    """The hook of a copy."""
