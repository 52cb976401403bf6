"""Addax: a zeroth-order step on long sequences and a first-order one on short ones, both in place and at once.

Source: Li et al., "Addax: Utilizing Zeroth-Order Gradients to Improve Memory Efficiency and Performance of SGD for
Fine-Tuning Language Models", ICLR 2025 (arXiv 2410.06441), Algorithm 1 and Equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from ds_memopt.optimizers.base.hyper_parameters import LR, either, hyper_parameter, integer, real
from ds_memopt.optimizers.probes.directions import NoiseTerms
from ds_memopt.optimizers.probes.probe import Probe, ProbeHyperParameters
from ds_memopt.optimizers.probes.recorder import Recorder
from ds_memopt.optimizers.stored_weights.in_place_optimizer import InPlaceHyperParameters
from ds_memopt.optimizers.stored_weights.repeat import repeatable
from ds_memopt.optimizers.stored_weights.updates_in_backward import (
    Bucket,
    ClippingHyperParameters,
    UpdatesInBackward,
    sum_and_count,
)


@dataclass(frozen=True, kw_only=True)
class AddaxHyperParameters(ProbeHyperParameters, ClippingHyperParameters, InPlaceHyperParameters):
    """What all in-place methods have, those of the probe, how gradients are clipped, and Addax's own."""

    positional = ("lr", "alpha", "epsilon", "weight_decay")

    lr: float = hyper_parameter(1e-4, LR, "Learning rate; lr * alpha is what MeZO has for lr.", True)
    alpha: float = hyper_parameter(1e-3, real("[0, 1]", "1e-3 is usual."), "Share of the zeroth-order half.")
    length_threshold: int | Literal["auto"] | None = hyper_parameter(
        "auto",
        either(integer(1, None, "Try 'auto'."), "auto", None),
        "Tokens, of the longest rows in the first-order half; None: rows are not told apart (Addax-WA), and of each "
        "rank's batch the first zo_batch rows are the zeroth-order half; 'auto': the largest number that fits "
        "memory_gib, measured at the first batch.",
    )
    zo_batch: int | None = hyper_parameter(
        None,
        either(integer(1, None, "Leave it out."), None),
        "Rows of the zeroth-order half on each rank, K0, for samplers, Addax-WA and 'auto'.",
    )
    fo_batch: int | None = hyper_parameter(
        None, either(integer(1, None, "Leave it out."), None), "Rows of the first-order half on each rank, K1."
    )
    memory_gib: float | None = hyper_parameter(
        None,
        either(real("(0, 1e6]", "Leave it out on a GPU."), None),
        "What a rank may use, for 'auto'; by default what the device has.",
    )


