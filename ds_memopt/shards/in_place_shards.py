"""Parameters that a method updates in place, without fp32 masters by an engine: which part of each this rank updates.

Private names used here are in engines/private_names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ds_memopt.shards.layout import Interval, Placement
from ds_memopt.shards.plain_placement import Cut, PlainPlacement
from ds_memopt.shards.seams import collective_device

# Their names before torch 2.13 are the second ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

BUCKET = 2**22
"""Elements of small parameters that are sent together; a larger one is sent by itself, without a copy if it divides."""


@dataclass(frozen=True, eq=False)
class Part(Interval):
    """An interval of one parameter, with the parameter and, 1-D, a view of where these elements of it are stored."""

    parameter: torch.Tensor
    elements: torch.Tensor


class InPlaceShards(Placement, Protocol):
    """A placement of the stored weights themselves, with what it takes to update them in place.

    Each optimizer tensor is one parameter. names_by_tensor: of all that train. reduces: whether gradients are to be
    reduced here.
    """

    names_by_tensor: Mapping[torch.Tensor, str]
    reduces: bool

    def part(self, parameter: torch.Tensor) -> Part:
        """What this rank updates of a parameter; it may have no elements."""

    def parts(self) -> Iterator[Part]:
        """What this rank updates, where it has elements."""

    def numel(self, parameter: torch.Tensor) -> int:
        """Elements of the whole parameter."""

    def reduce(
        self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], dtype: torch.dtype | None
    ) -> Callable[[], list[torch.Tensor]]:
        """Begin to average whole gradients (None: zeros) over the ranks, summed in a dtype (None: as they are).

        Returns what waits, and returns the elements of this rank's parts. A collective.
        """

    def publish(self) -> None:
        """Let all ranks see what each has updated. A collective."""

    def sum(self, values: torch.Tensor) -> None:
        """Sum a few numbers over the ranks that see different data, in place. A collective."""

    def sum_of_parts(self, values: torch.Tensor) -> None:
        """Sum what ranks found out about their own parts, so that each element counts once. A collective."""


def reshard(model: nn.Module) -> None:
    """Let FSDP2 show the parameters that train: a root keeps its weights gathered after a forward, until a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class WholeShards(PlainPlacement):
    """Every rank updates all it holds: whole parameters (plain PyTorch, ZeRO-0), or its rows of DTensors (FSDP2).

    model: whose parameters they are.
    """

    def __init__(
        self, model: nn.Module, names_by_tensor: Mapping[torch.Tensor, str], process_group: ProcessGroup | None = None
    ) -> None:
        self.model, self.names_by_tensor, self.process_group = model, names_by_tensor, process_group
        sharded = any(isinstance(parameter, DTensor) for parameter in names_by_tensor)  # FSDP2 averages itself
        self.reduces = not sharded and world_size(process_group) > 1

    def part(self, parameter: torch.Tensor) -> Part:
        interval = self.interval(parameter, self.names_by_tensor[parameter])
        return Part(**vars(interval), parameter=parameter, elements=self.local(parameter))

    def parts(self) -> Iterator[Part]:
        return (part for part in map(self.part, self.names_by_tensor) if part.length)

    def numel(self, parameter: torch.Tensor) -> int:
        return parameter.numel()

    def reduce(
        self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], dtype: torch.dtype | None
    ) -> Callable[[], list[torch.Tensor]]:
        whole = _joined([_flat(p, g, p.numel(), dtype) for p, g in zip(parameters, gradients, strict=True)], dim=0)
        work = dist.all_reduce(whole, group=self.process_group, async_op=True)

        def receive() -> list[torch.Tensor]:
            work.wait()
            return list(whole.div_(world_size(self.process_group)).split([p.numel() for p in parameters]))

        return receive

    def publish(self) -> None:
        """Nothing to send: the ranks update alike, or each its own rows."""
        reshard(self.model)

    def sum(self, values: torch.Tensor) -> None:
        sum_over_ranks(values, self.process_group)

    def sum_of_parts(self, values: torch.Tensor) -> None:
        cut = self.cut(*next(iter(self.names_by_tensor.items())))
        if cut is not None:
            sum_over_ranks(values, cut.process_group)


