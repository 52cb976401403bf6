"""Layout of plain tensors, of fp32 copies of them, and of FSDP2's DTensors: one optimizer tensor per parameter.

Private names used here are in engines/private_names.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ds_memopt.shards.layout import (
    FlatPlacement,
    Interval,
    Layout,
    RankBorders,
    even_borders,
    even_part,
    numel_of,
    partition_flat_buffer,
)


class Cut(NamedTuple):
    """A parameter of `numel` elements in parts of `piece`, of which the rank `rank` of a process group has its own."""

    numel: int
    piece: int
    rank: int
    process_group: ProcessGroup | None


class PlainPlacement:
    """Each optimizer tensor is one parameter: whole (a plain tensor) or this rank's rows (an FSDP2 DTensor).

    A subclass that cuts parameters otherwise says so in `cut`, and in `local` how this rank's elements are read.
    """

    def names(self, param_group: dict) -> Sequence[str | None]:
        names, params = param_group["param_names"], param_group["params"]
        if len(names) != len(params):
            raise ValueError(
                f"A param group was built from {len(names)} parameters and now holds {len(params)} tensors: an engine "
                "replaced them. Call ds_memopt.register() before deepspeed.initialize."
            )
        return names

    def layout(self, tensors: Sequence[torch.Tensor], names: Sequence[str | None]) -> Layout:
        intervals: list[Interval] = []
        borders: dict[ProcessGroup | None, dict[str, np.ndarray]] = {}
        for number, (tensor, name) in enumerate(zip(tensors, names, strict=True)):
            assert name is not None, "a plain tensor stands for one named parameter"
            cut = self.cut(tensor, name)
            interval = self._interval(tensor, name, cut, number)
            if interval.length > 0:
                intervals.append(interval)
            if cut is not None:
                borders.setdefault(cut.process_group, {})[name] = even_borders(0, cut.numel, max(cut.piece, 1))
        return Layout(tuple(intervals), tuple(RankBorders(group, cuts) for group, cuts in borders.items()))

    def interval(self, tensor: torch.Tensor, name: str) -> Interval:
        """This rank's interval of one parameter; it may be empty."""
        return self._interval(tensor, name, self.cut(tensor, name), 0)

    def _interval(self, tensor: torch.Tensor, name: str, cut: Cut | None, number: int) -> Interval:
        check_contiguous(tensor, name)
        start, length = (0, tensor.numel()) if cut is None else even_part(cut.numel, cut.piece, cut.rank)
        return Interval(name, start, length, number, 0)

    def cut(self, tensor: torch.Tensor, name: str) -> Cut | None:
        """How ranks share a parameter; None where each has all of it."""
        dim = sharded_mesh_dim(tensor, name) if isinstance(tensor, DTensor) else None
        if dim is None:
            return None
        mesh = tensor.device_mesh
        # Shard(0) splits like torch.chunk: ceil(R / N) rows a rank, the last ranks fewer or none.
        piece = -(-tensor.shape[0] // mesh.size(dim)) * numel_of(tensor.shape[1:])
        cut = Cut(tensor.numel(), piece, mesh.get_local_rank(dim), mesh.get_group(dim))
        _, length = even_part(cut.numel, cut.piece, cut.rank)
        assert tensor.to_local().numel() == length, f"{name}: unexpected local shape"
        return cut

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.stored(tensor).detach().reshape(-1)

    def named_tensors(self, param_groups: Sequence[dict]) -> list[tuple[torch.Tensor, str | None]]:
        pairs = [pair for group in param_groups for pair in zip(group["params"], self.names(group), strict=True)]
        return [(tensor, name) for tensor, name in pairs if tensor.requires_grad]

    def new_state(self, tensor: torch.Tensor, lengths: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
        if lengths is None:
            # The parameter's own sharding, so that distributed checkpoints can re-slice it. Contiguous, because
            # `local` must return a view of it.
            return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
        if not isinstance(tensor, DTensor) or sharded_mesh_dim(tensor, "") is None:
            return torch.zeros(lengths[0], dtype=dtype, device=tensor.device)
        # A plain tensor would be taken for a copy that all ranks share, and a distributed checkpoint would keep
        # rank 0's values for everyone. A DTensor needs equal parts: padded to the largest.
        # By way of the meta device: from_local would move a CPU tensor, of offloaded parameters, to the mesh's device.
        local = torch.empty(lengths[1], dtype=dtype, device="meta")
        shape = DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False)
        return torch.zeros_like(shape, device=tensor.device)


class MasterCopyPlacement(PlainPlacement):
    """Placement of a 16-bit model at stage 0: each optimizer tensor is the fp32 copy of one whole parameter.

    wrapper: the FP16_UnfusedOptimizer that DeepSpeed built.
    names: the name of every trainable model parameter.
    """

    def __init__(self, wrapper, names: Mapping[torch.Tensor, str]) -> None:
        self._names = {
            copy: names[parameter]
            for copies, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            for copy, parameter in zip(copies, parameters, strict=True)
        }

    def names(self, param_group: dict) -> Sequence[str | None]:
        return [self._names[param] for param in param_group["params"]]


class FusedCopyPlacement(FlatPlacement):
    """Placement of a 16-bit model at stage 0 with DeepSpeed's FusedAdam: each optimizer tensor is the fp32 copy of a
    whole param group, one parameter after the other.

    wrapper: the FP16_Optimizer that DeepSpeed built. names: the name of every trainable model parameter.
    """

    def __init__(self, wrapper, names: Mapping[torch.Tensor, str]) -> None:
        super().__init__()
        for flat, parameters in zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True):
            ends = itertools.accumulate(p.numel() for p in parameters)
            members = [(names[p], end - p.numel(), p.numel()) for p, end in zip(parameters, ends, strict=True)]
            intervals, borders = partition_flat_buffer(members, flat.numel(), 0)
            self.flats.append((flat, intervals, RankBorders(None, borders)))


