"""What all methods share: hyper-parameters, and parameters that have the names of the model."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ds_memopt.kernels import chosen_kernels
from ds_memopt.optimizers.base.capabilities import Capabilities
from ds_memopt.optimizers.base.hyper_parameters import HyperParameters, check_hyper_parameters, check_values
from ds_memopt.optimizers.base.named_state import StatePart, check_covered, check_meaning
from ds_memopt.optimizers.base.naming import check_named_group, named_groups, with_names
from ds_memopt.shards import Placement

logger = logging.getLogger("ds_memopt")


class NamedOptimizer(Capabilities, torch.optim.Optimizer):
    """An optimizer that knows which parameter of the model each of its tensors is.

    A method names the class of its hyper-parameters in `hyper_parameters`; its constructor takes the parameters, these
    and the model, and finds their values in `hyper`.
    """

    hyper_parameters: ClassVar[type[HyperParameters]]
    hyper: HyperParameters
    placement: Placement
    bound = False
    """Whether an engine has told the placement."""
    taken_whole: frozenset[str] = frozenset()
    """Keys of states of which `load_named_state` takes all parts there are, not only those that this rank holds now."""

    def __init_subclass__(cls, **keywords) -> None:
        super().__init_subclass__(**keywords)
        if "hyper_parameters" in vars(cls):
            cls.__signature__ = cls.hyper_parameters.signature()

    def __init__(self, params: Iterable, defaults: Mapping[str, Any]) -> None:
        chosen_kernels()  # it refuses a word that it does not know
        super().__init__(params, dict(defaults))

    @classmethod
    def from_model(cls, model: nn.Module, params: Iterable | None = None, **hyper_parameters):
        """Build the optimizer for a model, whose structure tells heads, rows and layers.

        params: the model's parameters to train, or param groups of them; by default all that require gradients, in two
        groups: matrices, and biases, norms and all with fewer than two dimensions, which get no weight decay.

        Raises ValueError for an unknown hyper-parameter, one out of range, or a parameter that is not the model's.
        """
        check_hyper_parameters(cls, hyper_parameters)
        return cls(named_groups(model, params), model=model, **hyper_parameters)

    @classmethod
    def accepted(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        known = cls.hyper_parameters.rules()
        return {name: value for name, value in values.items() if name in known}

    def the_model(self) -> nn.Module | None:
        """The model that the parameters belong to, if it was given."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(with_names(param_group))
        check_named_group(self, self.param_groups[-1], self.the_model())
        check_values(self.hyper_parameters.rules(), self.param_groups[-1])

    def bind(self, placement: Placement) -> None:
        """Tell where an engine has laid the parameters. Called by the engine, after it has replaced param_groups."""
        self.placement, self.bound = placement, True

    def names_by_tensor(self) -> dict[torch.Tensor, str]:
        """The name of each parameter that is trained now."""
        pairs = [zip(group["params"], group["param_names"], strict=True) for group in self.param_groups]
        return dict(itertools.chain.from_iterable(pairs))

    @property
    def progress(self) -> dict[str, Any]:
        """What a run has come to beside its state by name; under STATE_KEY, what that state means."""
        raise NotImplementedError

    def _make_state(self) -> None:
        """Make the state that is missing, of all that this rank updates."""
        raise NotImplementedError

    def named_state(self) -> Iterator[StatePart]:
        """Hand out all state that this rank holds, by parameter name and place in the whole parameter.

        With the weights and `progress` it is all that a run on other ranks or at another stage needs to go on. The
        values are views, or copies of what is kept in fewer bits. What several ranks hold, each of them hands out, with
        equal values.
        """
        raise NotImplementedError

    def _state_to_fill(self, offered: Collection[str]) -> tuple[list[StatePart], Callable[[], None]]:
        """What `named_state` would hand out, as far as it is needed where these keys are offered, to be overwritten;
        and what is to be called then."""
        return list(self.named_state()), lambda: None

    @torch.no_grad()
    def load_named_state(self, parts: Iterable[StatePart], progress: Mapping[str, Any] | None = None) -> None:
        """Take back what ranks of any number and placement handed out; this rank keeps what it needs of it.

        progress: that of the run, which is checked and taken over; None: this run's own, where the method needs none.

        State may have been kept otherwise, in fp32 or in fewer bits, and is then rounded to nearest.

        Raises ValueError, before any entry is overwritten, for the state of another method, of other options or of
        other blocks, and if an entry that this rank needs is missing.
        """
        if progress is not None:
            check_meaning(self, [progress])
        offered: dict[tuple[str, str], list[StatePart]] = {}
        for part in parts:
            offered.setdefault((part.name, part.key), []).append(part)
        self._make_state()
        own, take_back = self._state_to_fill({key for _, key in offered})
        for part in own:
            check_covered(part, offered.get((part.name, part.key), []))
        for part in own:
            for given in offered[part.name, part.key]:
                given.copy_to(part)
        take_back()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states have the dtype that they were kept in; torch would cast them to the weights'.

        Raises ValueError, before anything is changed, for state of another method, of other options or of other blocks.
        """
        check_meaning(self, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for number, tensor in zip(saved, tensors, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[tensor][key] = self._restored(tensor, key, value)
        self._loaded()

    def _restored(self, tensor: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
        """What is to be kept as a tensor's state where `value` was saved."""
        raise NotImplementedError

    def _loaded(self) -> None:
        """Called when a state_dict was loaded."""

    def __getstate__(self):
        """A copy would go on with the model, the hooks or the placement of the original."""
        raise ValueError(
            f"{type(self).__name__} cannot be copied or pickled. Build another one and load state_dict() into it."
        )


def asks_for_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this call of `step` is that of torch's get_optimizer_state_dict: it wants all state made, and no step.

    It has set all learning rates and gradients to zero. A collective under FSDP2 if the former are.
    """
    groups = optimizer.param_groups
    if any(group["lr"] != 0 for group in groups):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.requires_grad]
    return bool(gradients) and not any(gradient is None or _total(gradient.abs()) != 0 for gradient in gradients)


def _total(tensor: torch.Tensor) -> float:
    total = tensor.sum()
    return (total.full_tensor() if hasattr(total, "full_tensor") else total).item()


def make_log_visible() -> None:
    """Print what ds_memopt logs unless the program has set logging up: what rule each parameter got must be seen."""
    if not logging.getLogger().handlers and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[ds_memopt] %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
