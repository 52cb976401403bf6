"""What an engine holds on a rank's device, by kind: weights, fp32 masters, gradients and each state of the optimizer.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedZeroOptimizer.single_partition_of_fp32_groups, .averaged_gradients;
  DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat, .averaged_gradients;
  BF16_Optimizer.fp32_groups_flat_partition, .fp32_groups_gradients_flat; FP16_Optimizer.fp32_groups_flat;
  FP16_UnfusedOptimizer.fp32_groups, lists of them
  Of parameters: .ds_tensor, this rank's part at ZeRO-3
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

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

    engine: of DeepSpeed, with any optimizer. Returns "weights" (buffers included), "masters", and the optimizer's
    states under their keys, such as "exp_avg". What is offloaded lies on another device and does not count.
    """
    stored = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return {
        "weights": bytes_of([*stored, *engine.module.buffers()], device),
        "masters": bytes_of(_masters(engine), device),
        **state_bytes(engine.optimizer, device),
    }


def gradient_bytes(engine: Any, device: torch.device) -> int:
    """Bytes of gradients on the device: between backward and step, all that a step holds."""
    averaged = getattr(engine.optimizer, "averaged_gradients", {}).values()
    held = [gradient for group in averaged for gradient in group or ()]
    held += [p.grad for p in (*engine.module.parameters(), *_masters(engine)) if p.grad is not None]
    held += getattr(engine.optimizer, "fp32_groups_gradients_flat", ())
    return bytes_of(held, device)


def _masters(engine: Any) -> list[torch.Tensor]:
    held = next((getattr(engine.optimizer, name) for name in _MASTERS if hasattr(engine.optimizer, name)), ())
    return [tensor for group in held for tensor in (group if isinstance(group, list) else [group])]


def bytes_of(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Of the storages on this device in which the tensors lie, each counted once."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    storages = (tensor.untyped_storage() for tensor in local if tensor.device.type == device.type)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
