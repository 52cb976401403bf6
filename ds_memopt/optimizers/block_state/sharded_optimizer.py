"""What all methods share: named parameters, checked hyper-parameters, a placement, and state by parameter name."""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ds_memopt.blocks import (
    ParamBlocks,
    assign_blocks,
    assign_blocks_by_name,
    bare_parameters,
    format_assignment,
    full_shape,
)
from ds_memopt.optimizers.base.named_optimizer import NamedOptimizer, asks_for_state, make_log_visible
from ds_memopt.optimizers.base.named_state import STATE_KEY, StatePart, check_covered, check_meaning
from ds_memopt.optimizers.base.naming import check_current
from ds_memopt.optimizers.block_state.block_index import BlockPlan, step_dtype
from ds_memopt.shards import Placement, PlainPlacement, is_first_rank

logger = logging.getLogger("ds_memopt")


ELEMENT = "element"
"""The structure of a state that has one entry per element and is laid like the parameter itself."""


class ShardedOptimizer(NamedOptimizer):
    """An optimizer whose rule knows which parameter, and which part of it, each of its elements belongs to.

    params: named parameters, as `model.named_parameters()` gives them, or param groups of such pairs.
    model: the model that the parameters belong to; its structure tells the roles. Without it names and shapes must do.

    A subclass names in `states` each tensor of its state and the structure whose blocks it has one entry of, or
    ELEMENT; it cuts the parameters into those structures in `build_structures`, and implements `update`. In
    `configure` it may set what follows, `states` and whatever it makes of its hyper-parameters.

    element_dtype: how states of one entry per element are kept; by default in fp32 (fp64 for fp64 parameters).
    needs_heads: whether the rule looks at heads, so that without a model `head_dim` must be given.
    """

    family = "block state"
    states: Mapping[str, str] = {}
    element_dtype: torch.dtype | None = None
    needs_heads = False

    def __init__(self, params: Iterable, *positional: Any, model: nn.Module | None = None, **named: Any) -> None:
        self.hyper = self.hyper_parameters.bind(positional, named)
        self.configure()
        self._head_dim = getattr(self.hyper, "head_dim", None)
        if model is not None and self._head_dim is not None:
            raise ValueError(f"head_dim={self._head_dim} has no meaning where a model tells its heads. Leave it out.")
        if model is None and self._head_dim is None and not self.needs_heads:
            self._head_dim = 1
        self._value_blocks = getattr(self.hyper, "value_blocks", "rows")
        self._placement: Placement = PlainPlacement()
        self._bound = False
        self._plans: dict[tuple, tuple[tuple[weakref.ref, ...], dict[str, BlockPlan]]] = {}
        self._model = weakref.ref(model) if model is not None else None
        self.roles: dict[str, ParamBlocks] = assign_blocks(model, self._value_blocks) if model is not None else {}
        self.structures: dict[str, dict[str, ParamBlocks]] = {}
        super().__init__(params, self.hyper.of_groups())
        self._rebuild_structures()
        if is_first_rank():
            make_log_visible()
            self.log_structures()

    def configure(self) -> None:
        """Take what is needed from the hyper-parameters. The parameters are not known yet."""

    def the_model(self) -> nn.Module | None:
        return self._model() if self._model is not None else None

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        """For each structure that the rule needs, how it cuts each parameter. roles: what each parameter is."""
        raise NotImplementedError

    def log_structures(self) -> None:
        """Log once, on rank 0, how the parameters are cut."""
        for name, structure in self.structures.items():
            logger.info("%s, %ss:\n%s", type(self).__name__, name, format_assignment(structure))

    def _rebuild_structures(self) -> None:
        trained = {name for group in self.param_groups for name in group["param_names"]}
        self.structures = self.build_structures({name: self.roles[name] for name in self.roles if name in trained})
        meaning = f"{self.state_meaning()}, blocks {zlib.crc32(repr(self.structures).encode()):08x}"
        for group in self.param_groups:
            group[STATE_KEY] = meaning

    def state_meaning(self) -> str:
        """What the state holds, as far as the method's options change it: state of another meaning is not loaded."""
        return type(self).__name__

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._model is None:
            shapes = dict(zip(group["param_names"], map(full_shape, group["params"]), strict=True))
            self.roles |= assign_blocks_by_name(shapes, self._head_dim, self._value_blocks)
        elif unknown := [name for name in group["param_names"] if name not in self.roles]:
            raise ValueError(
                f"{unknown[0]!r} is no parameter of the model, which has {next(iter(self.roles), None)!r} and others. "
                "List the parameters of the model itself."
            )
        if self.structures:
            self._rebuild_structures()

    def bind(self, placement: Placement) -> None:
        """Tell where an engine has laid the parameters. Called by the engine after it has replaced param_groups."""
        self._placement = placement
        self._bound = True
        self._plans.clear()

    @torch.compiler.disable
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
            plans = self._plan(tensors, names)
            fresh = not self._bound and not any(self.state.values())
            for number, tensor in enumerate(tensors):
                if tensor.grad is not None and tensor.grad.is_sparse:
                    raise ValueError(
                        f"{names[number]} has a sparse gradient, but {type(self).__name__} needs dense ones. Build the "
                        "embedding with sparse=False."
                    )
                if tensor.grad is not None and not self.state[tensor]:
                    self._init_state(tensor, plans, number)
            if not (fresh and asks_for_state(self)):
                self.update(tensors, groups, plans)
        return loss

    def update(
        self, tensors: tuple[torch.Tensor, ...], groups: tuple[dict, ...], plans: Mapping[str, BlockPlan]
    ) -> None:
        """Apply one step of the rule to `tensors`; tensors[i] belongs to groups[i], plans tell each structure's cut."""
        raise NotImplementedError

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's elements of a tensor, its gradient or one of its states, 1-D."""
        return self._placement.local(tensor)

    def block_state(self, tensor: torch.Tensor, key: str, count: int) -> torch.Tensor:
        """This rank's `count` entries of a per-block state: a DTensor is padded to the rank that has most."""
        return self.local(self.state[tensor][key]).narrow(0, 0, count)

    def _init_state(self, tensor: torch.Tensor, plans: Mapping[str, BlockPlan], number: int) -> None:
        state, dtype = self.state[tensor], step_dtype(tensor.dtype)
        # On the CPU, as torch's optimizers keep it: reading it costs no synchronisation.
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key, structure in self.states.items():
            if structure == ELEMENT:
                state[key] = self._placement.new_state(tensor, None, self.element_dtype or dtype)
            else:
                lengths = plans[structure].num_blocks[number], plans[structure].most_blocks[number]
                state[key] = self._placement.new_state(tensor, lengths, dtype)

    def _plan(self, tensors: tuple[torch.Tensor, ...], names: tuple[str | None, ...]) -> dict[str, BlockPlan]:
        # Keyed by identity, not held: FSDP2 and offload replace parameters, and a stale one must be free to go.
        # With the strides: model.to(memory_format) lays a parameter out anew in place.
        key = tuple((id(tensor), tensor.stride()) for tensor in tensors)
        held, plans = self._plans.get(key, ((), None))
        if plans is None or any(reference() is not tensor for reference, tensor in zip(held, tensors, strict=True)):
            self._check_tensors(tensors, names)
            layout = self._placement.layout(tensors, names)
            assert all(interval.name in self.roles for interval in layout.intervals), "an interval of unknown name"
            plans = {
                structure: BlockPlan(layout, blocks, names, tensors) for structure, blocks in self.structures.items()
            }
            self._check_state(tensors, plans)
            self._plans[key] = tuple(map(weakref.ref, tensors)), plans
        return plans

    def _check_state(self, tensors: tuple[torch.Tensor, ...], plans: Mapping[str, BlockPlan]) -> None:
        """Raise ValueError where a state that was loaded does not fit the tensors' blocks."""
        for number, tensor in enumerate(tensors):
            for key, structure in self.states.items() if self.state.get(tensor) else ():
                if structure == ELEMENT:
                    continue
                plan, held = plans[structure], self.local(self.state[tensor][key]).numel()
                if held not in (plan.num_blocks[number], plan.most_blocks[number]):
                    raise ValueError(
                        f"{key} was loaded with {held} blocks, but the parameters have {plan.num_blocks[number]} on "
                        "this rank. Resume with the model, the hyper-parameters and the number of GPUs of the run that "
                        "saved it."
                    )

    def _check_tensors(self, tensors: tuple[torch.Tensor, ...], names: tuple[str | None, ...]) -> None:
        """Raise ValueError where a tensor is not the parameter that it was when the optimizer was built."""
        model = self.the_model()
        current = bare_parameters(model, remove_duplicate=False) if model is not None else {}
        for tensor, name in zip(tensors, names, strict=True):
            if name is None:
                continue
            if tuple(tensor.shape) != self.roles[name].shape:
                raise ValueError(
                    f"The optimizer's tensor for {name} has shape {tuple(tensor.shape)}, the parameter had "
                    f"{self.roles[name].shape}: an engine replaced it. Call ds_memopt.register() before "
                    "deepspeed.initialize; build the optimizer after any other wrapper that re-shapes parameters."
                )
            if not self._bound:
                check_current(self, tensor, name, current)

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
                check_covered(part, key, start, place.stop - place.start, offered.get((part, key), []))
        for tensor, name in tensors:
            if not self.state[tensor]:
                self._init_state(tensor, self._plan((tensor,), (name,)), 0)
            state = self.state[tensor]
            for key, start, place, part in self._state_places(tensor, name):
                target = state["step"].view(1) if key == "step" else self.local(state[key])[place]
                for given in offered[part, key]:
                    given.copy_to(target, start)

    def _state_places(self, tensor: torch.Tensor, name: str | None) -> Iterator[tuple[str, int, slice, str]]:
        """For all states of a tensor: key, first entry in the whole parameter, place in the state, parameter name."""
        plans = self._plan((tensor,), (name,))
        intervals = {held.interval.name: held.interval for plan in plans.values() for held in plan.held[0]}
        for part, interval in intervals.items():
            yield "step", 0, slice(0, 1), part
            for key, structure in self.states.items():
                if structure == ELEMENT:
                    yield key, interval.start, slice(interval.offset, interval.offset + interval.length), part
        for key, structure in self.states.items():
            for held in plans[structure].held[0] if structure != ELEMENT else ():
                yield key, held.first, slice(held.local, held.local + held.count), held.interval.name

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states have the dtype that this keeps them in; torch would cast them to the weights'.

        Raises ValueError, before anything is changed, for state of another method, of other options or of other blocks.
        """
        check_meaning(self, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        self._plans.clear()
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for number, tensor in zip(saved, tensors, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key in self.states:
                    dtype = self.element_dtype if self.states[key] == ELEMENT else None
                    self.state[tensor][key] = value.detach().to(tensor.device, dtype or step_dtype(tensor.dtype))
