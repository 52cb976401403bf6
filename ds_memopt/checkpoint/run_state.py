"""What a run has come to, whatever engine it is in: taken from it piece by piece, and given back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_memopt.blocks import bare_name, bare_parameters, full_shape
from ds_memopt.checkpoint.foreign_state import ForeignState, the_number
from ds_memopt.checkpoint.part_files import PartFiles, key_in_file
from ds_memopt.checkpoint.part_index import BUFFER, WEIGHT, Index
from ds_memopt.engines.adapter import adapter_of
from ds_memopt.engines.held_tensors import (
    Held,
    OptimizerTensor,
    masters,
    optimizer_tensors,
    refuse_unportable,
    stored_weights,
)
from ds_memopt.kernels import add_residual_, residual_of
from ds_memopt.optimizers import StatePart, capabilities_of, check_meaning
from ds_memopt.optimizers.block_state.storage import REMAINDER
from ds_memopt.shards import is_first_rank

logger = logging.getLogger("ds_memopt")

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaler of fp16 has learnt."""


@dataclass
class Run:
    """A model and its optimizer, in an engine or not.

    optimizer: the method itself. wrapper: DeepSpeed's object around it. engine: DeepSpeed's, or ours of FSDP2.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    engine: Any = None
    wrapper: Any = None

    @classmethod
    def of(cls, target: Any) -> Run:
        """target: an engine, (model, optimizer) or (model, optimizer, lr_scheduler).

        Raises ValueError for anything else, and for an engine whose state no name and interval tells.
        """
        if isinstance(target, tuple) and len(target) in (2, 3) and isinstance(target[1], torch.optim.Optimizer):
            return cls(*target)
        optimizer = getattr(target, "basic_optimizer", None)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"A checkpoint is made of an engine with an optimizer, of (model, optimizer) or of (model, optimizer, "
                f"lr_scheduler), not of {type(target).__name__}."
            )
        wrapper = None if target.optimizer is optimizer else target.optimizer
        if hasattr(target, "zero_optimization_stage"):
            refuse_unportable(target)
        return cls(target.module, optimizer, target.lr_scheduler, target, wrapper)

    @property
    def ours(self) -> bool:
        return capabilities_of(self.optimizer).family is not None

    @property
    def foreign(self) -> ForeignState:
        """The state of an optimizer that is none of ours."""
        return ForeignState(self.optimizer, self._tensors())

    def engine_name(self) -> str:
        if hasattr(self.engine, "zero_optimization_stage"):
            return f"DeepSpeed, ZeRO-{self.engine.zero_optimization_stage()}"
        return "FSDP2" if any(hasattr(p, "to_local") for p in self.model.parameters()) else "PyTorch"

    def shapes(self) -> dict[str, list[int]]:
        """Of all whole parameters and saved buffers."""
        named = {**bare_parameters(self.model), **self._buffers()}
        return {name: list(full_shape(tensor)) for name, tensor in named.items()}

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Those that belong to the model; others are computed anew."""
        holders = dict(self.model.named_modules())
        saved = {}
        for name, buffer in self.model.named_buffers():
            path, _, own = name.rpartition(".")
            if own not in holders[path]._non_persistent_buffers_set:
                saved[bare_name(name, self.model)] = buffer
        return saved

    # --- what is saved ---

    def weights(self) -> Iterator[tuple[StatePart, bool]]:
        """What this rank holds of weights and buffers, and whether it is of the masters."""
        for name, buffer in self._buffers().items():
            yield StatePart(name, BUFFER, 0, buffer.detach().reshape(-1)), False
        for held in stored_weights(self.model):
            yield StatePart(held.name, WEIGHT, held.start, held.values), False
        for held in masters(self.model, self.optimizer, self.wrapper):
            yield StatePart(held.name, WEIGHT, held.start, held.values), True

    def states(self) -> Iterator[StatePart]:
        """What this rank holds of the optimizer's state; of ours zeros, where no step has made any yet."""
        if not self.ours:
            return self.foreign.parts()
        self.optimizer._make_state()
        return self.optimizer.named_state()

    def parts(self) -> Iterator[tuple[StatePart, bool]]:
        """Everything that this rank holds, in the same order at every call."""
        yield from self.weights()
        for part in self.states():
            yield part, False

    def progress(self) -> dict[str, Any]:
        return self.optimizer.progress if self.ours else self.foreign.progress()

    def groups(self) -> list[dict[str, Any]]:
        """The numbers in each param group, such as its learning rate, which schedulers move."""
        told = {"params", "param_names", *self.progress()}
        return [
            {key: value for key, value in group.items() if key not in told and _is_number(value)}
            for group in self.optimizer.param_groups
        ]

    def loss_scale(self) -> dict[str, Any]:
        return {name: getattr(self._scaler(), name) for name in LOSS_SCALE if hasattr(self._scaler(), name)}

    def _scaler(self) -> Any:
        return getattr(self.wrapper, "loss_scaler", self.wrapper)

    def scheduler_state(self) -> dict[str, Any] | None:
        """Raises ValueError where it is no JSON."""
        if self.scheduler is None:
            return None
        try:
            return json.loads(json.dumps(self.scheduler.state_dict()))
        except TypeError as error:
            raise ValueError(
                f"The state of {type(self.scheduler).__name__} is no JSON: {error}. Give a scheduler whose "
                "state_dict() holds numbers, words and lists of them."
            ) from error

    def model_config(self) -> dict[str, Any] | None:
        """Of a Hugging Face model, to make a folder of its weights later."""
        config = getattr(self.model, "config", None)
        return json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else None

    # --- what is given back ---

    def check(self, index: Index) -> None:
        """Before anything is changed: raise ValueError for the checkpoint of another model or method."""
        ours = self.shapes()
        for name in [*ours, *index.shapes]:
            if ours.get(name) != index.shapes.get(name):
                raise ValueError(
                    f"The checkpoint was made of another model: {name} has the shape {index.shapes.get(name)} there "
                    f"and {ours.get(name)} here."
                )
        if self.ours:
            check_meaning(self.optimizer, [index.progress])
        else:
            self.foreign.check(index.progress)
        for name, shape in ours.items():
            key = WEIGHT if any(index.parts(name, WEIGHT)) else BUFFER
            index.check_covered(name, key, 0, torch.Size(shape).numel())

    def go_to_block(self, index: Index) -> None:
        """Of a method that trains one block at a time: let it train the one that it trained there. A collective."""
        if "visit" not in index.progress:
            return
        position = index.progress["visit"], index.progress["visit_step"]
        if self.wrapper is None:
            self.optimizer.resume_at(position)
        else:
            adapter_of(self.engine).go_to(self.engine, position)

    def load_weights(self, index: Index, files: PartFiles) -> None:
        """Into the model: 16-bit weights are rounded from masters as an engine does it."""
        buffers = self._buffers()
        for name, buffer in buffers.items():
            held = Held(name, 0, torch.empty_like(buffer).reshape(-1))
            _fill(held, BUFFER, index, files)
            buffer.copy_(held.values.view(buffer.shape))
        exact = self._exact_names()
        rounded: list[str] = []
        for held in stored_weights(self.model):
            dtypes = _fill(held, WEIGHT, index, files)
            if held.name not in exact and any(dtype.itemsize > held.values.dtype.itemsize for dtype in dtypes):
                rounded.append(held.name)
        if rounded and is_first_rank():
            logger.warning(
                "%d parameters, such as %s, are rounded from what the checkpoint has: this run keeps no fp32 of them.",
                len(rounded), rounded[0],
            )  # fmt: skip

    def load_masters(self, index: Index, files: PartFiles) -> None:
        """Into what the optimizer updates, exactly: fp32 also where the checkpoint has bf16 weights and remainders."""
        for held in masters(self.model, self.optimizer, self.wrapper):
            dtypes = _fill(held, WEIGHT, index, files)
            in_two = dtypes == {torch.bfloat16} and REMAINDER in index.keys(held.name)
            if in_two and held.values.dtype == torch.float32:
                remainder = held._replace(values=torch.zeros_like(held.values, dtype=torch.int16))
                _fill(remainder, REMAINDER, index, files)
                add_residual_(held.values, remainder.values)

    def _exact_names(self) -> set[str]:
        """What this run has in fp32: masters by an engine, or remainders beside bf16 weights."""
        if self.ours and not self.optimizer.writes_weights and REMAINDER in self.optimizer.kept:
            return {name for one in self._tensors() for name in one.names}
        if self.wrapper is None or capabilities_of(self.optimizer).writes_weights:
            return set()
        return {name for one in self._tensors() for name in one.names}

    def _tensors(self) -> list[OptimizerTensor]:
        return optimizer_tensors(self.model, self.optimizer, self.wrapper)

    def load_states(self, index: Index, files: PartFiles) -> None:
        """What this rank needs of the optimizer's state and progress. A collective for some methods."""
        if not self.ours:
            self.foreign.load(index, lambda *wanted: _read(index, files, *wanted))
            return
        if not self.optimizer.writes_weights:
            for one in self._tensors():
                if one.intervals:
                    the_number(one, "step", lambda *wanted: _read(index, files, *wanted))
        self.optimizer._make_state()
        wanted = [(part.name, part.key, part.start, part.stop) for part in self.optimizer.named_state()]
        parts = [part for one in wanted for part in _read(index, files, *one)]
        if not index.names(REMAINDER):  # fp32 masters there, bf16 weights and remainders here
            of_weights = (_read(index, files, name, WEIGHT, *place) for name, key, *place in wanted if key == REMAINDER)
            parts += [
                StatePart(part.name, REMAINDER, part.start, residual_of(part.values))
                for found in of_weights for part in found if part.values.dtype == torch.float32
            ]  # fmt: skip
        parts += [
            part for key in self.optimizer.taken_whole for name in index.names(key)
            for part in _read(index, files, name, key)
        ]  # fmt: skip
        self.optimizer.load_named_state(parts, index.progress)

    def load_numbers(self, index: Index) -> None:
        """Learning rates, scheduler, counters."""
        self.load_groups(index.groups)
        if self.scheduler is not None and index.scheduler is not None:
            self.scheduler.load_state_dict(index.scheduler)
        for name, value in index.loss_scale.items() if self.loss_scale() else ():
            setattr(self._scaler(), name, value)
        if self.engine is None:
            return
        self.engine.global_steps = index.step
        if hasattr(self.engine, "gradient_accumulation_steps"):
            self.engine.micro_steps = index.step * self.engine.gradient_accumulation_steps()
            self.engine.global_samples = index.step * self.engine.train_batch_size()
        else:
            self.engine.micro_steps = index.step * self.engine.accumulation

    def load_groups(self, saved: list[dict[str, Any]]) -> None:
        """The numbers in each param group."""
        for group, numbers in zip(self.optimizer.param_groups, self._numbers_of_groups(saved), strict=True):
            group.update(numbers)

    def _numbers_of_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        here = self.optimizer.param_groups
        if len(saved) == len(here):
            return saved
        # Other groups, such as without an empty one: what all of them had is what these shall have.
        shared = {key: value for key, value in saved[0].items() if all(one.get(key) == value for one in saved)}
        if "lr" not in shared:
            raise ValueError(
                f"The checkpoint has {len(saved)} param groups of different learning rates, this optimizer has "
                f"{len(here)}. Build it with the groups of the run that was saved."
            )
        return [shared for _ in here]


def _is_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read(
    index: Index, files: PartFiles, name: str, key: str, start: int = 0, stop: int | None = None
) -> Iterator[StatePart]:
    """What there is of the entries [start, stop), as views of the mapped files."""
    for entry in index.parts(name, key, start, stop):
        low, high = max(start, entry.start), entry.stop if stop is None else min(stop, entry.stop)
        values = files.read(entry.file, key_in_file(name, key, entry.start), low - entry.start, high - entry.start)
        yield StatePart(name, key, low, values)


def _fill(held: Held, key: str, index: Index, files: PartFiles) -> set[torch.dtype]:
    """Copy into a part; returns the dtypes that the checkpoint has of it."""
    stop, dtypes = held.start + len(held.values), set()
    for part in _read(index, files, held.name, key, held.start, stop):
        part.copy_to(StatePart(held.name, key, held.start, held.values))
        dtypes.add(part.values.dtype)
    return dtypes
