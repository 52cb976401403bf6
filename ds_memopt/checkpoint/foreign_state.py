"""The state of optimizers that are none of ours, such as torch's and DeepSpeed's AdamW: per element, or one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ds_memopt.checkpoint.part_index import Index
from ds_memopt.engines.held_tensors import Held, OptimizerTensor
from ds_memopt.optimizers import StatePart
from ds_memopt.optimizers.base.named_state import STATE_KEY

ADAM = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}
"""Classes whose state means the same, so that a run may go on with another of them."""

Read = Callable[[str, str, int, int], Iterable[StatePart]]
"""read(name, key, start, stop): what a checkpoint has of these entries of a state."""


class ForeignState:
    """What such an optimizer keeps, by parameter name and interval.

    tensors: those that it updates on this rank.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: list[OptimizerTensor]) -> None:
        self._optimizer, self._tensors = optimizer, tensors
        self._word = "Adam" if type(optimizer).__name__ in ADAM else type(optimizer).__name__

    def progress(self) -> dict[str, Any]:
        return {STATE_KEY: self._word}

    def check(self, progress: dict[str, Any]) -> None:
        """Raise ValueError for the progress of another method."""
        if progress[STATE_KEY] != self._word:
            raise ValueError(
                f"The checkpoint's optimizer state is of {progress[STATE_KEY]}, this optimizer is "
                f"{type(self._optimizer).__name__}. Resume with the method that saved it."
            )

    def scalars(self) -> set[str]:
        """The keys of the states that are one number for a whole tensor, such as the count of steps."""
        states = self._optimizer.state.values()
        return {key for state in states for key, value in state.items() if _is_scalar(value)}

    def parts(self) -> Iterator[StatePart]:
        """Raises ValueError for a state that is neither one number nor one for each element."""
        for one in self._tensors:
            for key, value in self._optimizer.state.get(one.tensor, {}).items():
                if _is_scalar(value):
                    number = torch.as_tensor(value).reshape(1)
                    yield from (StatePart(interval.name, key, 0, number) for interval in one.intervals)
                    continue
                if not isinstance(value, torch.Tensor) or value.shape != one.tensor.shape:
                    raise ValueError(
                        f"{type(self._optimizer).__name__} keeps {key!r} of {type(value).__name__} "
                        f"{tuple(getattr(value, 'shape', ()))}, which is neither a number nor of its parameter's shape "
                        f"{tuple(one.tensor.shape)}: no interval of it can be saved. Use the engine's own checkpoints."
                    )
                for held in one.views(value):
                    yield StatePart(held.name, key, held.start, held.values)

    @torch.no_grad()
    def load(self, index: Index, read: Read) -> None:
        """Take back what this rank needs. What never had a gradient has no state, and gets none unless it shares a
        tensor with others.

        Raises ValueError where parameters that share a tensor here, and so one count of steps, had different ones.
        """
        for one in self._tensors:
            keys = {key for interval in one.intervals for key in index.keys(interval.name)}
            for key in sorted(keys):
                if key in index.scalars:
                    self._load_scalar(one, key, read)
                    continue
                state = self._optimizer.state[one.tensor]
                if key not in state:
                    state[key] = one.placement.new_state(one.tensor, None, one.tensor.dtype)
                for held in one.views(state[key]):
                    _copy(held, key, index, read)

    def _load_scalar(self, one: OptimizerTensor, key: str, read: Read) -> None:
        number, state = the_number(one, key, read), self._optimizer.state[one.tensor]
        if isinstance(state.get(key), torch.Tensor):
            state[key].fill_(number)
        elif type(self._optimizer).__module__.startswith("torch."):  # torch keeps a tensor, DeepSpeed a number
            options = self._optimizer.defaults
            on_device = options.get("capturable") or options.get("fused")
            state[key] = torch.tensor(float(number), device=one.tensor.device if on_device else "cpu")
        else:
            state[key] = int(number)


def the_number(one: OptimizerTensor, key: str, read: Read) -> float | int:
    """A state that is one number for a tensor. Raises ValueError where a checkpoint has several, or none."""
    numbers = {part.values.item(): part.name for i in one.intervals for part in read(i.name, key, 0, 1)}
    if not numbers:
        raise ValueError(f"the checkpoint lacks {key} of {one.intervals[0].name}: it had made no step with it")
    if len(numbers) > 1:
        (first, of_first), (second, of_second), *_ = numbers.items()
        raise ValueError(
            f"{of_first} has {key} {first} and {of_second} {second} in the checkpoint, but this engine keeps one "
            "number for both. Resume where each parameter has a state of its own: ZeRO-0, FSDP2 or plain PyTorch."
        )
    return next(iter(numbers))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) or isinstance(value, torch.Tensor) and value.ndim == 0


def _copy(held: Held, key: str, index: Index, read: Read) -> None:
    stop = held.start + len(held.values)
    if any(index.parts(held.name, key)):
        index.check_covered(held.name, key, held.start, stop)
    for part in read(held.name, key, held.start, stop):
        part.copy_to(StatePart(held.name, key, held.start, held.values))
