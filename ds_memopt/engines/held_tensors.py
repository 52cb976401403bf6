"""Where an engine keeps what a run has come to: which interval of which parameter each tensor of a rank holds.

For DeepSpeed's engine with any optimizer, for FSDP2, and for a plain model. Private names used here are in
private_names.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ds_memopt.blocks import bare_parameters
from ds_memopt.optimizers import capabilities_of
from ds_memopt.shards import (
    FusedCopyPlacement,
    Interval,
    MasterCopyPlacement,
    Placement,
    PlainPlacement,
    Zero3Placement,
    Zero12Placement,
    even_part,
    reshard,
)

PLACEMENTS = {
    "fp32_partitioned_groups_flat": Zero3Placement,
    "single_partition_of_fp32_groups": Zero12Placement,
    "fp32_groups_flat_partition": Zero12Placement,
    "fp32_groups_flat": FusedCopyPlacement,
    "fp32_groups": MasterCopyPlacement,
}
"""By the name of its masters, where DeepSpeed's object around an optimizer lays them."""


class Held(NamedTuple):
    """Elements [start, start + len(values)) of a flattened parameter, and a view of where they are stored, 1-D."""

    name: str
    start: int
    values: torch.Tensor


class OptimizerTensor(NamedTuple):
    """A tensor that an optimizer updates, and what it holds of which parameters. names: of all parameters that share
    it, also where this rank holds nothing of them."""

    tensor: torch.Tensor
    placement: Placement
    intervals: tuple[Interval, ...]
    names: frozenset[str]

    def views(self, of: torch.Tensor) -> Iterator[Held]:
        """Of the tensor, or of a state that has its shape."""
        local = self.placement.local(of)
        return (Held(one.name, one.start, local.narrow(0, one.offset, one.length)) for one in self.intervals)


def stored_weights(model: nn.Module) -> Iterator[Held]:
    """This rank's part of every parameter, frozen ones included, as it is stored between steps."""
    reshard(model)
    plain = PlainPlacement()
    for name, parameter in bare_parameters(model).items():
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3
            part, rank = parameter.ds_tensor, dist.get_rank(parameter.ds_process_group)
            start, length = even_part(parameter.ds_numel, part.ds_numel, rank)
            yield Held(name, start, part.detach().view(-1)[:length])
        else:
            yield Held(name, plain.interval(parameter, name).start, plain.local(parameter))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, wrapper: Any) -> list[OptimizerTensor]:
    """All tensors that the optimizer updates on this rank: an engine's fp32 masters, or the stored weights themselves.

    optimizer: ours with state per block, or any other. wrapper: DeepSpeed's object around it, None without one.

    Raises ValueError for a tensor that is no parameter of the model.
    """
    if capabilities_of(optimizer).family is not None:
        placement = optimizer.placement
        tensors = placement.named_tensors(optimizer.param_groups)
    else:
        names = {parameter: name for name, parameter in bare_parameters(model).items()}
        placement = PlainPlacement() if wrapper is None else _placement_of(wrapper)(wrapper, names)
        named = _named(optimizer, names) if wrapper is None else placement.named_tensors(optimizer.param_groups)
        tensors = list(named)
    found = []
    for tensor, name in tensors:
        layout = placement.layout((tensor,), (name,))
        names = {name for part in layout.borders for name in part.by_name} | {one.name for one in layout.intervals}
        found.append(OptimizerTensor(tensor, placement, layout.intervals, frozenset(names)))
    return found


def masters(model: nn.Module, optimizer: torch.optim.Optimizer, wrapper: Any) -> Iterator[Held]:
    """What this rank updates, in the precision in which it does: the engine's masters, or its share of the weights."""
    if capabilities_of(optimizer).writes_weights:
        yield from (Held(part.name, part.start, part.elements) for part in optimizer.placement.parts())
        return
    for one in optimizer_tensors(model, optimizer, wrapper):
        yield from one.views(one.tensor)


def _placement_of(wrapper: Any) -> type[Placement]:
    found = next((placement for name, placement in PLACEMENTS.items() if hasattr(wrapper, name)), None)
    if found is None:
        raise ValueError(
            f"Nothing is known of where {type(wrapper).__name__} keeps weights. Use the engine's own save_checkpoint."
        )
    return found


def _named(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> Iterator[tuple[torch.Tensor, str]]:
    for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
        if tensor not in names:
            raise ValueError(
                f"The optimizer holds a tensor of shape {tuple(tensor.shape)} that is no parameter of the model. Give "
                "the model that it was built for, as it is after the last wrapper that replaced its parameters."
            )
        if tensor.requires_grad:
            yield tensor, names[tensor]


def refuse_unportable(engine: Any) -> None:
    """Raise ValueError for an engine of DeepSpeed's whose ranks hold what no name and interval tells."""
    offloads = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    refused = {
        "a pipeline, whose stages have other parameters": engine.pipeline_parallelism,
        "DeepSpeed's own MoE layers, whose experts have one name on all ranks": engine.has_moe_layers,
        "tensor parallelism": engine.autotp_size() > 1,
        "offload to NVMe": any(offload is not None and offload.device == "nvme" for offload in offloads),
        "ZenFlow, which keeps a state of its own": engine.zenflow_config() is not None,
    }
    for what, there in refused.items():
        if there:
            raise ValueError(f"A portable checkpoint cannot be made with {what}. Save DeepSpeed's own files.")
