"""What all methods share: named parameters, checked hyper-parameters, a placement, and state by parameter name."""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
from ds_memopt.kernels import Storage
from ds_memopt.optimizers.base.named_optimizer import NamedOptimizer, asks_for_state, make_log_visible
from ds_memopt.optimizers.base.named_state import STATE_KEY, StatePart, check_meaning
from ds_memopt.optimizers.base.naming import check_current
from ds_memopt.optimizers.block_state.block_index import BlockIndex, step_dtype
from ds_memopt.optimizers.block_state.gradient_release import Active, GradientRelease
from ds_memopt.optimizers.block_state.storage import (
    ELEMENT,
    REMAINDER,
    Kept,
    StateLayout,
    Unpacked,
    check_masters,
    element_blocks,
    groups_of,
    intervals_of,
    is_code,
    kept_of,
    packings_of,
    scale_key,
    segments_of,
    tell_of_remainders,
)
from ds_memopt.shards import Placement, PlainPlacement, is_first_rank

logger = logging.getLogger("ds_memopt")

Scalars = TypeVar("Scalars")


@dataclass(frozen=True)
class OptimizerCall:
    """What one call of `step` updates, by number of tensor: only those that have a gradient, this rank's part of each.

    parameters, gradients, and states of one entry per element: contiguous, of one shape, 1-D or an engine's own. Views
    of hundreds of tensors would take longer than all else in a step but the arithmetic. states: by key; the others are
    1-D, or [blocks, width] where a state has several numbers per block. groups: each one's param group. indexes: for
    each structure the blocks of all tensors, of those without a gradient, too. storage: how parameters and states are
    kept, if some are in fewer bits.
    """

    parameters: dict[int, torch.Tensor]
    gradients: dict[int, torch.Tensor]
    states: dict[int, dict[str, torch.Tensor]]
    groups: dict[int, dict]
    indexes: Mapping[str, BlockIndex]
    storage: Storage | None = None

    def state(self, key: str) -> dict[int, torch.Tensor]:
        """One state of all tensors."""
        return {number: state[key] for number, state in self.states.items()}

    def advance(self) -> dict[int, float]:
        """Count this step, and tell each tensor's number of it, from 1."""
        steps = self.state("step")
        if steps:
            # A list of ones is added in a third of the time that a number takes.
            torch._foreach_add_(list(steps.values()), [torch.ones(())] * len(steps))
        return {number: step.item() for number, step in steps.items()}

    def scalars(self, at: Callable[[float, dict], Scalars]) -> dict[int, Scalars]:
        """Count this step; for each tensor at(number of its step, its param group), made once where these agree."""
        scalars, made = {}, {}
        for number, step in self.advance().items():
            group = self.groups[number]
            key = step, id(group)
            if key not in made:
                made[key] = at(step, group)
            scalars[number] = made[key]
        return scalars


