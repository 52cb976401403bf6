"""Our methods in torchtitan: a container of optimizers whose Config stands in a torchtitan config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from ds_memopt.optimizers import METHODS
from ds_memopt.support import refuse

OF_TORCH = {"fused", "foreach"}
"""What torchtitan adds to each param group for torch's own optimizers."""


class NamedOptimizersContainer(OptimizersContainer):
    """torchtitan's OptimizersContainer, in which `optimizer_name` may be "AdamMini", "GWT" or "CAME", too.

    Their hyper-parameters stand in `optimizer_kwargs`; what is no matter of a param group, such as GWT's `level`, must
    be the same in all groups of the optimizer.

    Raises ValueError for a method that torchtitan's loop cannot run, and for hyper-parameters as the method does.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    def _build_param_groups(
        self, model: torch.nn.Module, param_group_configs: list[ParamGroupConfig], impl_kwargs: dict[str, Any]
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[str]]]:
        self._part = model
        return super()._build_param_groups(model, param_group_configs, impl_kwargs)

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        if name not in METHODS:
            return super()._resolve_optimizer_factory(name)
        refuse(METHODS[name], "torchtitan")
        return functools.partial(_build, name, self._part)


def _build(name: str, model: torch.nn.Module, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The method on all param groups that name it. options: torchtitan's `optimizer_factory_kwargs_by_name`."""
    of_groups = {*METHODS[name].hyper_parameters().of_groups(), "params"}
    own_groups = []
    for group in groups:
        own_groups.append({key: value for key, value in group.items() if key in of_groups})
        for key, value in group.items():
            if key in of_groups | OF_TORCH | {"param_names"}:
                continue
            if options.setdefault(key, value) != value:
                raise ValueError(
                    f"{name} has {key}={options[key]!r} in one param group and {value!r} in another, but it holds for "
                    "the whole optimizer: give all its groups one value"
                )
    if options.get("release_gradients"):
        raise ValueError(
            f"{name} with release_gradients uses each gradient up in backward, but torchtitan clips by the norm of "
            "all: leave release_gradients out"
        )
    return METHODS[name].from_model(model, own_groups, **options)
