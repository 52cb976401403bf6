"""What ZeRO-3 gathers in a step: DeepSpeed's rule of which weights stay gathered until they are used again, played.

Checked against DeepSpeed 0.19.8: PartitionedParameterCoordinator.__params_to_release,
DeepSpeedZeRoOffload.mark_persistent_parameters. Prefetching changes when weights are gathered, not how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from ds_memopt.blocks import bare_modules, bare_parameters


@dataclass(frozen=True)
class Owner:
    """A module that owns parameters: elements of each by name, and the layer that the module lies in, if any."""

    path: str
    numels: dict[str, int]
    layer: str | None


def owners_of(model: nn.Module, layers: Iterable[str]) -> list[Owner]:
    """The modules that own parameters, in the order in which the model names them, taken for that of its forward.

    A tied parameter belongs to each of its owners.
    """
    names, layers, owners = {id(p): name for name, p in bare_parameters(model).items()}, list(layers), []
    for path, module in bare_modules(model).items():
        numels = {names[id(p)]: p.numel() for p in module.parameters(recurse=False)}
        layer = next((layer for layer in layers if f"{path}.".startswith(f"{layer}.")), None)
        owners += [Owner(path, numels, layer)] if numels else []
    return owners


def forward(owners: Sequence[Owner], times_in_layer: int = 1, times_outside: int = 1) -> list[Owner]:
    """The order in which modules run, where a layer is run several times before the next one, and what is in none."""
    visits: list[Owner] = []
    for layer, members in _by_layer(owners):
        visits += members * (times_outside if layer is None else times_in_layer)
    return visits


def backward(owners: Sequence[Owner], trained: set[str], checkpointing: bool) -> list[Owner]:
    """The order in which backward needs modules, down to the first one that trains.

    checkpointing: each layer is run forward again before.
    """
    first = next((number for number, owner in enumerate(owners) if trained & owner.numels.keys()), len(owners))
    visits: list[Owner] = []
    for layer, members in reversed(_by_layer(owners[first:])):
        visits += members if checkpointing and layer is not None else []
        visits += reversed(members)
    return visits


def _by_layer(owners: Sequence[Owner]) -> list[tuple[str | None, list[Owner]]]:
    groups: list[tuple[str | None, list[Owner]]] = []
    for owner in owners:
        if owner.layer is None or not groups or groups[-1][0] != owner.layer:
            groups.append((owner.layer, []))
        groups[-1][1].append(owner)
    return groups


def persistent(owners: Iterable[Owner], zero: DeepSpeedZeroConfig) -> dict[str, int]:
    """Elements of the parameters that stay gathered for good, by name."""
    chosen: dict[str, int] = {}
    for owner in owners:
        for name, numel in owner.numels.items():
            room = zero.model_persistence_threshold - sum(chosen.values())
            if name not in chosen and numel <= min(zero.param_persistence_threshold, room):
                chosen[name] = numel
    return chosen


def play(
    visits: Sequence[Owner], stays: Iterable[str], reuse_distance: int, left: Sequence[Owner] = ()
) -> tuple[list[int], int]:
    """Elements of every parameter that is gathered, as often as it is, and the most that are gathered at once.

    visits: modules in the order in which they run. stays: names of parameters that are never gathered here.
    reuse_distance: in elements; a parameter that is needed again within it is not released.
    left: modules that are gathered at the beginning.
    """
    stays, gathered, most = set(stays), [], 0
    live = {name: numel for owner in left for name, numel in owner.numels.items() if name not in stays}
    for number, owner in enumerate(visits):
        needed = {name: numel for name, numel in owner.numels.items() if name not in stays}
        gathered += [numel for name, numel in needed.items() if name not in live]
        live |= needed
        most = max(most, sum(live.values()))
        traversed, kept = 0, set()
        for later in visits[number + 1 :]:
            if traversed >= reuse_distance:
                break
            kept |= later.numels.keys()
            traversed += sum(later.numels.values())
        for name in needed.keys() - kept:
            del live[name]
    return gathered, most
