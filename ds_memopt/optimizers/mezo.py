"""MeZO: fine-tuning with forward passes only.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (arXiv 2305.17333),
Algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ds_memopt import kernels
from ds_memopt.optimizers.base.hyper_parameters import LR, choice, flag, hyper_parameter, integer, real
from ds_memopt.optimizers.probes.directions import DirectionHyperParameters, NoiseTerms
from ds_memopt.optimizers.probes.probe import Probe, ProbeHyperParameters
from ds_memopt.optimizers.probes.recorder import Recorder
from ds_memopt.optimizers.stored_weights.in_place_optimizer import InPlaceHyperParameters, InPlaceOptimizer

FORGOTTEN = 0.01
"""Momentum terms of a smaller weight than this, relative to the newest, are left out."""


@dataclass(frozen=True, kw_only=True)
class MeZOHyperParameters(DirectionHyperParameters, ProbeHyperParameters, InPlaceHyperParameters):
    """What all in-place methods have, those of the probe and of its directions, and MeZO's own."""

    positional = ("lr", "epsilon", "weight_decay")

    lr: float = hyper_parameter(1e-6, LR, "Learning rate; the paper uses 1e-7 to 1e-6.", True)
    probes: int = hyper_parameter(1, integer(1, 10_000, "1 is usual."), "n, directions per step.")
    estimator: Literal["two_sided", "one_sided"] = hyper_parameter(
        "two_sided",
        choice("two_sided", "one_sided", remedy="'two_sided' is the paper's."),
        "How g is taken from the losses, see `MeZO`.",
    )
    momentum: float = hyper_parameter(
        0.0,
        real("[0, 0.999]", "0 is usual."),
        "b of the average (1 - b) * sum_i b^i g_{t-i} z_{t-i}, whose noise is recomputed at every step from the last "
        "g: no state per parameter, but up to log(0.01) / log(b) times the noise of an update.",
    )
    normalize: bool = hyper_parameter(
        False,
        flag("false is usual."),
        "Divide g by the root of its squares' moving average (decay 0.99): what is left of Adam's second moment, which "
        "is nearly the same for all parameters here.",
    )


@dataclass(frozen=True)
class Momentum:
    """From g of each probe, the terms (step, probe, factor) along whose noise the weights move.

    momentum: b of the average (1 - b) * sum_i b^i g_{t-i} z_{t-i}. normalize: whether g is divided by the root of the
    moving average of its squares.
    """

    START: ClassVar[dict[str, Any]] = {"history": [], "mean_square": 0.0}
    """How its part of the method's `progress` begins."""

    momentum: float
    normalize: bool

    def terms(
        self, projected: list[float], step: int, made: int, progress: dict[str, Any]
    ) -> tuple[list[tuple[int, int, float]], dict[str, Any]]:
        """The terms of this step, and what of `progress` it changes. made: steps that moved the weights, with this."""
        history, mean_square = list(progress["history"]), progress["mean_square"]
        if self.normalize:
            mean_square = 0.99 * mean_square + 0.01 * sum(g * g for g in projected) / len(projected)
            scale = math.sqrt(mean_square / (1 - 0.99**made)) or 1.0
            projected = [g / scale for g in projected]
        length = math.ceil(math.log(FORGOTTEN) / math.log(self.momentum)) if self.momentum else 1
        history = [*history, (step, projected)][-length:]
        terms = [
            (earlier, probe, (1 - self.momentum) * self.momentum ** (step - earlier) * g / len(gs))
            for earlier, gs in history
            for probe, g in enumerate(gs)
        ]
        return terms, {"history": history if self.momentum else [], "mean_square": mean_square}


class MeZO(InPlaceOptimizer):
    """MeZO under any placement. At step t, with z_j = Noise(seed, t, j) and n probes:

        g_j = [L(theta + epsilon z_j) - L(theta - epsilon z_j)] / (2 epsilon)          ("two_sided")
        g_j = [L(theta + epsilon z_j) - L(theta)] / epsilon                             ("one_sided")
        theta <- theta * (1 - lr * weight_decay) - lr / n * sum_j g_j z_j

    L is the mean over the samples of all ranks and micro-batches. Noise is recomputed wherever it is needed, from the
    parameter's name and the element's index, so that it is the same on any number of ranks. No gradients, no masters.

    params: named parameters (`model.named_parameters()`) or param groups of them. Prefer `MeZO.from_model`.
    model: the model that the parameters belong to. All else: `MeZOHyperParameters`.

    Raises ValueError for a hyper-parameter out of range, for keep="residual" with fp16 weights, and for a trajectory
    that cannot be written.
    """

    hyper_parameters = MeZOHyperParameters
    family = "zeroth order"
    uses_gradients, uses_losses, replayable = False, True, True
    hyper: MeZOHyperParameters

    def build(self) -> tuple[dict[str, Any], dict[str, Any], *tuple[str, ...]]:
        hyper = self.hyper
        self.probe = Probe(self, hyper, hyper.probes, hyper.estimator, hyper)
        self.rule = Momentum(hyper.momentum, hyper.normalize)
        self.recorder = Recorder(self, self.probe, hyper.trajectory)
        start = self.rule.START | self.probe.START | self.recorder.START
        return self.probe.meaning(hyper.momentum, hyper.normalize), start, *self.probe.words()

    def release(self) -> None:
        super().release()
        self.probe.release()

    @property
    def passes(self) -> float | None:
        return self.probe.passes

    def _makes_state_alone(self) -> bool:
        asked = super()._makes_state_alone()
        if asked:
            self.probe.choose_thresholds()  # torch.distributed.checkpoint loads what is there already
        return asked

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """Make one step from what was observed, or from a closure that is called once for every evaluation.

        closure: returns the mean loss over this rank's samples, or (sum of losses, number of samples or tokens); any
            number that Python can compute will do, no gradient is needed. Returns its first result.
        All ranks call. If a loss is not finite, on whatever rank, all skip the update.
        """
        first = self.probe.evaluate(closure) if closure is not None else None
        sums = self.probe.take()
        if sums is None and self._makes_state_alone():
            return None
        if sums is None:
            raise ValueError("MeZO.step has no loss to go by. Pass a closure, or call engine.backward(loss) before.")
        self.placement.sum(sums)
        self.apply(self.probe.projected(sums.tolist()))
        return first

    @torch.no_grad()
    def apply(self, projected: list[float]) -> None:
        """Update the weights by g of each probe, and count the step. All ranks have the same g, finite or not."""
        self._check_contiguous()
        self.probe.choose_thresholds()
        self.recorder.open()
        step, finite, changes = self.steps, all(map(math.isfinite, projected)), {}
        if finite:
            terms, changes = self.rule.terms(projected, step, step - self.skipped_steps + 1, self.progress)
            self._moved = kernels.Moved(0.0, 0.0)
            directions = self.probe.directions
            self.move(
                self.step_of(part, noise=NoiseTerms(directions, part.name, part.start, terms))
                for part in self.placement.parts()
            )
            self.placement.publish()
        self.set_progress(steps=step + 1, skipped=self.skipped_steps + (not finite), **changes)
        self.recorder.append(step, finite, projected)

    def _loaded(self) -> None:
        self.probe.directions.thresholds = self.progress["thresholds"]
        self.recorder.close()
