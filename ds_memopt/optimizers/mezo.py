"""MeZO: fine-tuning with forward passes only.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (arXiv 2305.17333),
Algorithms 1 and 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ds_memopt.blocks import bare_parameters, partition_into_blocks
from ds_memopt.optimizers.base.hyper_parameters import (
    LR,
    HyperParameters,
    check_range,
    choice,
    either,
    flag,
    hyper_parameter,
    integer,
    path,
    real,
)
from ds_memopt.optimizers.base.named_optimizer import make_log_visible
from ds_memopt.optimizers.probes.checksum import as_hex, checksum
from ds_memopt.optimizers.probes.directions import DirectionHyperParameters, Directions
from ds_memopt.optimizers.probes.lockstep import Lockstep
from ds_memopt.optimizers.probes.noise import NOISE_VERSION, Noise
from ds_memopt.optimizers.probes.perturb import Perturbation
from ds_memopt.optimizers.probes.trajectory import SKIPPED, TrajectoryHeader, TrajectoryWriter, check_writable
from ds_memopt.optimizers.stored_weights.in_place_optimizer import (
    InPlaceHyperParameters,
    InPlaceOptimizer,
    backward_in_closure,
)
from ds_memopt.shards import Part, is_first_rank, on_first_rank
from ds_memopt.support import refuse

logger = logging.getLogger("ds_memopt")

FORGOTTEN = 0.01
"""Momentum terms of a smaller weight than this, relative to the newest, are left out."""


SMALLEST_EPSILON = {torch.float64: 1e-8, torch.float32: 1e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}
"""By the weights' dtype, from where on g is a difference of roundings. Its error was measured on a Llama of 3 M
parameters, before and after training, relative to its root mean square: 0.01 to 0.2 at 1e-3; at these limits 0.1 to 0.2
in fp64, 0.4 to 0.7 in fp32, 0.5 in fp16, 0.4 to 1.6 in bf16; at Adam's 1e-8 5 in fp32 and 600 in bf16."""


def check_epsilon(epsilon: float, dtype: torch.dtype) -> None:
    """Raise ValueError for a probe that is too small for weights of this dtype."""
    least = SMALLEST_EPSILON[dtype]
    limit = f"at least {least:.0e} for weights in {dtype}, or the two losses would differ by rounding alone"
    check_range("epsilon", epsilon, epsilon >= least, limit, "1e-3 is usual.")


@dataclass(frozen=True, kw_only=True)
class ProbeHyperParameters(HyperParameters):
    """Those of a probe of the loss, which Addax has as well."""

    epsilon: float = hyper_parameter(1e-3, real("(0, 1]", "1e-3 is usual."), "Size of the probe.")
    noise: Literal["gaussian", "rademacher"] = hyper_parameter(
        "gaussian",
        choice("gaussian", "rademacher", remedy="'gaussian' is the paper's."),
        "Distribution of z; 'rademacher': +1 and -1.",
    )
    seed: int = hyper_parameter(0, integer(-(2**63), 2**64 - 1, "0 is usual."), "Of all noise.")
    lockstep: bool = hyper_parameter(
        True,
        flag("true is usual."),
        "At ZeRO-3 run both signs through a layer while it is gathered, if the first step shows the same losses.",
    )
    compiled: bool | None = hyper_parameter(
        None,
        either(flag("Leave it out."), None),
        "Generate noise with torch.compile, the same numbers faster; None: if that works here.",
    )
    trajectory: str | None = hyper_parameter(
        None,
        either(path("Name a new file."), None),
        "File to write each step's scalars to, from which `ds-memopt replay` rebuilds the weights, or None. A new one, "
        "unless the run resumes: then its own. The first rank writes it; with it, building the method is a collective.",
    )


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


class _Unwritten:
    """The trajectory on all ranks but the first."""

    def append(self, *record: Any) -> None:
        """The first rank writes the same."""


