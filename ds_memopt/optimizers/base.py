"""What all methods share: named parameters, checked hyper-parameters, a placement, and state by parameter name."""

from __future__ import annotations

import difflib
import inspect
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ds_memopt.blocks import ParamBlocks, assign_blocks, assign_blocks_by_name, format_assignment, full_shape
from ds_memopt.shards import Placement, PlainPlacement, is_first_rank
from ds_memopt.support import refuse

from .blockwise import BlockPlan, step_dtype

logger = logging.getLogger("ds_memopt")

METHOD_KEY = "ds_memopt_method"
"""Key of every param group of ours. Where another library builds its own optimizer from our groups, it shows."""


class StatePart(NamedTuple):
    """Entries [start, start + len(values)) of the state `key` of a whole parameter, whatever rank holds them.

    Per-element states count elements of the flattened parameter, per-block states its blocks; "step" is one entry.
    """

    name: str
    key: str
    start: int
    values: torch.Tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose rule knows which parameter, and which part of it, each of its elements belongs to.

    params: named parameters, as `model.named_parameters()` gives them, or param groups of such pairs.
    defaults: the hyper-parameters of a param group.
    model: the model that the parameters belong to; its structure tells the blocks. Without it names and shapes must do.
    head_dim, value_blocks: see `ds_memopt.blocks`.
    element_dtype: how per-element states are kept; by default in fp32 (fp64 for fp64 parameters).

    A subclass names its states in `element_states` (one entry per element, laid like the parameter) and `block_states`
    (one fp32 entry per block) and implements `check_group` and `update`.
    """

    element_states: ClassVar[tuple[str, ...]] = ()
    block_states: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        *,
        model: nn.Module | None,
        head_dim: int | None,
        value_blocks: str,
        element_dtype: torch.dtype | None = None,
    ) -> None:
        self.element_dtype = element_dtype
        self._placement: Placement = PlainPlacement()
        self._bound = False
        self._plans: dict[tuple[int, ...], BlockPlan] = {}
        self._model = weakref.ref(model) if model is not None else None
        self._head_dim, self._value_blocks = head_dim, value_blocks
        self.blocks: dict[str, ParamBlocks] = assign_blocks(model, value_blocks) if model is not None else {}
        super().__init__(params, defaults)
        if is_first_rank():
            names = {name for group in self.param_groups for name in group["param_names"]}
            trained = {name: blocks for name, blocks in self.blocks.items() if name in names}
            logger.info("%s blocks:\n%s", type(self).__name__, format_assignment(trained))

    @classmethod
    def from_model(cls, model: nn.Module, params: Iterable | None = None, **hyper_parameters):
        """Build the optimizer for a model, whose structure tells heads, rows and layers.

        params: the model's parameters to train, or param groups of them; by default all that require gradients, in two
        groups: matrices, and biases and norms (all with fewer than two dimensions), which get no weight decay.

        Raises ValueError for an unknown hyper-parameter, one out of range, or a parameter that is not the model's.
        """
        check_hyper_parameter_names(cls, hyper_parameters)
        return cls(named_groups(model, params), model=model, **hyper_parameters)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "param_names" not in group:
            raise ValueError(
                f"{type(self).__name__} needs the parameters' names. Pass model.named_parameters(), or build it with "
                f"{type(self).__name__}.from_model(model, ...)."
            )
        group[METHOD_KEY] = type(self).__name__
        if any("_fsdp_wrapped_module" in name or "_flat_param" in name for name in group["param_names"]):
            refuse(type(self).__name__, "fsdp1")
        self.check_group(group)
        if self._model is None:
            shapes = dict(zip(group["param_names"], map(full_shape, group["params"]), strict=True))
            self.blocks |= assign_blocks_by_name(shapes, self._head_dim, self._value_blocks)

    def check_group(self, group: dict) -> None:
        """Raise ValueError for a hyper-parameter of a param group that is out of range."""
        raise NotImplementedError

    def bind(self, placement: Placement) -> None:
        """Tell where an engine has laid the parameters. Called by the engine after it has replaced param_groups."""
        self._placement = placement
        self._bound = True
        self._plans.clear()

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters of param_groups that have gradients.

        An engine may call this once per param group or sub-group. It is a collective where a rank border cuts a block.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [
            (tensor, name, group)
            for group in self.param_groups
            for tensor, name in zip(group["params"], self._placement.names(group), strict=True)
            if tensor.requires_grad or tensor.grad is not None
        ]
        if active:
            tensors, names, groups = zip(*active, strict=True)
            plan = self._plan(tensors, names)
            for number, tensor in enumerate(tensors):
                if tensor.grad is not None and tensor.grad.is_sparse:
                    raise ValueError(
                        f"{names[number]} has a sparse gradient, but {type(self).__name__} needs dense ones. Build the "
                        "embedding with sparse=False."
                    )
                if tensor.grad is not None and not self.state[tensor]:
                    self._init_state(tensor, plan, number)
            self.update(tensors, groups, plan)
        return loss

    def update(self, tensors: tuple[torch.Tensor, ...], groups: tuple[dict, ...], plan: BlockPlan) -> None:
        """Apply one step of the rule to `tensors`; tensors[i] belongs to groups[i] and decomposes as plan says."""
        raise NotImplementedError

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's elements of a tensor, its gradient or one of its states, 1-D."""
        return self._placement.local(tensor)

    def _init_state(self, tensor: torch.Tensor, plan: BlockPlan, number: int) -> None:
        state = self.state[tensor]
        # On the CPU, as torch's optimizers keep it: reading it costs no synchronisation.
        state["step"] = torch.zeros((), dtype=torch.float32)
        dtype = step_dtype(tensor.dtype)
        for key in self.element_states:
            state[key] = self._placement.new_state(tensor, None, self.element_dtype or dtype)
        for key in self.block_states:
            lengths = (plan.num_blocks[number], plan.most_blocks[number])
            state[key] = self._placement.new_state(tensor, lengths, dtype)

    def _plan(self, tensors: tuple[torch.Tensor, ...], names: tuple[str | None, ...]) -> BlockPlan:
        # Keyed by identity, not held: FSDP2 and offload replace parameters, and a stale one must be free to go.
        key = tuple(map(id, tensors))
        if key not in self._plans:
            self._check_tensors(tensors, names)
            layout = self._placement.layout(tensors, names)
            plan = BlockPlan(layout, self.blocks, names, tensors)
            self._check_state(tensors, plan)
            self._plans[key] = plan
        return self._plans[key]

    def _check_state(self, tensors: tuple[torch.Tensor, ...], plan: BlockPlan) -> None:
        """Raise ValueError where a state that was loaded does not fit the tensors' blocks."""
        for number, tensor in enumerate(tensors):
            for key in self.block_states if self.state.get(tensor) else ():
                held = self.local(self.state[tensor][key]).numel()
                if held not in (plan.num_blocks[number], plan.most_blocks[number]):
                    raise ValueError(
                        f"{key} was loaded with {held} blocks, but the parameters have {plan.num_blocks[number]} on "
                        "this rank. Resume with the model, the hyper-parameters and the number of GPUs of the run that "
                        "saved it."
                    )

    def _check_tensors(self, tensors: tuple[torch.Tensor, ...], names: tuple[str | None, ...]) -> None:
        """Raise ValueError where a tensor is not the parameter that it was when the optimizer was built."""
        model = self._model() if self._model is not None else None
        current = dict(model.named_parameters(remove_duplicate=False)) if model is not None else {}
        for tensor, name in zip(tensors, names, strict=True):
            if name is None:
                continue
            if tuple(tensor.shape) != self.blocks[name].shape:
                raise ValueError(
                    f"The optimizer's tensor for {name} has shape {tuple(tensor.shape)}, the parameter had "
                    f"{self.blocks[name].shape}: an engine replaced it. Call ds_memopt.register() before "
                    "deepspeed.initialize; build the optimizer after any other wrapper that re-shapes parameters."
                )
            if not self._bound and current and current.get(name) is not tensor:
                raise ValueError(
                    f"{name} in the optimizer is no longer the model's parameter: the model's parameters were replaced "
                    f"after {type(self).__name__} was built, so its steps would change nothing. Build the optimizer "
                    "after fully_shard, to_empty or whatever replaced them."
                )

    def named_state(self) -> Iterator[StatePart]:
        """Hand out all state that this rank holds, by parameter name and place in the whole parameter.

        A block that several ranks share is handed out by each of them, with equal values.
        """
        for tensor, name in self._placement.named_tensors(self.param_groups):
            state = self.state.get(tensor)
            if not state:
                continue
            for key, start, place, part in self._state_places(tensor, name):
                values = state["step"].view(1) if key == "step" else self.local(state[key])[place]
                yield StatePart(part, key, start, values)

    @torch.no_grad()
    def load_named_state(self, parts: Iterable[StatePart]) -> None:
        """Take back state that ranks of any number and placement handed out; this rank keeps what it needs of it.

        Raises ValueError, before anything is changed, if an entry that this rank needs is missing or overhangs.
        """
        offered: dict[tuple[str, str], list[StatePart]] = {}
        for part in parts:
            offered.setdefault((part.name, part.key), []).append(part)
        tensors = self._placement.named_tensors(self.param_groups)
        for tensor, name in tensors:
            for key, start, place, part in self._state_places(tensor, name):
                _check_covered(part, key, start, place.stop - place.start, offered.get((part, key), []))
        for tensor, name in tensors:
            if not self.state[tensor]:
                self._init_state(tensor, self._plan((tensor,), (name,)), 0)
            state = self.state[tensor]
            for key, start, place, part in self._state_places(tensor, name):
                target = state["step"].view(1) if key == "step" else self.local(state[key])[place]
                for given in offered[part, key]:
                    low, high = max(start, given.start), min(start + len(target), given.start + len(given.values))
                    if low < high:
                        target[low - start : high - start].copy_(given.values[low - given.start : high - given.start])

    def _state_places(self, tensor: torch.Tensor, name: str | None) -> Iterator[tuple[str, int, slice, str]]:
        """For all states of a tensor: key, first entry in the whole parameter, place in the state, parameter name."""
        for blocks in self._plan((tensor,), (name,)).ranges[0]:
            interval = blocks.interval
            yield "step", 0, slice(0, 1), interval.name
            for key in self.element_states:
                yield key, interval.start, slice(interval.offset, interval.offset + interval.length), interval.name
            for key in self.block_states:
                yield key, blocks.first, slice(blocks.local, blocks.local + blocks.count), interval.name

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep the dtype they were saved in: torch would cast them to the parameters' dtype."""
        super().load_state_dict(state_dict)
        self._plans.clear()
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for number, tensor in zip(saved, tensors, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.dtype != self.state[tensor][key].dtype:
                    self.state[tensor][key] = value.detach().clone().to(tensor.device)


def _check_covered(name: str, key: str, start: int, length: int, offered: list[StatePart]) -> None:
    covered = start
    for part in sorted(offered, key=lambda part: part.start):
        if part.start > covered:
            break
        covered = max(covered, part.start + len(part.values))
    if covered < start + length:
        raise ValueError(
            f"The state offered for {name} lacks {key}[{covered}:{start + length}]. Hand in what all ranks gave out."
        )


def check_hyper_parameter_names(cls: type, given: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of `given` that is no hyper-parameter of the method, with the nearest that is."""
    known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "params", "model")]
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{name!r} is no hyper-parameter of {cls.__name__}.{hint} It takes {', '.join(known)}.")


def named_groups(model: nn.Module, params: Iterable | None) -> list[dict]:
    """Param groups of (name, parameter) pairs from a model's parameters, from groups of them, or from None for all."""
    if params is None:
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [pair for pair in trainable if len(full_shape(pair[1])) > 1]
        vectors = [pair for pair in trainable if len(full_shape(pair[1])) <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    return [group | {"params": [_named(entry, names) for entry in group["params"]]} for group in groups]


def _named(entry: Any, names: Mapping[int, str]) -> tuple[str, torch.Tensor]:
    parameter = entry[1] if isinstance(entry, tuple) else entry
    if id(parameter) not in names:
        raise ValueError(
            f"A parameter of shape {tuple(parameter.shape)} to be trained is not among the model's: its parameters "
            "were replaced after they were listed. List model.parameters() after the last wrapper that replaces them."
        )
    return names[id(parameter)], parameter


def check_range(name: str, value: Any, valid: bool, limit: str, remedy: str) -> None:
    """Raise ValueError with the value, the limit and the remedy unless valid."""
    if not valid:
        raise ValueError(f"{name}={value!r} is out of range: it must be {limit}. {remedy}")


def is_number(value: Any) -> bool:
    """Whether a hyper-parameter is a real number: JSON may hold a string where a number is meant."""
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)
