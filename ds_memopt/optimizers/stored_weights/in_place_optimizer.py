"""What the methods share that update the stored weights themselves, without fp32 masters by an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ds_memopt import kernels
from ds_memopt.blocks import bare_parameters
from ds_memopt.optimizers.base.hyper_parameters import LR, WEIGHT_DECAY, HyperParameters, choice, hyper_parameter
from ds_memopt.optimizers.base.named_optimizer import NamedOptimizer, asks_for_state
from ds_memopt.optimizers.base.named_state import STATE_KEY, StatePart
from ds_memopt.optimizers.base.naming import check_current
from ds_memopt.shards import InPlaceShards, Part, WholeShards, check_contiguous, reshard


@dataclass(frozen=True, kw_only=True)
class InPlaceHyperParameters(HyperParameters):
    """Those of every `InPlaceOptimizer`."""

    positional = ("lr", "weight_decay")

    lr: float = hyper_parameter(1e-3, LR, "Learning rate; read from the param group at every step.", True)
    weight_decay: float = hyper_parameter(
        0.0, WEIGHT_DECAY, "Decoupled from the gradient, as in AdamW; read from the param group at every step.", True
    )
    keep: Literal["residual", "fp32", "none"] = hyper_parameter(
        "residual",
        choice("residual", "fp32", "none", remedy="'residual' is usual."),
        "What becomes of an update below a 16-bit weight's precision: 'residual' keeps it in 2 bytes per parameter "
        "(bf16 only), 'fp32' in a master copy of 4 bytes, 'none' rounds it away. fp32 weights lose nothing anyway.",
    )


PROGRESS = "progress"
"""Key of the param groups' entry that holds what a run has come to; the same in all groups and on all ranks."""