class SplitShards(WholeShards):
    """Every rank holds whole parameters and updates an even part of each: ZeRO-1 and 2."""

    def cut(self, tensor: torch.Tensor, name: str) -> Cut | None:
        return Cut(self.numel(tensor), self._piece(tensor), dist.get_rank(self.process_group), self.process_group)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        name = self.names_by_tensor.get(tensor)
        return super().stored(tensor) if name is None else self._piece_of(tensor, self.interval(tensor, name))

    def _piece_of(self, parameter: torch.Tensor, interval: Interval) -> torch.Tensor:
        return parameter.detach().view(-1).narrow(0, interval.start, interval.length)

    def new_state(self, tensor: torch.Tensor, lengths: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
        return super().new_state(self.local(tensor), lengths, dtype)

    def reduce(
        self, parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], dtype: torch.dtype | None
    ) -> Callable[[], list[torch.Tensor]]:
        size = world_size(self.process_group)
        pieces = [self._piece(parameter) for parameter in parameters]
        whole = _joined(
            [
                _flat(parameter, gradient, size * piece, dtype).view(size, piece)
                for parameter, gradient, piece in zip(parameters, gradients, pieces, strict=True)
            ],
            dim=1,
        )
        mine = whole.new_empty(sum(pieces))
        work = _reduce_scatter(mine, whole.view(-1), group=self.process_group, async_op=True)

        def receive() -> list[torch.Tensor]:
            work.wait()
            split = mine.div_(size).split(pieces)
            return [piece[: self.part(parameter).length] for parameter, piece in zip(parameters, split, strict=True)]

        return receive

    def sum_of_parts(self, values: torch.Tensor) -> None:
        sum_over_ranks(values, self.process_group)

    def publish(self) -> None:
        size, rank = world_size(self.process_group), dist.get_rank(self.process_group)
        for bucket in self._buckets() if size > 1 else ():
            pieces = [self._piece(parameter) for parameter in bucket]
            if len(bucket) == 1 and pieces[0] * size == bucket[0].numel():
                part = self.part(bucket[0])
                _all_gather(bucket[0].detach().view(-1), part.elements.clone(), group=self.process_group)
                continue
            whole = bucket[0].new_empty(size, sum(pieces))
            self._copy(bucket, pieces, whole, [rank], to_bucket=True)
            _all_gather(whole.view(-1), whole[rank].clone(), group=self.process_group)
            self._copy(bucket, pieces, whole, [other for other in range(size) if other != rank], to_bucket=False)

    def _piece(self, parameter: torch.Tensor) -> int:
        return -(-parameter.numel() // world_size(self.process_group))

    def _buckets(self) -> Iterator[list[torch.Tensor]]:
        for dtype in {parameter.dtype: None for parameter in self.names_by_tensor}:
            bucket: list[torch.Tensor] = []
            for parameter in (parameter for parameter in self.names_by_tensor if parameter.dtype == dtype):
                if bucket and sum(map(torch.Tensor.numel, bucket)) + parameter.numel() > BUCKET:
                    yield bucket
                    bucket = []
                bucket.append(parameter)
            yield bucket

    def _copy(
        self,
        bucket: Sequence[torch.Tensor],
        pieces: Sequence[int],
        whole: torch.Tensor,
        ranks: Sequence[int],
        to_bucket: bool,
    ) -> None:
        offset = 0
        for parameter, piece in zip(bucket, pieces, strict=True):
            flat = parameter.detach().view(-1)
            for rank in ranks:
                part = flat[rank * piece : (rank + 1) * piece]  # short or empty on the last ranks
                slot = whole[rank, offset : offset + len(part)]
                (slot if to_bucket else part).copy_(part if to_bucket else slot)
            offset += piece


class PartitionedShards(SplitShards):
    """Every rank holds and updates a piece of each parameter: ZeRO-3.

    offload: what gathers and partitions the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        names_by_tensor: Mapping[torch.Tensor, str],
        process_group: ProcessGroup | None,
        offload,
    ) -> None:
        super().__init__(model, names_by_tensor, process_group)
        self.offload = offload

    def _piece_of(self, parameter: torch.Tensor, interval: Interval) -> torch.Tensor:
        return parameter.ds_tensor.detach().view(-1)[: interval.length]

    def numel(self, parameter: torch.Tensor) -> int:
        return parameter.ds_numel

    def _piece(self, parameter: torch.Tensor) -> int:
        return parameter.ds_tensor.ds_numel

    def publish(self) -> None:
        self.offload.partition_all_parameters()  # what is gathered, for good or to be used again, is out of date
        for parameter in self.names_by_tensor:
            parameter.ds_secondary_tensor = None  # so is ZeRO++'s second copy, which is made anew from the first
        if self.offload.persistent_parameters:
            self.offload.persistent_parameters[0].all_gather(self.offload.persistent_parameters)


def world_size(process_group: ProcessGroup | None) -> int:
    """Ranks of a process group (None: all; a lone process is 1)."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def _joined(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _flat(
    parameter: torch.Tensor, gradient: torch.Tensor | None, length: int, dtype: torch.dtype | None
) -> torch.Tensor:
    """A whole gradient, 1-D, or zeros for one that is missing, padded with zeros to a length."""
    if gradient is None:
        return torch.zeros(length, dtype=dtype or parameter.dtype, device=parameter.device)
    flat = gradient.reshape(-1).to(dtype or gradient.dtype)
    return flat if len(flat) == length else torch.cat([flat, flat.new_zeros(length - len(flat))])


def sum_over_ranks(values: torch.Tensor, process_group: ProcessGroup | None) -> None:
    """Sum a small tensor over a process group (None: all ranks; a lone process is its own sum), in place."""
    if dist.is_available() and dist.is_initialized():
        on_wire = values.to(collective_device(process_group, values.device))
        dist.all_reduce(on_wire, group=process_group)
        values.copy_(on_wire)
