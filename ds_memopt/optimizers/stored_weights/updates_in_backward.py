"""Steps that are made while backward goes on: each gradient is used up as soon as it is complete, and freed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_memopt import kernels
from ds_memopt.optimizers.base.hyper_parameters import HyperParameters, choice, hyper_parameter, real
from ds_memopt.optimizers.stored_weights.in_place_optimizer import InPlaceOptimizer, backward_in_closure
from ds_memopt.shards import GradientBuckets, InPlaceShards, Part
from ds_memopt.support import refuse

Bucket = list[tuple[Part, torch.Tensor | None]]
"""Parts of this rank and their mean gradients, 1-D, or None where a parameter took no part in the loss."""


@dataclass(frozen=True, kw_only=True)
class ClippingHyperParameters(HyperParameters):
    """Those of every `UpdatesInBackward`."""

    clip: Literal["none", "tensor", "two_pass"] = hyper_parameter(
        "none",
        choice("none", "tensor", "two_pass", remedy="'none' is usual."),
        "'tensor': no parameter's gradient has a larger norm than max_norm; 'two_pass': nor have all together, which "
        "takes a second forward and backward.",
    )
    max_norm: float = hyper_parameter(1.0, real("(0, 1e6]", "1.0 is usual."), "Largest norm of a gradient, see clip.")


FIRST_LOSS_SCALE, GROW_EVERY = 2.0**16, 2000
"""Of fp16: the loss is scaled up so that gradients do not vanish, by half after an overflow, by twice after these."""


class UpdatesInBackward(InPlaceOptimizer):
    """What the first-order methods share that hold no set of gradients: IPSGD and Addax.

    A step is `begin`, `first_order` and `end_step`. A subclass implements `update_bucket`.
    """

    accumulates = False
    hyper: ClippingHyperParameters

    def __init__(self, params: Iterable, *positional: Any, model: nn.Module | None = None, **named: Any) -> None:
        super().__init__(params, *positional, model=model, **named)
        self.watch_gradients()

    @property
    def clip(self) -> Literal["none", "tensor", "two_pass"]:
        return self.hyper.clip

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if self.clip != "two_pass" and any(p.dtype == torch.float16 for p in self.param_groups[-1]["params"]):
            raise ValueError(
                f'clip="{self.clip}" cannot take back a step whose fp16 gradients overflow. Use bf16, or '
                'clip="two_pass", which looks at them before.'
            )

    def watch_gradients(self, **reduction: Any) -> None:
        """Take gradients away from now on. reduction: `elements` and `dtype` of `GradientBuckets`."""
        if any(isinstance(module, DistributedDataParallel) for module in self._model.modules()):
            refuse(type(self), "ddp")
        if hasattr(self, "gradients"):
            self.gradients.remove()
        self.gradients = GradientBuckets(self.placement, self._use, **reduction)
        self._measuring = self._in_step = self._in_closure = False
        self._squares: list[torch.Tensor] = []
        self._scale = 1.0
        self._step_is_new = True
        self.grad_norm: float | None = None
        self._fp16 = any(p.dtype == torch.float16 for p in self._names)
        if self._fp16 and "loss_scale" not in self.progress:
            self.set_progress(loss_scale=FIRST_LOSS_SCALE, since_overflow=0)

    def bind(self, placement: InPlaceShards) -> None:
        super().bind(placement)
        self.watch_gradients()

    def release(self) -> None:
        super().release()
        self.gradients.remove()

    def update_bucket(self, bucket: Bucket) -> None:
        """Make the step with some parts. Every part comes once in each step, also one without elements."""
        raise NotImplementedError

    def begin(self, total: torch.Tensor | float, count: Any) -> float | None:
        """Agree with all ranks on a step. All ranks call.

        total, count: sum of this rank's losses, and the number of samples or tokens that they are the losses of.
        Returns by what `total` is to be multiplied for the mean over ranks to be that over all samples: 0 if there are
        none. None if a loss is not finite, on whatever rank: then all skip the step.
        """
        sums = self._sums_of(total, count)
        self.placement.sum(sums)
        not_finite, samples, ranks = sums.tolist()
        return None if not_finite or not samples else ranks / samples

    def _sums_of(self, total: torch.Tensor | float, count: Any) -> torch.Tensor:
        value = total.item() if isinstance(total, torch.Tensor) else total
        not_finite = 0.0 if math.isfinite(value) else 1.0
        return torch.tensor([not_finite, float(count), 1.0], dtype=torch.float64, device=next(iter(self._names)).device)

    def without_first_order(self) -> bool:
        """Make a step where no rank has samples for a gradient; returns whether there is anything to go by."""
        return False

    def first_order(self, loss: torch.Tensor, factor: float, again: Callable[[], torch.Tensor]) -> bool:
        """Run backward on factor * loss, which updates the weights. Returns whether that was done.

        again: with clip="two_pass", computes the same loss again, with the same dropout. All ranks call. False if the
        gradients of a first pass were not finite on whatever rank; then nothing has changed.
        """
        scale = self.progress["loss_scale"] if self._fp16 else 1.0
        if self.clip == "two_pass":
            self._squares = []
            with self.using_gradients(measuring=True):
                self._backward(loss, factor * scale)
            self.grad_norm = norm = self._norm() / scale
            if self._fp16:
                self._adapt_loss_scale(math.isfinite(norm))
            if not math.isfinite(norm):
                return False
            del loss
            loss = again()
            self._scale = min(1.0, self.hyper.max_norm / (norm + 1e-6)) / scale
        with self.using_gradients():
            self._backward(loss, factor * scale)
        self._scale = 1.0
        return True

    def _backward(self, loss: torch.Tensor, factor: float) -> None:
        (loss.to(torch.promote_types(loss.dtype, torch.float32)) * factor).backward()

    @contextlib.contextmanager
    def using_gradients(self, measuring: bool = False) -> Iterator[None]:
        """While this lasts, gradients that come are of this step; at its end those that did not come count as zero.

        measuring: take but their norms; no weight moves.
        """
        self._in_step, self._measuring = True, measuring
        try:
            yield
            self.gradients.finish()
        except BaseException:
            self.gradients.forget()
            raise
        finally:
            self._in_step = self._measuring = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget a backward without a step, as one that was interrupted. No gradients are held."""
        self.gradients.forget()

    def _norm(self) -> float:
        total = torch.stack(self._squares).sum().view(1)
        self.placement.sum_of_parts(total)
        return total.sqrt().item()

    def _adapt_loss_scale(self, finite: bool) -> None:
        scale, since = self.progress["loss_scale"], self.progress["since_overflow"] + 1
        if not finite:
            scale, since = scale / 2, 0
        elif since == GROW_EVERY:
            scale, since = scale * 2, 0
        self.set_progress(loss_scale=scale, since_overflow=since)

    def needs_closure(self) -> str:
        """Why a backward outside `step` cannot be a step; empty where it can."""
        return ""

    def _call(self, closure: Callable[[], Any]) -> Any:
        """What a closure returns, with a graph; backward is to come afterwards."""
        self._in_closure = True
        try:
            with torch.enable_grad():
                return closure()
        finally:
            self._in_closure = False

    def _use(self, bucket: Bucket) -> None:
        reason = backward_in_closure(self) if self._in_closure else self.needs_closure()
        if not self._in_step and reason:
            self.gradients.forget()
            raise ValueError(reason)
        if self._measuring:
            self._squares += [_square(part, gradient) for part, gradient in bucket]
            return
        if self._step_is_new:
            self._check_contiguous()
            self._step_is_new, self._moved = False, kernels.Moved(0.0, 0.0)
        if self.clip == "tensor":
            squares = torch.stack([_square(part, gradient) for part, gradient in bucket])
            self.placement.sum_of_parts(squares)
            scales = (self.hyper.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        else:
            scales = [self._scale] * len(bucket)
        if self.clip != "none":
            bucket = [
                (part, None if gradient is None else _exact(gradient) * scale)
                for (part, gradient), scale in zip(bucket, scales, strict=True)
            ]
        self.update_bucket(bucket)

    def end_step(self, done: bool) -> None:
        """Count a step, and let all ranks see the new weights. All ranks call."""
        if any(parameter.grad is not None for parameter in self._names):
            refuse(type(self), "ddp")  # it alone puts gradients back that were taken away
        self._step_is_new = True
        if done:
            self.placement.publish()
        self.set_progress(steps=self.steps + 1, skipped=self.skipped_steps + (not done))


def _square(part: Part, gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        return part.elements.new_zeros((), dtype=torch.promote_types(part.elements.dtype, torch.float32))
    return _exact(gradient).square().sum()


def _exact(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def sum_and_count(result: Any) -> tuple[Any, Any]:
    """What a closure returned as (sum of losses, number of samples): a mean counts as one sample of every rank."""
    return result if isinstance(result, tuple) else (result, 1.0)
