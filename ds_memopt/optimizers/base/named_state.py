"""State by parameter name: what ranks of any number and placement hand out and take back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch


class StatePart(NamedTuple):
    """Entries [start, start + len(values)) of the state `key` of a whole parameter, whatever rank holds them.

    Per-element states count elements of the flattened parameter; states of `width` numbers per block count `width`
    entries for each of its blocks; "step" is one entry.
    """

    name: str
    key: str
    start: int
    values: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.values)

    def copy_to(self, other: StatePart) -> None:
        """Copy into another part of the same state what the two have in common."""
        low, high = max(other.start, self.start), min(other.stop, self.stop)
        if low < high:
            other.values[low - other.start : high - other.start].copy_(
                self.values[low - self.start : high - self.start]
            )


STATE_KEY = "ds_memopt_state"
"""Key of every param group of ours: what its state means, so that state of another meaning is refused on load."""


def check_meaning(optimizer: torch.optim.Optimizer, saved_groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if param groups of a state_dict come from another method, other options or other blocks."""
    needed = optimizer.param_groups[0][STATE_KEY]
    for group in saved_groups:
        saved = group.get(STATE_KEY, "an optimizer of another library")
        if saved != needed:
            found, needs = (
                ", ".join([one[0], *(word for word in one[1:] if word not in other[1:])])
                for one, other in itertools.permutations((saved.split(", "), needed.split(", ")))
            )
            raise ValueError(
                f"The checkpoint's optimizer state is of {found}, but this optimizer needs {needs}. Resume with the "
                "method, its options and the model, names included, that saved it, or start without optimizer state."
            )


def check_covered(needed: StatePart, offered: list[StatePart]) -> None:
    """Raise ValueError unless what is offered of the same state covers the entries that are needed."""
    covered = needed.start
    for part in sorted(offered, key=lambda part: part.start):
        if part.start > covered:
            break
        covered = max(covered, part.stop)
    if covered < needed.stop:
        raise ValueError(
            f"The state offered for {needed.name} lacks {needed.key}[{covered}:{needed.stop}]. Hand in what all ranks "
            "gave out."
        )
