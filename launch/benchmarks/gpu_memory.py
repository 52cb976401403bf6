"""For gpu_check.py: what training should hold, counted without a GPU, and the largest micro-batch under a memory cap.

The counts are made as `ds_memopt.plan` makes them, which itself needs DeepSpeed and transformers.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from plain_llama import Shape, build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from ds_memopt.measure import limit_memory, state_bytes
from ds_memopt.optimizers import METHODS

LARGEST = 256
"""Sequences at which the search ends."""


def predicted_peak(shape: Shape, method: str | None, sequences: int, length: int, device: torch.device) -> int:
    """Bytes of weights, gradients, states and activations. method: None for AdamW."""
    in_bf16 = method is not None and METHODS[method].writes_weights
    uses_gradients = method is None or METHODS[method].uses_gradients
    model = build(shape, torch.bfloat16 if in_bf16 else torch.float32, torch.device("meta"))
    weights = {p: p.nbytes for p in model.parameters()}
    copies, gradients = 0, sum(weights.values())
    if method is None:
        states = 2 * gradients
    else:
        options = METHODS[method].for_equal_lengths
        optimizer = METHODS[method].from_model(model, **options, **METHODS[method].accepted({"compiled": False}))
        gradients = 0 if in_bf16 else sum(size for p, size in weights.items() if p.requires_grad)
        if optimizer.uses_losses:  # a module reads a perturbed copy of what it owns
            copies = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in model.modules())
        states = _states(optimizer, model)
    activations = _activations(shape, sequences, length, device, in_bf16, uses_gradients)
    return sum(weights.values()) + gradients + states + copies + activations


def _states(optimizer: Any, model: torch.nn.Module) -> int:
    if optimizer.writes_weights:
        list(optimizer.named_state())  # which makes what is kept
    else:
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        optimizer.step()
    return sum(state_bytes(optimizer).values())


def _activations(shape: Shape, sequences: int, length: int, device: torch.device, in_bf16: bool, backward: bool) -> int:
    """The peak of forward and backward besides weights; a gradient counts while it is made."""
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")  # the tracker's, of inputs that are None
        model = build(shape, torch.bfloat16 if in_bf16 else torch.float32, device)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(_take_away)
        tokens = torch.zeros(sequences, length, dtype=torch.long, device=device)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker, torch.set_grad_enabled(backward):
            with torch.autocast(device.type, torch.bfloat16, enabled=not in_bf16):
                loss = model(tokens)
            if backward:
                loss.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"] - sum(size for kind, size in peak.items() if getattr(kind, "value", "") == "Parameter")


def _take_away(parameter: torch.Tensor) -> None:
    parameter.grad = None


def largest_micro_batch(train: Callable[[int], Any], cap_gib: float, device: torch.device) -> int | None:
    """The most sequences with which `train` runs when only so much memory is there; 0 if none; None without a GPU,
    where a limit could not be taken back."""
    if device.type != "cuda":
        return None
    limit_memory(device, cap_gib)
    try:
        fits, fails = 0, 1
        while fails <= LARGEST and _runs(train, fails):
            fits, fails = fails, 2 * fails
        while fails - fits > 1 and fits < LARGEST:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if _runs(train, middle) else (fits, middle)
        return fits
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _runs(train: Callable[[int], Any], sequences: int) -> bool:
    try:
        train(sequences)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True
