"""BAdam: Adam on one block of parameters at a time, with all other blocks frozen.

Source: Luo, Yu, Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models", NeurIPS
2024 (arXiv 2404.02827), Algorithm 1.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ds_memopt.blocks import ParamBlocks, bare_parameters, full_shape, partition_into_blocks
from ds_memopt.optimizers.adam_mini import AdamMini
from ds_memopt.optimizers.adamw import AdamW
from ds_memopt.optimizers.base.hyper_parameters import (
    CHECKED_BY_ITS_USER,
    AdamHyperParameters,
    check_hyper_parameters,
    check_range,
    choice,
    either,
    flag,
    hyper_parameter,
    integer,
    patterns,
)
from ds_memopt.optimizers.base.named_optimizer import make_log_visible
from ds_memopt.optimizers.base.named_state import STATE_KEY, StatePart, check_meaning
from ds_memopt.optimizers.block_state.sharded_optimizer import OptimizerCall, ShardedOptimizer
from ds_memopt.optimizers.block_state.storage import REMAINDER, Kept
from ds_memopt.optimizers.gwt import GWT
from ds_memopt.optimizers.rotation.kept_residuals import RESIDUAL, KeptResiduals
from ds_memopt.optimizers.rotation.visit_order import ORDERS, USUAL_SWITCH_EVERY, Rotation, automatic_switch_every
from ds_memopt.shards import Placement, is_first_rank, numel_of, trainable_parameters_changed
from ds_memopt.support import refuse

from .rotation.block_guard import BlockGuard

logger = logging.getLogger("ds_memopt")

BASES: dict[str, type[ShardedOptimizer]] = {"adamw": AdamW, "adam_mini": AdamMini, "gwt": GWT}
"""The rules that an active block may run."""


class Position(NamedTuple):
    """How far training is: the number of the visit, from 0, and the steps that were made in it."""

    visit: int
    visit_step: int


@dataclass(frozen=True, kw_only=True)
class BAdamHyperParameters(AdamHyperParameters):
    """Those of AdamW, and BAdam's own.

    Raises ValueError for a field that its rule does not accept, and for base_options that the base rule does not take.
    """

    switch_every: int | Literal["auto"] = hyper_parameter(
        USUAL_SWITCH_EVERY,
        either(integer(1, None, "50 to 100 is usual."), "auto"),
        "Steps per visit of a block, K; 'auto' is total_steps / D, but from 10 to 100.",
    )
    total_steps: int | None = hyper_parameter(
        None,
        either(integer(1, None, "Leave it out if it is not known."), None),
        "Steps of the whole run, if known. DeepSpeed's scheduler tells it where it has total_num_steps.",
    )
    order: Literal["random", "descending", "ascending", "fixed"] = hyper_parameter(
        "random",
        choice(*ORDERS, remedy="'random' is usual."),
        "'random' (a new permutation for every round through the blocks), 'descending' (from the output down), "
        "'ascending' or 'fixed' (one block for ever).",
    )
    start_block: int | None = hyper_parameter(
        None, CHECKED_BY_ITS_USER, "Number of the first block, except for order='random'."
    )
    blocks: Literal["layer", "sublayer"] | Sequence[Sequence[str]] = hyper_parameter(
        "layer",
        CHECKED_BY_ITS_USER,
        "'layer', 'sublayer' (attention and MLP apart) or lists of regular expressions, one list per block.",
    )
    include_embedding: bool = hyper_parameter(False, flag("false is usual."), "Whether the embedding is a block.")
    include_lm_head: bool = hyper_parameter(
        False, flag("false is usual."), "Whether the final norm with the head is a block."
    )
    always_active: Sequence[str] = hyper_parameter(
        (),
        patterns('Try ["norm"].'),
        "Regular expressions for parameters that train in every block; their state starts anew as well.",
    )
    base: Literal["adamw", "adam_mini", "gwt"] = hyper_parameter(
        "adamw", choice(*BASES, remedy="'adamw' is the paper's."), "Rule of the active block."
    )
    base_options: Mapping[str, Any] | None = hyper_parameter(
        None, CHECKED_BY_ITS_USER, "The base rule's own hyper-parameters."
    )
    keep_residual: bool = hyper_parameter(
        False,
        flag("false is usual."),
        "Keep what rounding to bf16 drops of a block's fp32 masters, in 16 bits per parameter, sharded as they are, so "
        "that updates far below a weight's precision add up over the visits. Not for always_active.",
    )
    seed: int = hyper_parameter(0, integer(0, None, "0 is usual."), "Of the random order.")

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.own_options
        own = isinstance(options, Mapping) and not {*options} & {*self.of_groups()}
        limit = "an object of the base rule's own hyper-parameters"
        check_range("base_options", options, own, limit, "Give lr, betas, eps and weight_decay to BAdam.")
        try:
            check_hyper_parameters(BASES[self.base], options)
        except ValueError as error:
            raise ValueError(f"base_options: {error}") from None
        if (masters := options.get("masters", "fp32")) != "fp32":
            raise ValueError(
                f"base_options: masters={masters!r} is not for BAdam, of whose blocks one has masters at a time. Set "
                "keep_residual to true to keep what rounding would drop."
            )
        if options.get("release_gradients"):
            refuse(BAdam, "release_gradients")

    @property
    def own_options(self) -> Mapping[str, Any]:
        """base_options, empty where there are none."""
        return {} if self.base_options is None else self.base_options


class BAdam(ShardedOptimizer):
    """BAdam under any placement. The parameters are partitioned into D blocks; of these one is active for K =
    switch_every steps of the base rule, with fresh state and bias correction; the others do not require gradients.

    State of the active block only: with base="adamw" 8 bytes per active parameter, and an engine's fp32 master besides.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `BAdam.from_model`.
    model: the model that the parameters belong to. All else: `BAdamHyperParameters`.

    Raises ValueError for a hyper-parameter out of range and for what `partition_into_blocks` refuses.
    """

    hyper_parameters = BAdamHyperParameters
    family, rotates = "rotation", True
    hyper: BAdamHyperParameters

    def __init__(self, params: Iterable, *positional: Any, model: nn.Module | None = None, **named: Any) -> None:
        hyper = self.hyper_parameters.bind(positional, named)
        if model is None:
            raise ValueError("BAdam needs the model, whose layers are its blocks. Use BAdam.from_model(model, ...).")
        groups = list(params)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        groups = [group | {"params": list(group["params"])} for group in groups]
        if not all(isinstance(entry, tuple) for group in groups for entry in group["params"]):
            raise ValueError("BAdam needs the parameters' names. Build it with BAdam.from_model(model, ...).")
        defaults = hyper.of_groups()
        self.rule = BASES[hyper.base]([dict(group) for group in groups], **defaults, **hyper.own_options, model=model)
        self.states = self.rule.states
        self.fused = self.rule.fused
        self.keep_residual = hyper.keep_residual
        self._residuals = KeptResiduals()
        self._stepped = self._warned = False
        super().__init__(groups, *positional, model=model, **named)
        self._pairs = [
            [(name, p) for name, p in zip(group["param_names"], group["params"], strict=True) if p.requires_grad]
            for group in self.param_groups
        ]
        self._groups = list(self.param_groups)
        self.partition = partition_into_blocks(
            model,
            self._named(),
            hyper.blocks,
            hyper.include_embedding,
            hyper.include_lm_head,
            hyper.always_active,
        )
        self._blocks = list(self.partition.blocks)
        self.rotation = Rotation(len(self._blocks), hyper.order, self._first_block(), hyper.seed)
        automatic = hyper.switch_every == "auto"
        self.switch_every = (
            automatic_switch_every(hyper.total_steps, len(self._blocks)) if automatic else hyper.switch_every
        )
        listed = zlib.crc32(repr((self.partition, self.rotation)).encode())
        for group in self.param_groups:
            group[STATE_KEY] = f"BAdam, switch_every {self.switch_every}, rotation {listed:08x}, {group[STATE_KEY]}"
        self._guard = BlockGuard(model, type(self))
        self._log(hyper.total_steps)
        self._activate(Position(0, 0))

    def _first_block(self) -> int:
        last, start, order = len(self._blocks) - 1, self.hyper.start_block, self.hyper.order
        if start is None:
            return last if order == "descending" else 0
        if order == "random":
            raise ValueError(f'start_block={start} has no meaning with order="random". Leave it out.')
        integer(0, last, "Leave it out.").check("start_block", start)
        return start

    def build_structures(self, roles: Mapping[str, ParamBlocks]) -> dict[str, dict[str, ParamBlocks]]:
        return self.rule.structures

    def state_meaning(self) -> str:
        return self.rule.state_meaning()

    def log_structures(self) -> None:
        """Nothing: the base rule has logged its own."""

    def add_param_group(self, param_group: dict) -> None:
        if hasattr(self, "partition"):
            raise ValueError("BAdam's blocks are fixed when it is built: list all parameters there.")
        super().add_param_group(param_group)

    @property
    def position(self) -> Position:
        """Where in the rotation training is; it is saved with the state."""
        return Position(self.param_groups[0]["visit"], self.param_groups[0]["visit_step"])

    passes = None
    """Where backward ends depends on the block."""

    @property
    def active_block(self) -> str:
        """The name of the block that trains."""
        return self._blocks[self.rotation.block(self.position.visit)]

    def names_by_tensor(self) -> dict[torch.Tensor, str]:
        """The name of each parameter that trains now."""
        return {p: name for group in self._pairs for name, p in group if p.requires_grad}

    def keep_all_groups(self) -> None:
        """For DeepSpeed, which takes empty param groups out: put those back that train something in another block."""
        trained = [(group, members) for group, members in zip(self._groups, self._pairs, strict=True) if members]
        self._groups, self._pairs = map(list, zip(*trained, strict=True))
        self.param_groups[:] = self._groups
        for group in self.param_groups:
            active = [pair for pair in zip(group["param_names"], group["params"], strict=True) if pair[1].requires_grad]
            group["params"], group["param_names"] = [p for _, p in active], [name for name, _ in active]

    def trained_parameters(self) -> list[nn.Parameter]:
        """All parameters that train with one block or another."""
        return list(self._named().values())

    def name_of(self, parameter: nn.Parameter) -> str:
        return next(name for name, p in self._named().items() if p is parameter)

    def release(self) -> None:
        """Give the model back: all parameters require gradients that did, and no hook stays on it."""
        for p in self._named().values():
            p.requires_grad_(True)
        self._guard.remove()

    def largest_block(self) -> int:
        """Elements of the largest block, with what is always active."""
        sizes = {name: numel_of(full_shape(p)) for name, p in self._named().items()}
        always = sum(sizes[name] for name in self.partition.always_active)
        return always + max(sum(map(sizes.get, names)) for names in self.partition.blocks.values())

    def trained_by_group(self) -> list[tuple[dict, list[nn.Parameter]]]:
        """Each param group, and all parameters that train in it with one block or another."""
        return [(group, [p for _, p in pairs]) for group, pairs in zip(self.param_groups, self._pairs, strict=True)]

    def bind(self, placement: Placement) -> None:
        """As any optimizer's; called again by the engine for every block."""
        super().bind(placement)
        self._check_residual()
        if self.keep_residual:
            self._residuals.put_back(self._active_intervals(), self.partition.blocks[self.active_block])

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure=None):
        """Update the active block. Without an engine, the next block becomes active after its last step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.bound:
            self._check_residual()
            self._warn_of_rounding()
            self._fill_missing_gradients()
        # What ZeRO was lent gets no state. Its gradient is put back: with offload it is a buffer that ZeRO fills again.
        lent = [
            (tensor, tensor.grad)
            for group in self.param_groups
            if not group["param_names"]
            for tensor in group["params"]
        ]
        for tensor, _ in lent:
            tensor.grad = None
        super().step()
        for tensor, gradient in lent:
            tensor.grad = gradient
        if not self.bound and self.finish_step():
            self.next_block()
            self._make_state()
        return loss

    def kept_states(self) -> dict[str, Kept]:
        """Those of the rule. Masters are the engine's: a block's remainders would be needed for all blocks."""
        return {key: kept for key, kept in self.rule.kept.items() if key != REMAINDER}

    def bytes_moved(self, states: Mapping[torch.Tensor, Mapping[str, torch.Tensor]]) -> int:
        return self.rule.bytes_moved(states)

    def update(self, call: OptimizerCall) -> None:
        self.rule.update(call)
        self._stepped = True

    def finish_step(self) -> bool:
        """Count the training step that just ended, unless it was skipped, and tell whether the visit is over.

        For an engine, which calls `step` once per param group or sub-group, or not at all on an overflow.
        """
        if not self._stepped:
            return False
        self._stepped = False
        position = self.position
        self._set_position(position._replace(visit_step=position.visit_step + 1))
        return position.visit_step + 1 >= self.switch_every and self.rotation.order != "fixed"

    def next_block(self) -> None:
        """End the visit: the next block's parameters take the place of the active ones in param_groups."""
        if self.keep_residual and next(iter(self.names_by_tensor())).dtype != torch.float32:
            # Not of what is always active: with the next block other ranks hold other parts of it.
            self._residuals.keep(self._active_intervals(), self.partition.blocks[self.active_block])
        self._activate(Position(self.position.visit + 1, 0))

    def resume_at(self, position: tuple[int, int]) -> None:
        """Make the block active that was active at `position` of a saved run, with zero state; then load the state.

        Raises ValueError inside DeepSpeed, whose load_checkpoint does both.
        """
        if self.bound:
            raise ValueError("resume_at is for plain PyTorch and FSDP2. With DeepSpeed call engine.load_checkpoint.")
        self.go_to(position)
        self._make_state()

    def go_to(self, position: tuple[int, int]) -> None:
        """Make the block of another position active, with nothing kept of where this run was. For an engine."""
        self._residuals.load(())
        self._activate(Position(*position))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; with keep_residual, also the residuals of the inactive blocks."""
        residuals = {"residuals": [tuple(part) for part in self._residuals.parts()]} if self.keep_residual else {}
        return super().state_dict() | residuals

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's. Without an engine the saved block becomes active; an engine has made it so before."""
        check_meaning(self, state_dict["param_groups"])
        saved = state_dict["param_groups"][0]
        position = Position(saved["visit"], saved["visit_step"])
        if not self.bound:
            self._activate(position)
        assert position.visit == self.position.visit, "the engine has not made the saved block active"
        super().load_state_dict(state_dict)
        self._groups = list(self.param_groups)  # torch has made new ones
        self._residuals.load(StatePart(*part) for part in state_dict.get("residuals", ()))

    @property
    def progress(self) -> dict[str, Any]:
        """What the state means, and the position: state by name is that of the active block."""
        return super().progress | self.position._asdict()

    taken_whole = frozenset({RESIDUAL})
    """Which part of a block this rank will hold, it does not know before the block's visit."""

    def named_state(self) -> Iterator[StatePart]:
        """As any optimizer's, and what is kept of the inactive blocks' rounding."""
        yield from super().named_state()
        yield from self._residuals.parts()

    def load_named_state(self, parts: Iterable[StatePart], progress: Mapping[str, Any] | None = None) -> None:
        """As any optimizer's, for the block that was active at the position in `progress`, or that is active now.

        Raises ValueError inside DeepSpeed where another block is active, which only the engine could change.
        """
        if self.bound and (progress is None or progress["visit"] != self.position.visit):
            raise ValueError(
                "State by name does not say at which position BAdam was, and inside DeepSpeed there is no resume_at: "
                "save and load the run by ds_memopt.save and ds_memopt.load."
            )
        if progress is not None:
            check_meaning(self, [progress])
            if not self.bound:
                self.resume_at((progress["visit"], progress["visit_step"]))
        parts = list(parts)
        super().load_named_state([part for part in parts if part.key != RESIDUAL], progress)
        self._residuals.load(part for part in parts if part.key == RESIDUAL and self.keep_residual)
        if not self.bound:  # these fp32 weights are their own masters
            for name, p in self._named().items():
                interval = self.placement.interval(p, name)
                self._residuals.put_back([(name, interval.start, self.placement.local(p))], [name])

    def _named(self) -> dict[str, nn.Parameter]:
        return dict(pair for group in self._pairs for pair in group)

    def _activate(self, position: Position) -> None:
        active = {*self.partition.blocks[self._blocks[self.rotation.block(position.visit)]]}
        active |= {*self.partition.always_active}
        self._set_position(position)
        for group, members in zip(self.param_groups, self._pairs, strict=True):
            for name, p in members:
                p.requires_grad_(name in active)
                p.grad = None
            listed = [(name, p) for name, p in members if name in active]
            # torch's distributed state dicts cannot tell groups without parameters.
            if members and not listed and not self.bound:
                listed = [min(members, key=lambda member: numel_of(full_shape(member[1])))]
            group["params"], group["param_names"] = [p for _, p in listed], [name for name, _ in listed]
        self.state.clear()
        self._indexes.clear()
        trainable_parameters_changed(self._model())
        self._guard.watch(self.names_by_tensor())

    def _set_position(self, position: Position) -> None:
        for group in self.param_groups:
            group |= position._asdict()

    def _fill_missing_gradients(self) -> None:
        """Missing gradients count as zero, as under ZeRO: an expert without tokens decays like any other."""
        tensors = [tensor for group in self.param_groups for tensor in group["params"] if tensor.requires_grad]
        if all(tensor.grad is None for tensor in tensors):
            # It says so if what trains here is no longer the model's.
            self._index(*zip(*self.placement.named_tensors(self.param_groups), strict=True))
            raise ValueError(
                f"No parameter of the active block, {self.active_block}, has a gradient. Call backward before step; if "
                "it was called, the block took no part in the loss, or the engine was built without ds_memopt."
            )
        for tensor in tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)

    def _warn_of_rounding(self) -> None:
        dtypes = {p.dtype for p in self.names_by_tensor()} - {torch.float32, torch.float64}
        if dtypes and not self._warned and is_first_rank():
            logger.warning(
                "BAdam updates %s weights without fp32 masters: what lies below their precision is lost. Use DeepSpeed "
                "with bf16.enabled, or fp32 weights with torch.autocast or FSDP2's MixedPrecisionPolicy.",
                " and ".join(map(str, dtypes)),
            )
        self._warned = True

    def _check_residual(self) -> None:
        dtypes = {p.dtype for p in self.names_by_tensor()}
        if self.keep_residual and dtypes != {torch.float32} and not (self.bound and dtypes == {torch.bfloat16}):
            raise ValueError(
                f"keep_residual=True needs bf16 weights and DeepSpeed's fp32 masters of them, not {dtypes} "
                f"{'under' if self.bound else 'without'} an engine. Set bf16.enabled, or keep_residual to false."
            )

    def _active_intervals(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """This rank's interval of each active parameter: name, first element, master."""
        tensors, names = zip(*self.placement.named_tensors(self.param_groups), strict=True)
        for interval in self.placement.layout(tensors, names).intervals:
            elements = slice(interval.offset, interval.offset + interval.length)
            yield interval.name, interval.start, self.placement.local(tensors[interval.tensor])[elements]

    def _log(self, total_steps: int | None) -> None:
        if not is_first_rank():
            return
        make_log_visible()
        sizes = {name: numel_of(full_shape(p)) for name, p in self._named().items()}
        lines = [f"  {name}: {sum(map(sizes.get, names)):,}" for name, names in self.partition.blocks.items()]
        logger.info(
            "BAdam, %d blocks of %s steps each, %s order; parameters:\n%s",
            len(lines), self.switch_every, self.rotation.order, "\n".join(lines),
        )  # fmt: skip
        others = [n for n, p in bare_parameters(self._model()).items() if p.requires_grad and n not in sizes]
        if others:
            logger.warning("BAdam was not given %s: backward reaches them at every step.", ", ".join(others))
        if never := self.partition.never_trained:
            share = sum(map(sizes.get, never)) / sum(sizes.values())
            logger.warning(
                "BAdam never trains %s: they are in no block, %.0f %% of all.", ", ".join(never), 100 * share
            )
        if total_steps is None or self.rotation.order == "fixed":
            return
        visits = min(-(-total_steps // self.switch_every), self.rotation.num_blocks)
        visited = set(map(self.rotation.block, range(visits)))
        untrained = [name for number, name in enumerate(self._blocks) if number not in visited]
        if untrained:
            enough = total_steps // len(self._blocks)
            logger.warning(
                "BAdam: %d steps are fewer than %d blocks x %d; never trained: %s. %s.",
                total_steps, len(self._blocks), self.switch_every, ", ".join(untrained),
                f"Lower switch_every to {enough} or less" if enough else f"Train {len(self._blocks)} steps or more",
            )  # fmt: skip