class Evaluation(NamedTuple):
    """One forward pass of a step: at weights + coefficient * z of this probe."""

    probe: int
    coefficient: float


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

    def __init__(self, params: Iterable, *positional: Any, model: nn.Module | None = None, **named: Any) -> None:
        super().__init__(params, *positional, model=model, **named)
        hyper = self.hyper
        epsilon, noise, keep, seed, layers = hyper.epsilon, hyper.noise, hyper.keep, hyper.seed, hyper.layers
        self.epsilon, self.probes, self.two_sided = epsilon, hyper.probes, hyper.estimator == "two_sided"
        self.momentum, self.normalize, self.lockstep = hyper.momentum, hyper.normalize, hyper.lockstep
        for weights_dtype in {p.dtype for p in self._names}:
            check_epsilon(epsilon, weights_dtype)
        self._perturbation: Perturbation | None = None
        self._reach_checked = False
        self._sums: torch.Tensor | None = None
        compiled = self._can_compile(noise) if hyper.compiled is None else hyper.compiled
        picked = hyper.layer_fraction, hyper.rank, hyper.refresh_every, hyper.magnitude_fraction, layers
        self.directions = Directions(model, self._names, noise, seed, compiled, *picked)
        described = {
            "epsilon": epsilon, "probes": hyper.probes, "noise": noise, "estimator": hyper.estimator, "keep": keep,
            "momentum": hyper.momentum, "normalize": hyper.normalize, "layer_fraction": hyper.layer_fraction,
            "rank": hyper.rank, "refresh_every": hyper.refresh_every, "magnitude_fraction": hyper.magnitude_fraction,
            "seed": seed,
        }  # fmt: skip
        start = {"history": [], "mean_square": 0.0, "thresholds": {}, "base_checksum": ""}
        told = [] if layers is None else [f"layers {zlib.crc32(json.dumps(self.directions.layers).encode()):08x}"]
        self._describe(described, start, *told, f"noise version {NOISE_VERSION}")
        self.trajectory, self._writer = hyper.trajectory, None
        if self.trajectory is not None:
            on_first_rank(partial(check_writable, self.trajectory))

    def release(self) -> None:
        super().release()
        if self._perturbation is not None:
            self._perturbation.remove()

    def evaluations(self) -> list[Evaluation]:
        """The forward passes of a step, in order."""
        probes = range(self.probes)
        if self.two_sided:
            return [Evaluation(j, c) for j in probes for c in (self.epsilon, -self.epsilon)]
        return [Evaluation(0, 0.0), *(Evaluation(j, self.epsilon) for j in probes)]

    @property
    def passes(self) -> float | None:
        """Forward and backward passes of a token in a step, where a forward alone is a third; None: they differ."""
        return len(self.evaluations()) / 3

    @contextlib.contextmanager
    def perturbed(self, evaluation: Evaluation) -> Iterator[None]:
        """While this lasts, forwards of the model in this thread run at the evaluation's weights, without dropout."""
        self._check_parameters()
        if self._perturbation is None:  # not before: FSDP2 and ZeRO-3 lay their hooks first
            names = {name: p for p, name in self._names.items()}
            current = bare_parameters(self._model)
            self._perturbation = Perturbation(self._model, {id(current[name]): name for name in names})
            self._choose_thresholds()
        self._without_dropout = [module for module in self._model.modules() if module.training]
        step, probe = self.steps, evaluation.probe
        self._coefficient = evaluation.coefficient

        def add(copy: torch.Tensor, weights: torch.Tensor, name: str) -> None:
            device = copy.device.type
            bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
            if bf16 and copy.dtype != torch.bfloat16:  # weights in bf16 are rounded anyway
                refuse(type(self), "bf16_autocast")
            self.directions.add_(copy, weights, name, 0, step, probe, self._coefficient)

        with self._perturbation.applied(add if self._coefficient else None):
            self._set_training(False)
            try:
                yield
            finally:
                self._set_training(True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside `perturbed`: while this lasts, forwards in another thread run as outside."""
        self._set_training(True)
        try:
            yield
        finally:
            self._set_training(False)

    def _set_training(self, training: bool) -> None:
        for module in self._without_dropout:
            module.training = training

    def _choose_thresholds(self) -> None:
        self.directions.choose_thresholds(self.shards)
        self._set_progress(thresholds=self.directions.thresholds)

    def _makes_state_alone(self) -> bool:
        asked = super()._makes_state_alone()
        if asked:
            self._choose_thresholds()  # torch.distributed.checkpoint loads what is there already
        return asked

    def _can_compile(self, kind: str) -> bool:
        device = next(iter(self._names)).device
        try:
            Noise(0, 0, 0, kind, compiled=True).values("", 0, 1, device)
        except RuntimeError as error:
            if is_first_rank():
                make_log_visible()
                logger.info("MeZO's noise is not compiled, which is slower: %s", str(error).splitlines()[0])
            return False
        return True

    def new_lockstep(self) -> Lockstep:
        """What runs both signs of a probe in one forward of the model.

        Raises ValueError where the model cannot be split.
        """

        def set_sign(sign: int) -> None:
            self._coefficient = sign * self.epsilon
            self._perturbation.renew()

        layers = partition_into_blocks(self._model, bare_parameters(self._model)).blocks
        return Lockstep(self._model, list(layers), set_sign)

    def observe(self, number: int, total: Any, weight: Any) -> None:
        """Add the losses of a micro-batch at evaluation `number`: their sum, and the number of samples or tokens."""
        self.check_loss(total)
        if self._sums is None:
            device = next(iter(self._names)).device
            self._sums = torch.zeros(len(self.evaluations()) + 1, dtype=torch.float64, device=device)
        if number and weight and not self._reach_checked:  # a rank without samples may run no forward
            self._check_reach(self._perturbation.reached)
        self._sums[number] += total
        if number == 0:
            self._sums[-1] += weight

    def _check_reach(self, reached: set[str]) -> None:
        """Raise ValueError unless forwards have read perturbed weights; name those that none has read."""
        method = type(self).__name__
        missing = [name for name in self._names.values() if name not in reached]
        if not reached:
            self._sums = None
            raise ValueError(
                f"The losses of {method}'s step were computed without a forward of its model, so no perturbation "
                f"reached them. Compute them with the model that {method} was built on: not with a copy, nor with "
                "what was traced or exported from it."
            )
        if missing and is_first_rank():
            make_log_visible()
            logger.warning(
                "%s: no forward of the first step reached %d of %d parameters, such as %s. If the loss depends on them "
                "all the same, their modules are not called, and it is probed without them.",
                method, len(missing), len(self._names), missing[0],
            )  # fmt: skip
        self._reach_checked = True

    def check_loss(self, total: Any) -> None:
        """Raise ValueError for a loss in 16 bits, whose rounding alone is 2 in g at an epsilon of 1e-3."""
        if isinstance(total, torch.Tensor) and total.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"The loss is {total.dtype}, too coarse for differences of {self.epsilon} around it. Compute it in "
                "fp32, from logits.float()."
            )

    @torch.no_grad()
    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call the closure at the weights of every evaluation of the step, and observe; returns its first result."""
        results = []
        for evaluation in self.evaluations():
            with self.perturbed(evaluation):
                try:
                    results.append(closure())
                except RuntimeError as error:
                    if "does not require grad" in str(error):  # autograd's words, where there is no graph
                        raise ValueError(backward_in_closure(self)) from error
                    raise
        for number, result in enumerate(results):  # all or none: what an exception interrupts must not count
            self.observe(number, *(result if isinstance(result, tuple) else (result, 1.0)))
        return results[0]

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """Make one step from what was observed, or from a closure that is called once for every evaluation.

        closure: returns the mean loss over this rank's samples, or (sum of losses, number of samples or tokens); any
            number that Python can compute will do, no gradient is needed. Returns its first result.
        All ranks call. If a loss is not finite, on whatever rank, all skip the update.
        """
        first = self.evaluate(closure) if closure is not None else None
        if self._sums is None and self._makes_state_alone():
            return None
        if self._sums is None:
            raise ValueError("MeZO.step has no loss to go by. Pass a closure, or call engine.backward(loss) before.")
        sums, self._sums = self._sums, None
        self.shards.sum(sums)
        self.apply(self._projected(sums.tolist()))
        return first

    def _projected(self, sums: list[float]) -> list[float]:
        """g of each probe, from the sums over all ranks."""
        *losses, weight = sums
        losses = [loss / weight if weight else math.nan for loss in losses]
        if self.two_sided:
            pairs = zip(losses[::2], losses[1::2], strict=True)
            return [(above - below) / (2 * self.epsilon) for above, below in pairs]
        return [(above - losses[0]) / self.epsilon for above in losses[1:]]

    @torch.no_grad()
    def apply(self, projected: list[float]) -> None:
        """Update the weights by g of each probe, and count the step. All ranks have the same g, finite or not."""
        self._check_contiguous()
        self._choose_thresholds()
        self._open_trajectory()
        observed = list(projected)
        finite = all(map(math.isfinite, projected))
        step, history, mean_square = self.steps, list(self.progress["history"]), self.progress["mean_square"]
        if finite:
            if self.normalize:
                mean_square = 0.99 * mean_square + 0.01 * sum(g * g for g in projected) / len(projected)
                made = step - self.skipped_steps + 1
                scale = math.sqrt(mean_square / (1 - 0.99**made)) or 1.0
                projected = [g / scale for g in projected]
            history.append((step, projected))
            length = math.ceil(math.log(FORGOTTEN) / math.log(self.momentum)) if self.momentum else 1
            history = history[-length:]
            self._update(history)
        history = history if self.momentum else []
        self._set_progress(
            steps=step + 1, skipped=self.skipped_steps + (not finite), history=history, mean_square=mean_square
        )
        if self._writer is not None:
            self._writer.append(step, 0 if finite else SKIPPED, observed, [group["lr"] for group in self.param_groups])

    def _open_trajectory(self) -> None:
        """Before the first step of a run or of its continuation. All look at the weights, the first rank writes."""
        if self.trajectory is None or self._writer is not None:
            return
        if not self.progress["base_checksum"]:
            parts = list(self.shards.parts())
            total = checksum(((part.name, part.start, part.elements) for part in parts), parts[0].elements.device)
            self.shards.sum_of_parts(total)
            self._set_progress(base_checksum=as_hex(total))
        decays = [group["weight_decay"] for group in self.param_groups]
        header = TrajectoryHeader(
            method=type(self).__name__,
            hyper=self.described | {"weight_decay": decays, "layers": self.directions.layers},
            probes=self.probes,
            parameters=[[self._names[p] for p in group["params"] if p in self._names] for group in self.param_groups],
            base_checksum=self.progress["base_checksum"],
            dtype=str(next(iter(self._names)).dtype).removeprefix("torch."),
        )
        resume_after = self.steps - 1 if self.steps else None
        self._writer = on_first_rank(partial(TrajectoryWriter, self.trajectory, header, resume_after)) or _Unwritten()

    def _update(self, history: list[tuple[int, list[float]]]) -> None:
        newest = history[-1][0]
        terms = [
            (step, probe, (1 - self.momentum) * self.momentum ** (newest - step) * g / len(gs))
            for step, gs in history
            for probe, g in enumerate(gs)
        ]
        self._realised = self._intended = 0.0
        for part in self.shards.parts():
            self._move(part, partial(self._add_noise, part, terms))
        self.shards.publish()

    def _add_noise(
        self,
        part: Part,
        terms: list[tuple[int, int, float]],
        direction: torch.Tensor,
        piece: slice,
        weights: torch.Tensor,
    ) -> None:
        """Add the sum of factor * z over terms (step, probe, factor) to the direction of a piece of a part."""
        for step, probe, factor in terms:
            self.directions.add_(direction, weights, part.name, part.start + piece.start, step, probe, factor)

    def _loaded(self) -> None:
        self.directions.thresholds = self.progress["thresholds"]
        self._writer = None  # the file is to be cut back to the step that was loaded