class Addax(UpdatesInBackward):
    """With z = Noise(seed, t, 0), losses L0 of the zeroth-order half of a batch and L1 of the first-order half:

        g0 = [L0(theta + epsilon z) - L0(theta - epsilon z)] / (2 epsilon),  g1 = grad L1(theta)
        theta <- theta * (1 - lr * weight_decay) - lr * (alpha * g0 * z + (1 - alpha) * g1)

    g0 is taken first, at the weights before the step; then backward makes g1, and each parameter moves as soon as its
    gradient is there. A half that has no samples on any rank is left out, and the other keeps its factor.

    Under an engine a batch is divided by the true length of its rows: those above length_threshold are the zeroth-order
    half. In plain PyTorch and FSDP2 call `optimizer.step(zo_closure, fo_closure)`. If backward raises an exception,
    what it has reached by then is updated, and the rest is not.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `Addax.from_model`.
    model: the model that the parameters belong to. All else: `AddaxHyperParameters`.

    Raises ValueError for a hyper-parameter out of range.
    """

    hyper_parameters = AddaxHyperParameters
    family = "split batch"
    uses_gradients, uses_losses, replayable = True, True, False
    splits_batch, smallest_batch = True, 2
    for_equal_lengths = {"length_threshold": None}
    hyper: AddaxHyperParameters

    def build(self) -> tuple[dict[str, Any], dict[str, Any], *tuple[str, ...]]:
        hyper = self.hyper
        self.alpha, self.length_threshold, self.memory_gib = hyper.alpha, hyper.length_threshold, hyper.memory_gib
        self.zo_batch, self.fo_batch = hyper.zo_batch, hyper.fo_batch
        self.probe = Probe(self, hyper)
        self.recorder = Recorder(self, self.probe, hyper.trajectory)
        self._g0, self._terms = math.nan, []  # of the step that is made: the slope, and the noise terms
        # Checkpoints have a momentum's part as well, which stays as it is.
        start = {"history": [], "mean_square": 0.0} | self.probe.START | self.recorder.START
        # Not the threshold and the batches: with others a run may go on.
        own = {"alpha": hyper.alpha, "clip": hyper.clip, "max_norm": hyper.max_norm}
        return self.probe.meaning() | own, start, *self.probe.words()

    def release(self) -> None:
        super().release()
        self.probe.release()

    def begin(self, total: torch.Tensor | float, count: Any) -> float | None:
        """As for all: and sets g0 from what was observed of the zeroth-order half."""
        self.recorder.open()
        first = self._sums_of(total, count)
        observed = self.probe.take()
        if observed is None:
            observed = first.new_zeros(len(self.probe.evaluations()) + 1)
        sums = torch.cat([observed, first])
        self.placement.sum(sums)
        *observed, not_finite, samples, ranks = sums.tolist()
        g0 = self.probe.projected(observed)[0] if observed[-1] else 0.0
        if not_finite or not math.isfinite(g0) or not (samples or observed[-1]):
            self._g0 = math.nan
            return None
        self._g0, self._terms = g0, [(self.steps, 0, self.alpha * g0)] if observed[-1] else []
        return ranks / samples if samples else 0.0

    @property
    def passes(self) -> float | None:
        if self.length_threshold is not None or not (self.zo_batch and self.fo_batch):
            return None
        zo = self.zo_batch * self.probe.passes if self.alpha > 0 else 0
        fo = self.fo_batch if self.alpha < 1 else 0
        return (zo + fo) / (self.zo_batch + self.fo_batch)

    def update_bucket(self, bucket: Bucket) -> None:
        directions, share = self.probe.directions, 1 - self.alpha
        noises = [NoiseTerms(directions, part.name, part.start, self._terms) for part, _ in bucket]
        self.move(
            self.step_of(part, gradient=gradient, share=share, noise=noise)
            for (part, gradient), noise in zip(bucket, noises, strict=True)
        )

    def needs_closure(self) -> str:
        return "Addax measures the zeroth-order half first: call optimizer.step(zo_closure, fo_closure)."

    def without_first_order(self) -> bool:
        """Make the step where no rank has samples of the first-order half: all parts move along the noise alone."""
        with self.using_gradients():
            return True

    def end_step(self, done: bool) -> None:
        self.recorder.append(self.steps, done, [self._g0])
        super().end_step(done)

    @torch.compiler.disable
    @torch.no_grad()
    def step(
        self,
        zo_closure: Callable[[], Any] | None = None,
        fo_closure: Callable[[], Any] | None = None,
        *,
        closure: None = None,
    ):
        """Make one step, from a closure for each half; None for a half that no rank has.

        They return the mean loss over this rank's samples of that half, or (sum of losses, number of samples or
        tokens): (loss * 0, 0) on a rank that has none. zo_closure is called twice without a graph, fo_closure once
        with one (twice with clip="two_pass"). Returns the first result of each. All ranks call.
        closure: nothing; torch's get_optimizer_state_dict says so.
        """
        if zo_closure is None and fo_closure is None:
            if self._makes_state_alone():
                return None
            raise ValueError(self.needs_closure())
        self.check_parameters()
        self.probe.forget()
        zo_first = self.probe.evaluate(zo_closure) if zo_closure is not None and self.alpha > 0 else None
        if fo_closure is None or self.alpha == 1:
            factor = self.begin(0.0, 0.0)
            self.end_step(factor is not None and self.without_first_order())
            return zo_first, None
        again = repeatable(partial(self._call, fo_closure), next(iter(self._names)).device)
        first = self._call(fo_closure)
        with torch.enable_grad():
            total, count = sum_and_count(first)
            factor = self.begin(total, count)
            if factor == 0:
                done = self.without_first_order()
            else:
                done = factor is not None and self.first_order(total, factor, lambda: sum_and_count(again())[0])
        self.end_step(done)
        return zo_first, first

    def _loaded(self) -> None:
        self.recorder.close()