class InPlaceOptimizer(NamedOptimizer):
    """An optimizer that writes the parts of the weights that are this rank's, and keeps what rounding to 16 bits drops.

    params: named parameters (`model.named_parameters()`) or param groups of them.
    model: the model that the parameters belong to.

    Raises ValueError for a hyper-parameter out of range, and for keep="residual" with fp16 weights.
    """

    writes_weights = True
    hyper: InPlaceHyperParameters
    placement: InPlaceShards

    def __init__(self, params: Iterable, *positional: Any, model: nn.Module | None = None, **named: Any) -> None:
        self.hyper = self.hyper_parameters.bind(positional, named)
        if model is None:
            method = type(self).__name__
            raise ValueError(f"{method} needs the model, whose forwards it uses. Use {method}.from_model(model, ...).")
        self.keep, self._model = self.hyper.keep, model
        super().__init__(params, self.hyper.of_groups())
        self._names = {
            p: name
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if p.requires_grad
        }
        self._moved = kernels.Moved(0.0, 0.0)
        self.placement = WholeShards(model, self._names)
        self._number_groups()
        self._check_contiguous()
        self.described, progress, *more = self.build()
        for group in self.param_groups:
            words = [f"{key} {value}" for key, value in self.described.items()]
            group[STATE_KEY] = ", ".join([type(self).__name__, *words, *more])
            group[PROGRESS] = {"steps": 0, "skipped": 0, **progress, STATE_KEY: group[STATE_KEY]}
        self._built, self._checked = True, False

    def build(self) -> tuple[dict[str, Any], dict[str, Any], *tuple[str, ...]]:
        """Build what the method consists of, once its parameters are known. Returns what its state means, by name, how
        `progress` begins, and more words on the meaning."""
        raise NotImplementedError

    def the_model(self) -> nn.Module:
        return self._model

    def add_param_group(self, param_group: dict) -> None:
        if hasattr(self, "_built"):
            method = type(self).__name__
            raise ValueError(f"What {method} trains is fixed when it is built: list all parameters there.")
        super().add_param_group(param_group)
        if self.keep == "residual" and any(p.dtype == torch.float16 for p in self.param_groups[-1]["params"]):
            raise ValueError('keep="residual" needs bf16 or fp32 weights, not fp16. Use bf16, or keep="fp32".')

    @property
    def progress(self) -> dict[str, Any]:
        """What the run has come to: counters, and whatever is needed to go on. Saved with the state."""
        return self.param_groups[0][PROGRESS]

    def set_progress(self, **changes: Any) -> None:
        for group in self.param_groups:
            group[PROGRESS] = group[PROGRESS] | changes

    def bind(self, placement: InPlaceShards) -> None:
        super().bind(placement)
        self._number_groups()

    def _number_groups(self) -> None:
        self._group_number = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}

    def names_by_tensor(self) -> dict[torch.Tensor, str]:
        """The name of each parameter that is trained."""
        return dict(self._names)

    def trained_parameters(self) -> list[torch.Tensor]:
        """All parameters that train, whether or not they require gradients."""
        return list(self._names)

    def check_parameters(self) -> None:
        """Before the first step: raise ValueError where what trains is no longer what the model computes with."""
        if not (self.bound or self._checked):  # an engine lays out the parameters that it was given
            reshard(self._model)
            current = bare_parameters(self._model)
            for parameter, name in self._names.items():
                check_current(self, parameter, name, current)
            self._checked = True

    def release(self) -> None:
        """Give the model back: all parameters require gradients that did, and no hook stays on it."""
        for parameter in self._names:
            parameter.requires_grad_(True)

    def _check_contiguous(self) -> None:
        """Before a step moves the first part: raise ValueError where a parameter was laid out anew."""
        for parameter, name in self._names.items():
            check_contiguous(parameter, name)

    @property
    def steps(self) -> int:
        """Steps made so far, skipped ones included: the t of the next step."""
        return self.progress["steps"]

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a loss was not finite."""
        return self.progress["skipped"]

    def step_of(self, part: Part, rate: Any = 1.0, **terms: Any) -> kernels.Step:
        """A part's step at lr * rate. terms: `gradient`, `share` and `noise` of `kernels.Step`."""
        group = self.param_groups[self._group_number[part.parameter]]
        return kernels.Step(part.elements, self.store(part), group["lr"] * rate, group["weight_decay"], **terms)

    def move(self, steps: Iterable[kernels.Step]) -> None:
        """Make steps. All that are known at once belong in one call."""
        self._moved = kernels.move(list(steps), self._moved)

    def step_bytes(self) -> int | None:
        """Weights, and what is kept beside them, are read and written, gradients are read; for each forward of a probe
        all weights are read and their perturbed copies written."""
        copies = len(self.probe.evaluations()) if self.uses_losses else 0
        moved = 2 * copies * sum(self.placement.numel(p) * p.itemsize for p in self._names)
        for part in self.placement.parts():
            kept = sum(values.nbytes for _, values in self._states(part).values())
            moved += (2 + self.uses_gradients) * part.elements.nbytes + 2 * kept
        return moved

    @property
    def update_kept(self) -> float:
        """Projection of the last step's real movement on the intended one, of this rank's part: 1 if none was lost."""
        realised, intended = map(float, self._moved)
        return realised / intended if intended else 1.0

    def store(self, part: Part) -> torch.Tensor | None:
        """What is kept of a part beside its 16-bit weights, made when first needed."""
        state = self.state[part.parameter]
        if self.keep == "none" or part.elements.dtype not in (torch.bfloat16, torch.float16):
            return None
        if "kept" not in state:
            dtype = torch.int16 if self.keep == "residual" else torch.float32
            state["kept"] = self.placement.new_state(part.parameter, None, dtype)
            if self.keep == "fp32":
                self.placement.local(state["kept"]).copy_(part.elements)
        return self.placement.local(state["kept"])

    def named_state(self) -> Iterator[StatePart]:
        for part in self.placement.parts():
            for key, (start, values) in self._states(part).items():
                yield StatePart(part.name, key, start, values)

    def _states(self, part: Part) -> dict[str, tuple[int, torch.Tensor]]:
        """All state of a part, made if there is none: by key, number of its first entry in that of the whole."""
        store = self.store(part)
        return {} if store is None else {"kept": (part.start, store)}

    @torch.no_grad()
    def load_named_state(self, parts: Iterable[StatePart], progress: Mapping[str, Any] | None = None) -> None:
        """As any optimizer's; first load the weights. Raises ValueError, too, where `progress` is missing."""
        if progress is None:
            raise ValueError("The state by name is not all: hand in the `progress` of the optimizer that gave it out.")
        super().load_named_state(parts, progress)
        self.set_progress(**progress)
        self._loaded()
        self.placement.publish()

    def _make_state(self) -> None:
        """Of all parameters, also where a rank has no elements or nothing is kept: all ranks save the same entries."""
        for parameter in self._names:
            self.state.setdefault(parameter, {})
            self._states(self.placement.part(parameter))

    def _makes_state_alone(self) -> bool:
        """Whether `step` was called without anything to go by because all state is asked for; then it is made."""
        asked = asks_for_state(self)
        if asked:
            self._make_state()
            for parameter in self._names:
                parameter.grad = None
        return asked

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Under FSDP2 state is laid as the parameters are, for torch.distributed.checkpoint."""
        self._make_state()
        return super().state_dict()

    def _restored(self, tensor: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
        return value.to(tensor.device, copy=True)

    def _loaded(self) -> None:
        """Called when `progress` was loaded."""


def backward_in_closure(optimizer: InPlaceOptimizer) -> str:
    """Why a closure must not call backward."""
    return (
        f"The closure of {type(optimizer).__name__}.step called backward, which step does itself where it needs "
        "gradients. Let the closure only compute the loss and return it."
    )