def check_contiguous(tensor: torch.Tensor, name: str) -> None:
    """Raise ValueError for a parameter, or this rank's part of one, whose elements do not lie row by row."""
    stored = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not stored.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(stored.shape)} and strides {stored.stride()} is not contiguous, but steps go row "
            "by row. Call model.to(memory_format=torch.contiguous_format), or p.data = p.data.contiguous(). Inputs may "
            "be channels_last."
        )


def sharded_mesh_dim(tensor: DTensor, name: str) -> int | None:
    """The mesh dimension along which a DTensor's rows are split, or None where every rank holds all of it.

    Raises ValueError for placements other than FSDP2's and HSDP's, whose parts are not row-major intervals.
    """
    split = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not split:
        return None
    # An exact type: the strided shards of tensor parallelism below FSDP2 are subclasses in some releases.
    if len(split) > 1 or type(tensor.placements[split[0]]) is not Shard or tensor.placements[split[0]].dim != 0:
        raise ValueError(
            f"{name} is placed as {tensor.placements}; only Shard(0) along one mesh dimension is supported (FSDP2's "
            "and HSDP's default). Leave shard_placement_fn of fully_shard unset and do not combine it with tensor "
            "parallelism."
        )
    return split[0]


def reduced_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """The sharded parameters of FSDP2 whose gradients it reduces, and makes known, together; none elsewhere."""
    return [
        [member.sharded_param for member in param_group.fsdp_params]
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for param_group in module._get_fsdp_state()._fsdp_param_groups
    ]


def trainable_parameters_changed(model: nn.Module) -> None:
    """Tell FSDP2, where it shards the model, that other parameters than before require gradients.

    It chooses the dtype in which a module's gradients are reduced from those that do, once, at the first forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for param_group in module._get_fsdp_state()._fsdp_param_groups:
                param_group._init_mp_dtypes()
