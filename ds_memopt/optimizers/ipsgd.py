"""IPSGD: gradient descent in place, each gradient used up and freed inside backward; no state, no set of gradients.

Sources: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO, arXiv
2306.09782); Li et al., "Addax" (ICLR 2025, arXiv 2410.06441), whose first-order half it is; Lv et al., "AdaLomo" (arXiv
2310.10195), for rule="adalomo".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from ds_memopt.blocks import full_shape
from ds_memopt.optimizers.base.hyper_parameters import choice, hyper_parameter
from ds_memopt.optimizers.base.named_optimizer import make_log_visible
from ds_memopt.optimizers.stored_weights.adalomo import AdaLomo
from ds_memopt.optimizers.stored_weights.in_place_optimizer import InPlaceHyperParameters
from ds_memopt.optimizers.stored_weights.repeat import repeatable
from ds_memopt.optimizers.stored_weights.updates_in_backward import (
    Bucket,
    ClippingHyperParameters,
    UpdatesInBackward,
    sum_and_count,
)
from ds_memopt.shards import Part, is_first_rank

logger = logging.getLogger("ds_memopt")


@dataclass(frozen=True, kw_only=True)
class IPSGDHyperParameters(InPlaceHyperParameters, ClippingHyperParameters):
    """What all in-place methods have, how gradients are clipped, and the rule."""

    rule: Literal["sgd", "adalomo"] = hyper_parameter(
        "sgd",
        choice("sgd", "adalomo", remedy="'sgd' is usual."),
        "'sgd', or 'adalomo': g over the root of its factored second moment, in steps relative to the size of a "
        "parameter, see `AdaLomo`. Its state is one number per row and column of a matrix.",
    )


class IPSGD(UpdatesInBackward):
    """theta <- theta * (1 - lr * weight_decay) - lr * g, where backward makes g.

    Under an engine or FSDP2 the loop stays as it is. In plain PyTorch call `loss.backward(); optimizer.step()` after
    every forward, or `optimizer.step(closure)`, where the closure returns the loss and is called once for each pass.
    If backward raises an exception, what it has reached by then is updated, and the rest is not.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `IPSGD.from_model`.
    model: the model that the parameters belong to. All else: `IPSGDHyperParameters`.

    Raises ValueError for a hyper-parameter out of range.
    """

    hyper_parameters = IPSGDHyperParameters
    family = "in backward"
    hyper: IPSGDHyperParameters

    def build(self) -> tuple[dict[str, Any], dict[str, Any]]:
        hyper = self.hyper
        self._rule = AdaLomo() if hyper.rule == "adalomo" else None
        self._told = False
        return {"rule": hyper.rule, "clip": hyper.clip, "max_norm": hyper.max_norm, "keep": hyper.keep}, {}

    def update_bucket(self, bucket: Bucket) -> None:
        rates: list[Any] = [1.0] * len(bucket)
        if self._rule is not None:
            # A missing gradient counts as zero, as elsewhere: the moments forget.
            filled = [(part, torch.zeros_like(part.elements) if g is None else g) for part, g in bucket]
            states = [self._moments(part) for part, _ in bucket]
            shapes = [full_shape(part.parameter) for part, _ in bucket]
            updates, rates = self._rule.directions(filled, shapes, states, self.steps + 1, self.placement.sum_of_parts)
            bucket = [(part, update) for (part, _), update in zip(bucket, updates, strict=True)]
        self.move(
            self.step_of(part, rate, gradient=gradient) for (part, gradient), rate in zip(bucket, rates, strict=True)
        )

    def step_bytes(self) -> int | None:
        return super().step_bytes() if self._rule is None else None

    def needs_closure(self) -> str:
        if self.clip == "two_pass":
            return 'clip="two_pass" runs backward twice: call optimizer.step(closure), whose closure returns the loss.'
        return ""

    def _moments(self, part: Part) -> dict[str, torch.Tensor]:
        state = self.state[part.parameter]
        new = self._rule.new_state(part, full_shape(part.parameter))
        for key, (_, zeros) in new.items():
            if key not in state:  # rows and columns are whole on every rank
                own = key != "square"
                state[key] = zeros if own else self.placement.new_state(part.parameter, None, zeros.dtype)
        return {key: self.placement.local(state[key]) for key in new}

    def _states(self, part: Part) -> dict[str, tuple[int, torch.Tensor]]:
        states = super()._states(part)
        if self._rule is not None:
            starts = {key: start for key, (start, _) in self._rule.new_state(part, full_shape(part.parameter)).items()}
            states |= {key: (starts[key], value) for key, value in self._moments(part).items()}
        return states

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None):
        """End the step that backward has made, or make one with a closure. Returns the closure's first result.

        closure: returns the mean loss over this rank's samples, or (sum of losses, number of samples or tokens), with a
            graph for backward. With clip="two_pass" it is called twice, with the same random numbers.
        All ranks call. If a closure's loss is not finite, on whatever rank, or with clip="two_pass" a gradient, all
        skip. What backward has done without a closure cannot be taken back.
        """
        self.check_parameters()
        if closure is not None:
            again = repeatable(partial(self._call, closure), next(iter(self._names)).device)
            first = self._call(closure)
            with torch.enable_grad():
                total, count = sum_and_count(first)
                factor = self.begin(total, count)
                done = factor is not None and self.first_order(total, factor, lambda: sum_and_count(again())[0])
            self.end_step(done)
            return first
        if not self.gradients.began and self._makes_state_alone():
            return None
        if not self.gradients.began:
            raise ValueError("IPSGD.step has no gradient to go by. Call loss.backward() before, or pass a closure.")
        self._tell_of_clipping()
        self.gradients.finish()
        self.end_step(done=True)
        return None

    def _tell_of_clipping(self) -> None:
        """Once: nobody asks this optimizer before clipping gradients that are gone, as Trainer does by default."""
        if self.clip == "none" and not self._told and is_first_rank():
            make_log_visible()
            logger.warning(
                "IPSGD uses gradients up inside backward: clip_grad_norm_, and Trainer's max_grad_norm, find none and "
                'do nothing. To clip set clip="tensor", or clip="two_pass" and call step(closure), with max_norm.'
            )
        self._told = True
