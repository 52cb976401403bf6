"""Our methods in torchtitan: a container of optimizers whose Config stands in a torchtitan config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    init_optim_state,
    load_flat_optim_state_dict,
)

from ds_memopt.checkpoint import OptimizerState
from ds_memopt.engines.processes import of_all_ranks
from ds_memopt.optimizers import METHODS, capabilities_of
from ds_memopt.support import refuse

OF_TORCH = {"fused", "foreach"}
"""What torchtitan adds to each param group for torch's own optimizers."""


class NamedOptimizersContainer(OptimizersContainer):
    """torchtitan's OptimizersContainer, in which `optimizer_name` may be "AdamMini", "GWT" or "CAME", too.

    Their hyper-parameters stand in `optimizer_kwargs`; what is no matter of a param group, such as GWT's `level`, must
    be the same in all groups of the optimizer.

    torchtitan's checkpoints hold their state by parameter name, and resume on any number of ranks. All ranks must hold
    parts of the same parameters, so there is no pipeline of ranks.

    Raises ValueError for a method that torchtitan's loop cannot run, for a pipeline, and for hyper-parameters as the
    method does.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        super().__init__(config, model_parts=model_parts)
        of_ranks = of_all_ranks([name for part in model_parts for name, _ in part.named_parameters()])
        if any(names != of_ranks[0] for names in of_ranks) and any(map(_is_ours, self.optimizers)):
            raise ValueError(
                f"rank 0 has {len(of_ranks[0])} parameters and another rank others, as in a pipeline, but the state of "
                f"{', '.join(METHODS)} is saved by parts of parameters that all ranks know: set "
                "parallelism.pipeline_parallel_degree to 1"
            )

    def state_dict(self) -> dict[str, Any]:
        """A collective. Of other optimizers as torchtitan has it, of ours under "method.number."."""
        states: dict[str, Any] = {}
        for prefix, optimizer, own in self._by_kind():
            if own is None:
                init_optim_state(optimizer)
                states |= get_flat_optim_state_dict(optimizer)
            else:
                states |= {prefix + key: value for key, value in own.state_dict().items()}
        return states

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for prefix, optimizer, own in self._by_kind():
            if own is None:
                init_optim_state(optimizer)
                load_flat_optim_state_dict(optimizer, state_dict)
            else:
                of_it = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
                own.load_state_dict(of_it)

    def _by_kind(self) -> Iterator[tuple[str, torch.optim.Optimizer, OptimizerState | None]]:
        """Each optimizer with the prefix of its keys and, if it is ours, its state."""
        for number, optimizer in enumerate(self.optimizers):
            (part,) = [one for one in self.model_parts if _trains(optimizer, one)]
            yield f"method.{number}.", optimizer, OptimizerState(part, optimizer) if _is_ours(optimizer) else None

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


def _is_ours(optimizer: torch.optim.Optimizer) -> bool:
    return capabilities_of(optimizer).family is not None


def _trains(optimizer: torch.optim.Optimizer, part: torch.nn.Module) -> bool:
    parameters = {id(p) for p in part.parameters()}
    return any(id(p) in parameters for group in optimizer.param_groups for p in group["params"])


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
