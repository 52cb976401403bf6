"""Where ZeRO and FSDP2 would lay parameters on ranks that do not exist, with tensors that hold nothing (meta device).

What follows DeepSpeed was checked against 0.19.8: the alignment of ZeRO-1 and 2's flat buffers
(DeepSpeedZeroOptimizer.nccl_start_alignment_factor), the pieces and sub-groups of ZeRO-3
(DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from ds_memopt.blocks import full_shape
from ds_memopt.shards import PlainPlacement, RankBorders, SplitShards, partition_each_parameter, partition_flat_buffer
from ds_memopt.shards.layout import FlatPlacement, Interval, numel_of
from ds_memopt.shards.plain_placement import Cut

ALIGNMENT = 2
"""Elements per rank that a flat buffer of ZeRO-1 and 2 is a multiple of: 4 bytes, for NCCL."""

Member = tuple[str | None, int]
"""Name and elements of a parameter; one without a name is lent to ZeRO and never trained."""


FSDP2 = "FSDP2"
Stage = Literal[0, 1, 2, 3, "FSDP2"]
"""Of ZeRO, or FSDP2 in the place of ZeRO."""


@dataclass(frozen=True)
class PlannedRank:
    """Rank `rank` of `count` at a ZeRO stage, with DeepSpeed's options of it, or under FSDP2."""

    stage: Stage
    count: int
    rank: int
    zero: DeepSpeedZeroConfig

    def piece(self, numel: int) -> int:
        """Elements of a parameter on each rank where it is cut into equal pieces, the last ones padded."""
        return -(-numel // self.count)

    def piece_of_rows(self, shape: Sequence[int]) -> int:
        """Elements of a parameter on each rank where it is cut into equal numbers of rows, the last ones padded."""
        return self.piece(shape[0]) * numel_of(shape[1:])

    def padded(self, numel: int) -> int:
        return self.piece(numel) * self.count


def meta_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model without data, its parameters whole and in a dtype. The model itself stays as it is."""
    memo: dict[int, torch.Tensor] = {
        id(p): nn.Parameter(torch.empty(full_shape(p), dtype=dtype, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


class FlatPartitions(FlatPlacement):
    """A rank's flat partitions: one of each param group (ZeRO-1 and 2) or sub-group (ZeRO-3).

    groups: the members of each param group, in its order. dtype: of the partitions.
    """

    def __init__(
        self, groups: Sequence[Sequence[Member]], ranks: PlannedRank, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.by_group: list[list[torch.Tensor]] = []
        self.gradient_elements, self.dtype = 0, dtype
        for members in groups:
            partitions = list(self._sub_groups(members, ranks) if ranks.stage == 3 else [self._flat(members, ranks)])
            self.flats += partitions
            self.by_group.append([flat for flat, _, _ in partitions])

    def _flat(self, members: Sequence[Member], ranks: PlannedRank) -> tuple:
        offsets, total = [], 0
        for name, numel in members:
            offsets.append((name, total, numel))
            total += numel
        step = ALIGNMENT * ranks.count
        partition = -(-total // step) * ALIGNMENT
        held, borders = partition_flat_buffer(offsets, partition, ranks.rank)
        low, high = ranks.rank * partition, (ranks.rank + 1) * partition
        # ZeRO keeps the whole gradient of a parameter of which it has a part, and zeros in the place of padding.
        self.gradient_elements += sum(numel for _, at, numel in offsets if at < high and at + numel > low)
        self.gradient_elements += min(partition, max(0, high - total))
        return self._meta(partition), held, RankBorders(None, borders)

    def _sub_groups(self, members: Sequence[Member], ranks: PlannedRank) -> Iterator[tuple]:
        pieces = [(name, numel, ranks.piece(numel)) for name, numel in members]
        while pieces:
            count, total = 0, 0
            while count < len(pieces) and (total < ranks.zero.sub_group_size or not count):
                total += pieces[count][2]
                count += 1
            held, borders = partition_each_parameter(pieces[:count], ranks.rank)
            self.gradient_elements += total
            yield self._meta(total), held, RankBorders(None, borders)
            pieces = pieces[count:]

    def _meta(self, numel: int) -> torch.Tensor:
        return torch.empty(numel, dtype=self.dtype, device="meta")


class WholeMasters(PlainPlacement):
    """ZeRO-0: a whole copy of every parameter on every rank."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.by_group = [
            [torch.empty(full_shape(p), device="meta", requires_grad=True) for p in group["params"]]
            for group in optimizer.param_groups
        ]
        self.gradient_elements = sum(p.numel() for masters in self.by_group for p in masters)


