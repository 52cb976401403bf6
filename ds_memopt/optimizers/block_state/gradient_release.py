"""Steps that are made while backward goes on, and gradients that are freed at once: there is never a set of them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from ds_memopt.optimizers.base.hyper_parameters import HyperParameters, flag, hyper_parameter
from ds_memopt.shards import is_first_rank, reduced_together

if TYPE_CHECKING:
    from ds_memopt.optimizers.block_state.sharded_optimizer import ShardedOptimizer

logger = logging.getLogger("ds_memopt")

Active = list[tuple[torch.Tensor, str | None, dict]]
"""Tensors that train, each with its name and its param group."""

HELD_BY_DDP = (
    "release_gradients=True frees gradients that DistributedDataParallel holds, before it has averaged them. Set it to "
    "false, or shard the model by FSDP2."
)


@dataclass(frozen=True, kw_only=True)
class ReleaseHyperParameters(HyperParameters):
    """That of every method whose step may be made inside backward."""

    release_gradients: bool = hyper_parameter(
        False,
        flag("false is usual."),
        "Update each parameter inside backward, as soon as its gradient is complete, and free the gradient. In plain "
        "PyTorch and under FSDP2. Gradients are then neither clipped, which needs all of them, nor accumulated.",
    )


class Entry(NamedTuple):
    """group: number of the param group, because `load_state_dict` makes new ones."""

    tensor: torch.Tensor
    name: str
    group: int


@dataclass(eq=False)
class Bucket:
    """Parameters that are updated together; arrived: those whose gradients are there, in this step."""

    entries: list[Entry]
    arrived: set[torch.Tensor] = field(default_factory=set)
    updated: bool = False


class GradientRelease:
    """Hooks by which an optimizer updates a bucket of parameters as soon as backward has completed its gradients.

    A bucket is what FSDP2 reduces together, whose gradients share memory; elsewhere it is one parameter. Each bucket
    takes part once in a step: in backward, or in `step` if some of its parameters that train got no gradient. Its sums
    over ranks follow FSDP2's own reduction of it, so that all ranks have them in the same order.

    optimizer: it is not kept alive, and without it the hooks do nothing.
    """

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[torch.Tensor, Bucket] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.watch(range(len(optimizer.param_groups)))
        if is_first_rank():  # nobody asks this optimizer before clipping
            logger.warning(
                "%s uses gradients up inside backward: clip_grad_norm_, and Trainer's max_grad_norm, find none and do "
                "nothing.",
                type(optimizer).__name__,
            )

    def watch(self, groups: Iterable[int]) -> None:
        """Take the gradients of these param groups' parameters, as far as they train now.

        Raises ValueError in DistributedDataParallel and for fp16 weights.
        """
        optimizer = self._optimizer()
        model = optimizer.the_model()
        if model is not None and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(HELD_BY_DDP)
        entries = {}
        for number in groups:
            group = optimizer.param_groups[number]
            for tensor, name in zip(group["params"], group["param_names"], strict=True):
                if tensor.requires_grad:
                    entries[tensor] = Entry(tensor, name, number)
        for tensor, name, _ in entries.values():
            if tensor.dtype == torch.float16:
                raise ValueError(
                    f"release_gradients=True cannot take back a step whose gradients overflow, and {name} is fp16. Set "
                    "it to false, or train in bf16."
                )
        together = reduced_together(model) if model is not None else []
        members = [[entries.pop(p) for p in parameters if p in entries] for parameters in together]
        members += [[entry] for entry in entries.values()]
        hook = _hook_of(self)
        for bucket in (Bucket(entries) for entries in members if entries):
            self._buckets.append(bucket)
            for tensor, _, _ in bucket.entries:
                self._bucket_of[tensor] = bucket
                self._handles.append(tensor.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Take all hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._buckets, self._bucket_of, self._handles = [], {}, []

    def take(self, parameter: torch.Tensor) -> None:
        """Called in backward when a gradient is complete."""
        bucket, optimizer = self._bucket_of[parameter], self._optimizer()
        if parameter in bucket.arrived:
            name = next(entry.name for entry in bucket.entries if entry.tensor is parameter)
            raise ValueError(
                f"{name} got a second gradient before step(), but release_gradients=True has used up the first. Call "
                "step() after every backward: accumulate over 1 micro-batch, and make that larger, which with "
                "activation checkpointing takes little more memory. Under FSDP2 let a module run once in each forward. "
                "Or set release_gradients to false."
            )
        if parameter.grad is None:
            raise ValueError(
                "Another optimizer with release_gradients=True has used a gradient up. Call release() of that one."
            )
        bucket.arrived.add(parameter)
        active = [(e.tensor, e.name, optimizer.param_groups[e.group]) for e in bucket.entries if e.tensor.requires_grad]
        if all(tensor in bucket.arrived for tensor, _, _ in active):
            optimizer.step_on(active)
            bucket.updated = True
            for tensor, _, _ in active:
                tensor.grad = None

    def left(self, active: Active) -> list[Active]:
        """End a step: what backward has not updated of all that trains, bucket by bucket."""
        rest, parts = {entry[0]: entry for entry in active}, []
        for bucket in self._buckets:
            part = [rest.pop(entry.tensor) for entry in bucket.entries if entry.tensor in rest]
            if not bucket.updated and part:
                parts.append(part)
            elif any(tensor.grad is not None for tensor, _, _ in part):  # it alone puts them back
                raise ValueError(HELD_BY_DDP)
            bucket.updated = False
            bucket.arrived.clear()
        return [*parts, list(rest.values())] if rest else parts


def _hook_of(release: GradientRelease) -> Callable[[torch.Tensor], None]:
    """A parameter holds its hooks, and would hold the optimizer with them."""
    reference = weakref.WeakMethod(release.take)

    @torch.compiler.disable
    @torch.no_grad()
    def hook(parameter: torch.Tensor) -> None:
        take = reference()
        if take is not None:
            take(parameter)

    return hook