class ShardedOptimizer(NamedOptimizer):
    """An optimizer whose rule knows which parameter, and which part of it, each of its elements belongs to.

    params: named parameters, as `model.named_parameters()` gives them, or param groups of such pairs.
    model: the model that the parameters belong to; its structure tells the roles. Without it names and shapes must do.

    A subclass names in `states` each tensor of its state and how it is laid; it cuts the parameters into the structures
    whose blocks it needs in `build_structures`, and implements `update`. In `configure` it may set what follows,
    `states` and whatever it makes of its hyper-parameters.

    Another optimizer may run the rule, as BAdam does in its active block. It takes over `states`, `kept`, `structures`
    and `state_meaning()`, keeps the state itself, and hands `update` its own calls, whose param groups have the rule's
    hyper-parameters.

    kept: what is kept of the states and of bf16 weights' masters, by key. Kernels compute in fp32 (fp64 for fp64
    parameters), and keep the results so.
    needs_heads: whether the rule looks at heads, so that without a model `head_dim` must be given.
    fused: whether kernels make the whole step, in one pass over the tensors unless `bytes_moved` says otherwise.
    """

    family = "block state"
    states: Mapping[str, StateLayout] = {}
    needs_heads = False
    fused = False

    def __init__(self, params: Iterable, *positional: Any, model: nn.Module | None = None, **named: Any) -> None:
        self.hyper = self.hyper_parameters.bind(positional, named)
        self.configure()
        self.kept = self.kept_states()
        self._head_dim = getattr(self.hyper, "head_dim", None)
        if model is not None and self._head_dim is not None:
            raise ValueError(f"head_dim={self._head_dim} has no meaning where a model tells its heads. Leave it out.")
        if model is None and self._head_dim is None and not self.needs_heads:
            self._head_dim = 1
        self._value_blocks = getattr(self.hyper, "value_blocks", "rows")
        self.placement = PlainPlacement()
        self._indexes: dict[tuple, tuple[tuple[weakref.ref, ...], dict[str, BlockIndex]]] = {}
        self._model = weakref.ref(model) if model is not None else None
        self.roles: dict[str, ParamBlocks] = assign_blocks(model, self._value_blocks) if model is not None else {}
        self.structures: dict[str, dict[str, ParamBlocks]] = {}
        self._groups_of_entries: dict[str, dict[str, ParamBlocks]] = {}
        self.releases_gradients = getattr(self.hyper, "release_gradients", False)
        self._release: GradientRelease | None = None
        super().__init__(params, self.hyper.of_groups())
        self._rebuild_structures()
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        check_masters(self.kept, self.hyper, tensors, "these are of other dtypes")
        if is_first_rank():
            make_log_visible()
            self.log_structures()
        if self.releases_gradients:
            self._release = GradientRelease(self)

    @classmethod
    def steps_on_bf16(cls, values: Mapping[str, Any]) -> bool:
        return values.get("masters", "fp32") != "fp32"

    def configure(self) -> None:
        """Take what is needed from the hyper-parameters. The parameters are not known yet."""

    def kept_states(self) -> dict[str, Kept]:
        """What is kept of the states. The parameters are not known yet."""
        return kept_of(self.states, self.hyper)

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
        elements = {name: element_blocks(blocks) for name, blocks in self.roles.items() if name in trained}
        self._groups_of_entries = {
            key: {name: groups_of(blocks) for name, blocks in (self.structures.get(layout.structure, elements)).items()}
            for key, layout in ((scale_key(key), layout) for key, layout in self.states.items())
            if key in self.kept
        }
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
        if self._release is not None:
            self._release.watch([len(self.param_groups) - 1])

    def bind(self, placement: Placement) -> None:
        super().bind(placement)
        self._indexes.clear()
        tensors = [tensor for tensor, _ in placement.named_tensors(self.param_groups)]
        check_masters(self.kept, self.hyper, tensors, "the engine holds fp32 masters of them")

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
            for tensor, name in zip(group["params"], self.placement.names(group), strict=True)
            if tensor.requires_grad or tensor.grad is not None
        ]
        only_state = not self.bound and not any(self.state.values()) and asks_for_state(self)
        for part in [active] if self._release is None else self._release.left(active):
            self.step_on(part, only_state)
        return loss

    def step_on(self, active: Active, only_state: bool = False) -> None:
        """Make the step of some tensors that train, or only their state; those without a gradient take part in sums."""
        if not active:
            return
        tensors, names, groups = zip(*active, strict=True)
        indexes = self._index(tensors, names)
        gradients = {n: gradient for n, tensor in enumerate(tensors) if (gradient := tensor.grad) is not None}
        states = {number: self.state[tensors[number]] for number in gradients}
        for number, gradient in gradients.items():
            if gradient.is_sparse:
                raise ValueError(
                    f"{names[number]} has a sparse gradient, but {type(self).__name__} needs dense ones. Build the "
                    "embedding with sparse=False."
                )
            if not states[number]:
                self._init_state(tensors[number], indexes, number)
        if not only_state:
            self.update(self._with_storage(self._call(tensors, gradients, states, groups, indexes)))

    def release(self) -> None:
        super().release()
        if self._release is not None:
            self._release.remove()

    def _with_storage(self, call: OptimizerCall) -> OptimizerCall:
        """The call, with states under their own keys, whatever they are kept in."""
        packings = packings_of(self.states, self.kept, call.states, call.indexes, self.structures)
        remainders = {number: kept[REMAINDER] for number, kept in call.states.items() if REMAINDER in kept}
        if not packings and not remainders:
            return call
        segments = segments_of(ELEMENT, call.indexes, self.structures)
        steps = {number: int(step) + 1 for number, step in call.state("step").items()}
        states = {
            number: kept | {key: packing.kept[number] for key, packing in packings.items()}
            for number, kept in call.states.items()
        }
        return replace(call, states=states, storage=Storage(remainders, segments, packings, steps))

    def step_bytes(self) -> int | None:
        tensors = [tensor for group in self.param_groups for tensor in group["params"] if tensor.grad is not None]
        states = {tensor: self.state[tensor] for tensor in tensors if self.state.get(tensor)}
        return self.bytes_moved(states) if self.fused else None

    def bytes_moved(self, states: Mapping[torch.Tensor, Mapping[str, torch.Tensor]]) -> int:
        """Bytes that a fused step with these tensors, which have gradients, and their states reads and writes: each
        gradient is read, each parameter and state read and written. Left out: what is read twice of shared blocks."""
        local = self.placement.local
        return sum(
            local(tensor.grad).nbytes + 2 * sum(local(part).nbytes for part in (tensor, *self._kept_in(state).values()))
            for tensor, state in states.items()
        )

    def _call(
        self,
        tensors: tuple[torch.Tensor, ...],
        gradients: dict[int, torch.Tensor],
        states: dict[int, dict[str, torch.Tensor]],
        groups: tuple[dict, ...],
        indexes: Mapping[str, BlockIndex],
    ) -> OptimizerCall:
        of_rank = self.placement.stored
        return OptimizerCall(
            {number: of_rank(tensors[number]) for number in gradients},
            {number: of_rank(gradient).contiguous() for number, gradient in gradients.items()},
            self._states_of_rank(states, indexes, of_rank),
            {number: groups[number] for number in gradients},
            indexes,
        )

    def _states_of_rank(
        self,
        states: dict[int, dict[str, torch.Tensor]],
        indexes: Mapping[str, BlockIndex],
        of_rank: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[int, dict[str, torch.Tensor]]:
        views = {number: {"step": state["step"]} for number, state in states.items()}
        for key, ((structure, width, _), _) in self.kept.items():
            num_blocks = None if structure is None else indexes[structure].num_blocks
            for number, state in states.items():
                if key not in state:
                    continue  # a remainder, of fp32 weights
                view = of_rank(state[key])
                # A DTensor is padded to the rank that has most.
                if num_blocks is not None and view.numel() != num_blocks[number] * width:
                    view = view.narrow(0, 0, num_blocks[number] * width)
                views[number][key] = view if width == 1 else view.view(-1, width)
        return views

    def update(self, call: OptimizerCall) -> None:
        """Apply one step of the rule. It touches nothing but what the call holds: another optimizer may run it."""
        raise NotImplementedError

    def _init_state(self, tensor: torch.Tensor, indexes: Mapping[str, BlockIndex], number: int) -> None:
        state, dtype = self.state[tensor], step_dtype(tensor.dtype)
        if tensor.dtype == torch.bfloat16 and REMAINDER in self.kept:
            tell_of_remainders(self.hyper.masters)
        # On the CPU, as torch's optimizers keep it: reading it costs no synchronisation.
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key, ((structure, width, _), kept_dtype) in self.kept.items():
            if key == REMAINDER and tensor.dtype != torch.bfloat16:
                continue
            lengths = None
            if structure is not None:
                index = indexes[structure]
                lengths = index.num_blocks[number] * width, index.most_blocks[number] * width
            state[key] = self.placement.new_state(tensor, lengths, kept_dtype or dtype)

    def _kept_in(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is kept of one tensor's state, by key."""
        return {key: state[key] for key in self.kept if key in state}

    def _index(self, tensors: tuple[torch.Tensor, ...], names: tuple[str | None, ...]) -> dict[str, BlockIndex]:
        # By identity, without a reference: FSDP2 and offload replace parameters, and a stale one must be free to go.
        # With the strides: model.to(memory_format) lays a parameter out anew in place.
        key = tuple((id(tensor), tensor.stride()) for tensor in tensors)
        known, indexes = self._indexes.get(key, ((), None))
        if indexes is None or any(reference() is not tensor for reference, tensor in zip(known, tensors, strict=True)):
            self._check_tensors(tensors, names)
            layout = self.placement.layout(tensors, names)
            assert all(interval.name in self.roles for interval in layout.intervals), "an interval of unknown name"
            indexes = {
                structure: BlockIndex(layout, blocks, names, tensors)
                for structure, blocks in (self.structures | self._groups_of_entries).items()
            }
            self._check_state(tensors, indexes)
            self._indexes[key] = tuple(map(weakref.ref, tensors)), indexes
        return indexes

    def _check_state(self, tensors: tuple[torch.Tensor, ...], indexes: Mapping[str, BlockIndex]) -> None:
        """Raise ValueError where a state that was loaded does not fit the tensors' blocks."""
        for number, tensor in enumerate(tensors):
            for key, value in self._kept_in(self.state.get(tensor, {})).items():
                structure, width, _ = self.kept[key].layout
                if structure is None:
                    continue
                index, loaded = indexes[structure], self.placement.local(value).numel()
                if loaded not in (index.num_blocks[number] * width, index.most_blocks[number] * width):
                    raise ValueError(
                        f"{key} was loaded with {loaded} entries, but the parameters have "
                        f"{index.num_blocks[number] * width} on this rank. Resume with the model, the hyper-parameters "
                        "and the number of GPUs of the run that saved it."
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
            if not self.bound:
                check_current(self, tensor, name, current)

    @property
    def progress(self) -> dict[str, Any]:
        """What the state means. What the run has come to, it says itself: each tensor's "step"."""
        return {STATE_KEY: self.param_groups[0][STATE_KEY]}

    def _make_state(self) -> None:
        """Zeros where there is no state yet. An optimizer without any torch's get_optimizer_state_dict lets step."""
        tensors = self.placement.named_tensors(self.param_groups)
        indexes = self._index(*zip(*tensors, strict=True))
        for number, (tensor, _) in enumerate(tensors):
            if not self.state[tensor]:
                self._init_state(tensor, indexes, number)

    def named_state(self) -> Iterator[StatePart]:
        for parts, _ in self._named_state_by_tensor():
            yield from parts

    def _named_state_by_tensor(self) -> Iterator[tuple[list[StatePart], Unpacked]]:
        """The parts of each tensor, and what of them are copies."""
        for tensor, name in self.placement.named_tensors(self.param_groups):
            if not self.state.get(tensor):
                continue
            indexes = self._index((tensor,), (name,))
            kept = self._states_of_rank({0: self.state[tensor]}, indexes, self.placement.local)[0]
            packings = packings_of(self.states, self.kept, {0: kept}, indexes, self.structures)
            unpacked = Unpacked.of(packings, kept.get(REMAINDER))
            yield list(self._parts_of(kept | unpacked.values, indexes)), unpacked

    def _parts_of(self, values: Mapping[str, torch.Tensor], indexes: Mapping[str, BlockIndex]) -> Iterator[StatePart]:
        intervals = intervals_of(indexes, 0)
        for interval in intervals.values():
            yield StatePart(interval.name, "step", 0, values["step"].view(1))
        layouts = self.states | {key: layout for key, (layout, _) in self.kept.items() if not is_code(key)}
        for key, (structure, width, _) in layouts.items():
            flat = values[key].view(-1) if key in values else None
            if flat is None:
                continue  # a remainder, of fp32 weights
            if structure is None:
                for interval in intervals.values():
                    elements = flat.narrow(0, interval.offset, interval.length)
                    yield StatePart(interval.name, key, interval.start, elements)
                continue
            for part in indexes[structure].intervals[0]:
                of_part = flat.narrow(0, part.local * width, part.count * width)
                yield StatePart(part.interval.name, key, part.first * width, of_part)

    def _state_to_fill(self, offered: Collection[str]) -> tuple[list[StatePart], Callable[[], None]]:
        by_tensor = list(self._named_state_by_tensor())
        optional = {REMAINDER, *map(scale_key, self.states)} - set(offered)
        own = [part for parts, _ in by_tensor for part in parts if part.key not in optional]

        def take_back() -> None:
            for _, unpacked in by_tensor:
                unpacked.take_back(missing=optional)

        return own, take_back

    def _restored(self, tensor: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
        if key not in self.kept:
            return self.state[tensor][key]
        return value.detach().to(tensor.device, self.kept[key].dtype or step_dtype(tensor.dtype)).contiguous()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state must be kept as in the run that saved it, or else be taken over by name.

        Raises ValueError, before anything is changed, for state of another method, of other options, of other blocks,
        or kept otherwise.
        """
        check_meaning(self, state_dict["param_groups"])
        needed = {key for key in self.kept if key != REMAINDER}
        for saved in state_dict["state"].values():
            if missing := sorted(needed - saved.keys()):
                raise ValueError(
                    f"The state was saved with {', '.join(sorted(saved))}, but {type(self).__name__} keeps "
                    f"{missing[0]}. Set state_dtype and masters as in the run that saved it, or take its state over by "
                    "name, with named_state() and load_named_state()."
                )
        super().load_state_dict(state_dict)

    def _loaded(self) -> None:
        self._indexes.clear()
