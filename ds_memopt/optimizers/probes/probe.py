"""A probe of the loss: forwards at perturbed weights, and from their losses g, the slope along each direction.

Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (arXiv 2305.17333),
Algorithms 1 and 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from ds_memopt.blocks import bare_parameters, partition_into_blocks
from ds_memopt.optimizers.base.hyper_parameters import (
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
from ds_memopt.optimizers.probes.directions import DirectionHyperParameters, Directions
from ds_memopt.optimizers.probes.lockstep import Lockstep
from ds_memopt.optimizers.probes.noise import NOISE_VERSION, Noise
from ds_memopt.optimizers.probes.perturb import Perturbation
from ds_memopt.optimizers.stored_weights.in_place_optimizer import InPlaceOptimizer, backward_in_closure
from ds_memopt.shards import is_first_rank
from ds_memopt.support import refuse

logger = logging.getLogger("ds_memopt")

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
        "Where no fused back end makes noise: generate it with torch.compile, the same numbers faster; None: if that "
        "works here.",
    )
    trajectory: str | None = hyper_parameter(
        None,
        either(path("Name a new file."), None),
        "File to write each step's scalars to, from which `ds-memopt replay` rebuilds the weights, or None. A new one, "
        "unless the run resumes: then its own. The first rank writes it; with it, building the method is a collective.",
    )


class Evaluation(NamedTuple):
    """One forward pass of a step: at weights + coefficient * z of this probe."""

    probe: int
    coefficient: float


class Probe:
    """For each of n directions z_j = Noise(seed, t, j) at step t, theta the weights and L the loss:

        g_j = [L(theta + epsilon z_j) - L(theta - epsilon z_j)] / (2 epsilon)          ("two_sided")
        g_j = [L(theta + epsilon z_j) - L(theta)] / epsilon                             ("one_sided")

    A step runs a forward for each of `evaluations` inside `perturbed`, hands its loss to `observe`, and takes what was
    observed, summed over the ranks, to `projected`; `evaluate` does the first two with a closure.

    optimizer: the method whose parameters are perturbed. It is asked for the model, the names, the placement, the step.
    hyper: epsilon, noise, seed, lockstep and compiled. picked: which directions, if not all.

    Raises ValueError for an epsilon too small for the weights, and for what `Directions` refuses.
    """

    START: ClassVar[dict[str, Any]] = {"thresholds": {}}
    """How its part of the method's `progress` begins."""

    def __init__(
        self,
        optimizer: InPlaceOptimizer,
        hyper: ProbeHyperParameters,
        probes: int = 1,
        estimator: Literal["two_sided", "one_sided"] = "two_sided",
        picked: DirectionHyperParameters | None = None,
    ) -> None:
        self._optimizer, self._model = optimizer, optimizer.the_model()
        self._names = optimizer.names_by_tensor()
        self._hyper, self._estimator = hyper, estimator
        self._picked = DirectionHyperParameters() if picked is None else picked
        self.epsilon, self.lockstep = hyper.epsilon, hyper.lockstep
        self.probes, self.two_sided = probes, estimator == "two_sided"
        for weights_dtype in {p.dtype for p in self._names}:
            check_epsilon(hyper.epsilon, weights_dtype)
        self._perturbation: Perturbation | None = None
        self._reach_checked = False
        self._sums: torch.Tensor | None = None
        compiled = self._can_compile(hyper.noise) if hyper.compiled is None else hyper.compiled
        self.directions = Directions(self._model, self._names, hyper.noise, hyper.seed, compiled, self._picked)

    def meaning(self, momentum: float = 0.0, normalize: bool = False) -> dict[str, Any]:
        """What tells one run's steps from another's, by name, as trajectories and checkpoints have it."""
        hyper, one = self._hyper, self._picked
        return {
            "epsilon": hyper.epsilon, "probes": self.probes, "noise": hyper.noise, "estimator": self._estimator,
            "keep": self._optimizer.keep, "momentum": momentum, "normalize": normalize,
            "layer_fraction": one.layer_fraction, "rank": one.rank, "refresh_every": one.refresh_every,
            "magnitude_fraction": one.magnitude_fraction, "seed": hyper.seed,
        }  # fmt: skip

    def words(self) -> list[str]:
        """The same, for what is no number or word."""
        layers = zlib.crc32(json.dumps(self.directions.layers).encode())
        told = [] if self._picked.layers is None else [f"layers {layers:08x}"]
        return [*told, f"noise version {NOISE_VERSION}"]

    def release(self) -> None:
        """Take all hooks off the model."""
        if self._perturbation is not None:
            self._perturbation.remove()

    def evaluations(self) -> list[Evaluation]:
        """The forward passes of a step, in order."""
        probes = range(self.probes)
        if self.two_sided:
            return [Evaluation(j, c) for j in probes for c in (self.epsilon, -self.epsilon)]
        return [Evaluation(0, 0.0), *(Evaluation(j, self.epsilon) for j in probes)]

    @property
    def passes(self) -> float:
        """The evaluations in forward and backward passes, of which a forward alone is a third."""
        return len(self.evaluations()) / 3

    @contextlib.contextmanager
    def perturbed(self, evaluation: Evaluation) -> Iterator[None]:
        """While this lasts, forwards of the model in this thread run at the evaluation's weights, without dropout."""
        self._optimizer.check_parameters()
        if self._perturbation is None:  # not before: FSDP2 and ZeRO-3 lay their hooks first
            names = {name: p for p, name in self._names.items()}
            current = bare_parameters(self._model)
            self._perturbation = Perturbation(self._model, {id(current[name]): name for name in names})
            self.choose_thresholds()
        self._without_dropout = [module for module in self._model.modules() if module.training]
        step, probe = self._optimizer.steps, evaluation.probe

        def perturb(copy: torch.Tensor, weights: torch.Tensor, name: str, factor: float) -> None:
            device = copy.device.type
            bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
            if bf16 and copy.dtype != torch.bfloat16:  # weights in bf16 are rounded anyway
                refuse(type(self._optimizer), "bf16_autocast")
            self.directions.perturb(copy, weights, name, step, probe, factor)

        with self._perturbation.applied(perturb, evaluation.coefficient):
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

    def choose_thresholds(self) -> None:
        """Look at the weights, once, before the first step. A collective where ranks hold parts."""
        self.directions.choose_thresholds(self._optimizer.placement)
        self._optimizer.set_progress(thresholds=self.directions.thresholds)

    def _can_compile(self, kind: str) -> bool:
        device = next(iter(self._names)).device
        try:
            Noise(0, 0, 0, kind, compiled=True).values("", 0, 1, device)
        except RuntimeError as error:
            if is_first_rank():
                make_log_visible()
                logger.info(
                    "%s's noise is not compiled, which is slower: %s",
                    type(self._optimizer).__name__,
                    str(error).splitlines()[0],
                )
            return False
        return True

    def new_lockstep(self) -> Lockstep:
        """What runs both signs of a probe in one forward of the model.

        Raises ValueError where the model cannot be split.
        """

        layers = partition_into_blocks(self._model, bare_parameters(self._model)).blocks
        return Lockstep(self._model, list(layers), lambda: self._perturbation.flip())

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
        method = type(self._optimizer).__name__
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
                        raise ValueError(backward_in_closure(self._optimizer)) from error
                    raise
        for number, result in enumerate(results):  # all or none: what an exception interrupts must not count
            self.observe(number, *(result if isinstance(result, tuple) else (result, 1.0)))
        return results[0]

    def take(self) -> torch.Tensor | None:
        """What this rank observed, and forget it: the sum of losses of each evaluation, and the number of samples."""
        sums, self._sums = self._sums, None
        return sums

    def forget(self) -> None:
        """Of a step that an exception interrupted."""
        self._sums = None

    def projected(self, sums: list[float]) -> list[float]:
        """g of each probe, from the sums over all ranks."""
        *losses, weight = sums
        losses = [loss / weight if weight else math.nan for loss in losses]
        if self.two_sided:
            pairs = zip(losses[::2], losses[1::2], strict=True)
            return [(above - below) / (2 * self.epsilon) for above, below in pairs]
        return [(above - losses[0]) / self.epsilon for above in losses[1:]]