class PlannedRows(PlainPlacement):
    """FSDP2: the rows that a rank has of every parameter of an optimizer, on tensors of whole parameters.

    gradient_elements: of all gradients, with the rows by which the last ones are padded.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: PlannedRank) -> None:
        self.ranks, self.gradient_elements = ranks, 0
        self._held: dict[torch.Tensor, Interval] = {}
        for group in optimizer.param_groups:
            trained = self.named_tensors([group])
            group["params"], group["param_names"] = [p for p, _ in trained], [name for _, name in trained]
            for parameter, name in trained:
                parameter.grad = torch.empty_like(parameter)
                self._held[parameter] = self._held[parameter.grad] = self.interval(parameter, name)
                self.gradient_elements += ranks.piece_of_rows(parameter.shape)
        self.by_group = [group["params"] for group in optimizer.param_groups]

    def cut(self, tensor: torch.Tensor, name: str) -> Cut:
        return Cut(tensor.numel(), self.ranks.piece_of_rows(tensor.shape), self.ranks.rank, None)

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        held = self._held.get(tensor)
        return tensor if held is None else tensor.view(-1)[held.start : held.start + held.length]

    def new_state(self, tensor: torch.Tensor, lengths: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
        # As a DTensor: those of blocks are padded to the rank that has most.
        return torch.zeros(self._held[tensor].length if lengths is None else lengths[1], dtype=dtype, device="meta")


class PlannedShards(SplitShards):
    """What a method in place asks of an engine: a rank's parts without data, and a record of what would be sent.

    payload: bytes by collective. shared: of these, sums over what ranks share.
    """

    def __init__(self, model: nn.Module, names_by_tensor: Mapping[torch.Tensor, str], ranks: PlannedRank) -> None:
        super().__init__(model, names_by_tensor)
        self.ranks, self.reduces = ranks, ranks.count > 1
        self.payload: dict[str, int] = {}
        self.shared = 0

    def _send(self, collective: str, numel: int, dtype: torch.dtype) -> None:
        if self.ranks.count > 1:
            self.payload[collective] = self.payload.get(collective, 0) + numel * dtype.itemsize

    def cut(self, tensor: torch.Tensor, name: str) -> Cut | None:
        numel = tensor.numel()
        return Cut(numel, self.ranks.piece(numel), self.ranks.rank, None) if self.ranks.stage else None

    def reduce(
        self, parameters: Sequence[torch.Tensor], gradients: Sequence, dtype: torch.dtype | None
    ) -> Callable[[], list[torch.Tensor]]:
        collective = "reduce_scatter" if self.ranks.stage else "all_reduce"
        for p in parameters:
            self._send(collective, self.ranks.padded(p.numel()) if self.ranks.stage else p.numel(), dtype or p.dtype)
        return lambda: [torch.empty_like(self.part(p).elements) for p in parameters]

    def publish(self) -> None:
        for p in self.names_by_tensor if self.ranks.stage in (1, 2) else ():
            self._send("all_gather", self.ranks.padded(p.numel()), p.dtype)

    def sum(self, values: torch.Tensor) -> None:
        self._send("all_reduce", values.numel(), values.dtype)

    def sum_of_parts(self, values: torch.Tensor) -> None:
        if self.ranks.stage and self.ranks.count > 1:
            self.sum(values)
            self.shared += values.nbytes
