"""Parameters that a method updates in place, without fp32 masters by an engine: which part of each this rank updates.

Private names of DeepSpeed used here, checked against 0.19.8:
  Parameter.ds_tensor, .ds_tensor.ds_numel, .ds_numel, .all_gather()
  DeepSpeedZeRoOffload.partition_all_parameters(), .persistent_parameters
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .plain import PlainPlacement, sharded_mesh_dim
from .seams import collective_device

# Its name before torch 2.13 is the second one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

BUCKET = 2**25
"""Elements that are gathered at once."""


class Part(NamedTuple):
    """Elements [start, start + len(elements)) of the flattened parameter `name`, as a view of where they are stored."""

    name: str
    start: int
    parameter: torch.Tensor
    elements: torch.Tensor


class InPlaceShards(Protocol):
    """How one engine keeps the weights."""

    def parts(self) -> Iterator[Part]:
        """What this rank updates."""

    def publish(self) -> None:
        """Let all ranks see what each has updated. A collective."""

    def sum(self, values: torch.Tensor) -> None:
        """Sum a few numbers over the ranks that see different data, in place. A collective."""

    def sum_of_parts(self, values: torch.Tensor) -> None:
        """Sum what ranks found out about their own parts, so that each element counts once. A collective."""


class WholeShards:
    """Every rank updates all it holds: whole parameters (plain PyTorch, ZeRO-0), or its rows of DTensors (FSDP2).

    model: whose parameters they are.
    """

    def __init__(
        self, model: nn.Module, names: Mapping[torch.Tensor, str], process_group: ProcessGroup | None = None
    ) -> None:
        self.model, self.names, self.process_group = model, names, process_group
        self._placement = PlainPlacement()

    def parts(self) -> Iterator[Part]:
        for parameter, name in self.names.items():
            for interval in self._placement.layout([parameter], [name]).intervals:
                yield Part(name, interval.start, parameter, self._placement.local(parameter))

    def publish(self) -> None:
        """Nothing to send: the ranks update alike, or each its own rows."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root keeps its weights gathered after a forward, until a backward

    def sum(self, values: torch.Tensor) -> None:
        sum_over_ranks(values, self.process_group)

    def sum_of_parts(self, values: torch.Tensor) -> None:
        tensor, name = next(iter(self.names.items()))
        dim = sharded_mesh_dim(tensor, name) if isinstance(tensor, DTensor) else None
        if dim is not None:
            sum_over_ranks(values, tensor.device_mesh.get_group(dim))


class SplitShards(WholeShards):
    """Every rank holds whole parameters and updates an even part of each: ZeRO-1 and 2."""

    def parts(self) -> Iterator[Part]:
        rank = dist.get_rank(self.process_group)
        for parameter, name in self.names.items():
            piece = self._piece(parameter)
            start, end = (min(number * piece, parameter.numel()) for number in (rank, rank + 1))
            if start < end:
                yield Part(name, start, parameter, parameter.detach().view(-1)[start:end])

    def sum_of_parts(self, values: torch.Tensor) -> None:
        sum_over_ranks(values, self.process_group)

    def publish(self) -> None:
        for bucket in self._buckets():
            size = dist.get_world_size(self.process_group)
            rank = dist.get_rank(self.process_group)
            pieces = [self._piece(parameter) for parameter in bucket]
            whole = bucket[0].new_empty(size, sum(pieces))
            self._copy(bucket, pieces, whole, [rank], to_bucket=True)
            _all_gather(whole.view(-1), whole[rank].clone(), group=self.process_group)
            self._copy(bucket, pieces, whole, [other for other in range(size) if other != rank], to_bucket=False)

    def _piece(self, parameter: torch.Tensor) -> int:
        return -(-parameter.numel() // dist.get_world_size(self.process_group))

    def _buckets(self) -> Iterator[list[torch.Tensor]]:
        for dtype in {parameter.dtype: None for parameter in self.names}:
            bucket: list[torch.Tensor] = []
            for parameter in (parameter for parameter in self.names if parameter.dtype == dtype):
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


class PartitionedShards(WholeShards):
    """Every rank holds and updates a piece of each parameter: ZeRO-3.

    offload: what gathers and partitions the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[torch.Tensor, str],
        process_group: ProcessGroup | None,
        offload,
    ) -> None:
        super().__init__(model, names, process_group)
        self.offload = offload

    def parts(self) -> Iterator[Part]:
        rank = dist.get_rank(self.process_group)
        for parameter, name in self.names.items():
            piece = parameter.ds_tensor.ds_numel
            length = min(piece, parameter.ds_numel - rank * piece)  # the last ranks' pieces may be padding
            if length > 0:
                yield Part(name, rank * piece, parameter, parameter.ds_tensor.detach().view(-1)[:length])

    def sum_of_parts(self, values: torch.Tensor) -> None:
        sum_over_ranks(values, self.process_group)

    def publish(self) -> None:
        self.offload.partition_all_parameters()  # what is gathered, for good or to be used again, is out of date
        if self.offload.persistent_parameters:
            self.offload.persistent_parameters[0].all_gather(self.offload.persistent_parameters)


def sum_over_ranks(values: torch.Tensor, process_group: ProcessGroup | None) -> None:
    """Sum a small tensor over a process group (None: all ranks; a lone process is its own sum), in place."""
    if dist.is_available() and dist.is_initialized():
        on_wire = values.to(collective_device(process_group, values.device))
        dist.all_reduce(on_wire, group=process_group)
        values.copy_(on_wire)
