"""Peak memory of a rank and bytes of optimizer state."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GIB = 1024**3
MIB = 1024**2


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory of this rank in GiB (1024^3 bytes).

    On CUDA: `peak_allocated_gib` and `peak_reserved_gib` of PyTorch's allocator since `reset_peak_memory`.
    Elsewhere: `peak_rss_gib`, the largest resident set of the process since its start (it cannot be reset, and it
    includes the interpreter and the libraries, about 0.5 GiB).
    """
    if device.type == "cuda":
        return {
            "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return {"peak_rss_gib": _peak_resident_bytes() / GIB}


def _peak_resident_bytes() -> int:
    if Path("/proc/self/status").exists():  # not ru_maxrss there: it begins with the peak of the process before
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024


def resident_gib() -> float:
    """Memory of this process now, in GiB: before a model is built, what interpreter and libraries take."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return _peak_resident_bytes() / GIB
    return int(status.read_text().split()[1]) * resource.getpagesize() / GIB


def limit_memory(device: torch.device, gib: float) -> None:
    """Make allocations fail beyond this much memory, as on a smaller GPU.

    On CUDA: of PyTorch's allocator, which raises OutOfMemoryError. On a CPU with Linux: of what the process maps beyond
    what it has mapped now, so call it before a model is built; torch raises RuntimeError then. Processes that it starts
    inherit the limit: compile DeepSpeed's operators before. ValueError if the device has less, if the limit is not
    above 0, or if this system has none.
    """
    limit = int(gib * GIB)
    if limit <= 0:
        raise ValueError(f"a memory limit of {gib} GiB leaves nothing: it must be more than 0")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if limit > total:
            raise ValueError(f"a memory limit of {gib} GiB is more than the {total / GIB:.1f} GiB of this device")
        torch.cuda.set_per_process_memory_fraction(limit / total, device)
        return
    if not Path("/proc/self/status").exists():
        raise ValueError("a memory limit without a GPU needs Linux: leave it out")
    mapped = _status_bytes("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (mapped + limit, resource.RLIM_INFINITY))


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak on CUDA; no effect elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def state_bytes(optimizer: Any, device: torch.device | None = None) -> dict[str, int]:
    """Bytes of optimizer state that this rank holds, by state key, e.g. {"exp_avg": 4096, "step": 4}.

    optimizer: a `torch.optim.Optimizer`, or a wrapper that holds one in its attribute `optimizer` (DeepSpeed's ZeRO
    optimizers, accelerate's). Of a DTensor the local shard counts, of an expanded view the memory behind it. Numbers
    that are not tensors count 0. Master weights and gradients are no optimizer state and are not counted. device: of
    whose type tensors must be to count; None: any.
    TypeError if no optimizer with a `state` is found.
    """
    base = optimizer
    while hasattr(base, "optimizer"):
        base = base.optimizer
    if not hasattr(base, "state"):
        raise TypeError(f"expected an optimizer with a `state` or a wrapper of one, got {type(optimizer).__name__}")
    total: Counter[str] = Counter()
    for state in base.state.values():
        for key, value in state.items():
            total[str(key)] += _bytes(value, device)
    return dict(total)


def state_bytes_per_parameter(optimizer: Any, num_parameters: int, group: dist.ProcessGroup | None = None) -> float:
    """Optimizer-state bytes summed over all ranks of `group`, divided by the model's number of parameters.

    Replicas count as often as they exist: AdamW gives 8 under ZeRO-1/2/3 and 8N when N ranks hold full copies.
    A collective call: one all_reduce of 8 bytes when a process group is initialised.
    ValueError if num_parameters is not positive.
    """
    if num_parameters <= 0:
        raise ValueError(f"num_parameters = {num_parameters} must be positive: pass the model's unsharded size")
    total = torch.tensor(sum(state_bytes(optimizer).values()), dtype=torch.float64)
    if dist.is_initialized():
        if dist.get_backend(group) == "nccl":
            total = total.cuda()
        dist.all_reduce(total, group=group)
    return total.item() / num_parameters


def _bytes(value: Any, device: torch.device | None) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(part, device) for part in value)
    if not isinstance(value, torch.Tensor) or (device is not None and value.device.type != device.type):
        return 0
    local = value.to_local() if hasattr(value, "to_local") else value
    return min(local.numel() * local.element_size(), local.untyped_storage().nbytes())
