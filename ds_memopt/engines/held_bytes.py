"""What an engine holds on a rank: weights, fp32 masters, gradients and each state of the optimizer.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ds_memopt.measure import state_bytes

_MASTERS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
    "fp32_groups",
)


def held_bytes(engine: Any, device: torch.device) -> dict[str, int]:
    """Bytes that this rank holds on its device from step to step, without gradients.

    engine: of DeepSpeed, with any optimizer. Returns "weights" (buffers included), "masters" apart from them, and the
    optimizer's states under their keys, such as "exp_avg". What is offloaded lies on another device and does not count.
    """
    stored = [*_stored(engine).values(), *engine.module.buffers()]
    weights = bytes_of(stored, device)
    return {
        "weights": weights,
        "masters": bytes_of([*stored, *_masters(engine)], device) - weights,
        **state_bytes(engine.optimizer, device),
    }


def checkpoint_bytes(engine: Any) -> int:
    """About how much this rank writes of a checkpoint, a little less rather than more.

    engine: of DeepSpeed, or our own of FSDP2, which shards as ZeRO-3 does. What all ranks hold alike the first writes.
    """
    stage, first = getattr(engine, "zero_optimization_stage", lambda: 3)(), dist.get_rank() == 0
    masters, weights = bytes_of(_masters(engine)), bytes_of(_stored(engine).values())
    divided = masters + sum(state_bytes(engine.optimizer).values())
    if stage == 3:
        return divided + (0 if masters else weights)
    return (divided if stage or first else 0) + (weights if first else 0)


def first_not_finite(engine: Any) -> str | None:
    """The name of a parameter or the key of a state of which this rank holds infinities or NaNs; None without any.

    Buffers may hold infinities, as masks do.
    """
    states = [item for state in engine.basic_optimizer.state.values() for item in state.items()]
    named = [*_stored(engine).items(), *(("an fp32 master", tensor) for tensor in _masters(engine)), *states]
    return next((name for name, value in named if isinstance(value, torch.Tensor) and not is_finite(value)), None)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements of this rank's part are finite numbers, in one pass and without temporaries."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    if not local.is_floating_point() or not local.numel():
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(local))


def gradient_bytes(engine: Any, device: torch.device) -> int:
    """Bytes of gradients on the device: between backward and step, all that a step holds."""
    averaged = getattr(engine.optimizer, "averaged_gradients", {}).values()
    held = [gradient for group in averaged for gradient in group or ()]
    held += [p.grad for p in (*engine.module.parameters(), *_masters(engine)) if p.grad is not None]
    held += getattr(engine.optimizer, "fp32_groups_gradients_flat", ())
    return bytes_of(held, device)


def _stored(engine: Any) -> dict[str, torch.Tensor]:
    """What this rank stores of each parameter, by name."""
    return {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()}


def _masters(engine: Any) -> list[torch.Tensor]:
    held = next((getattr(engine.optimizer, name) for name in _MASTERS if hasattr(engine.optimizer, name)), ())
    return [tensor for group in held for tensor in (group if isinstance(group, list) else [group])]


def bytes_of(tensors: Iterable[torch.Tensor], device: torch.device | None = None) -> int:
    """Of the storages on this device, or on any, in which the tensors lie, each counted once."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    storages = (t.untyped_storage() for t in local if device is None or t.device.type == device.type)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
