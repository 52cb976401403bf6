"""Zeroth-order methods in DeepSpeed: no gradients and no fp32 masters, and the training loop stays as it is.

The loss that the engine returns was computed at perturbed weights and hangs on a graph of one node. `engine.backward`
asks that node for the loss's factor, runs the step's other forwards on the same inputs, and sends nothing;
`engine.step` sums a few numbers over the ranks and updates the weights.

Private names used here are in private_names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ds_memopt.engines.in_place_adapter import InPlaceAdapter
from ds_memopt.engines.loss_evaluator import LossEvaluator
from ds_memopt.engines.losses import tokens_of
from ds_memopt.engines.timing import one_pass
from ds_memopt.optimizers import MeZO


class ZerothOrderAdapter(InPlaceAdapter):
    """For methods that go by losses alone."""

    optimizer: MeZO

    def configure_zero(self, original: Callable, engine: Any, optimizer: MeZO) -> InPlaceAdapter:
        super().configure_zero(original, engine, optimizer)
        self.evaluator = LossEvaluator(optimizer, gathers=self.offload is not None)
        for parameter in optimizer.names_by_tensor():
            parameter.requires_grad_(False)  # no gradient is needed, and checkpoints then hold all weights as they are
        return self

    def forward_in_training(self, original, engine, inputs: tuple, keywords: Mapping[str, Any]) -> Any:
        """The forward at the first evaluation's weights; backward runs the others."""
        output, known, rest = self.evaluator.evaluate(original, inputs, keywords)
        pending = PendingEvaluations([value.detach() for value in known], rest, tokens_of(engine, keywords))
        return self.losses.give(output, known[0], pending)

    def backward_of_method(self, engine, loss: torch.Tensor, retain_graph: bool, scale_wrt_gas: bool) -> torch.Tensor:
        """Run the step's other forwards on the same inputs. Returns the loss as the engine's backward does."""
        optimizer, gas = self.optimizer, engine.gradient_accumulation_steps()
        if scale_wrt_gas:
            loss = loss / gas
        pending, factor = self.losses.take(loss, retain_graph, type(optimizer).__name__)
        # In fp64: g is the small difference of two losses, to whose rounding none may be added.
        factor = factor.double()
        if not scale_wrt_gas:  # the caller has divided: ranks are averaged, micro-batches added up
            weight = 1.0 if engine.is_gradient_accumulation_boundary() else 0.0
        elif pending.tokens is None:
            weight = 1.0 / gas
        else:  # batches with more tokens weigh more, so that all tokens weigh the same
            weight = pending.tokens
            factor = factor * gas * weight
        values = [*pending.known, *pending.rest()]  # all or none: what an exception interrupts must not count
        if pending.tokens is not None:
            values = [value if pending.tokens else torch.zeros_like(value) for value in values]
        for number, value in enumerate(values):
            optimizer.probe.observe(number, value * factor, weight)
        return loss

    def backward_cost(self, engine) -> float:
        """The evaluations that are left, one by one or both signs at once as the first was."""
        return len(self.optimizer.probe.evaluations()) / (1 if self.evaluator.lockstep is None else 2) - 1

    def train_step(self, engine, closure: Callable[[], Any]) -> Any:
        """One step on any objective that Python can compute, without gradients: a loss, or 1 - accuracy of generated
        text.

        closure: called at every evaluation's weights; it may call engine(...) or engine.module.generate(...). It
            returns what `MeZO.step` takes: the mean over this rank's samples, or (sum, number of samples).
        Returns its first result. All ranks call.
        """
        with one_pass(engine, "forward"):
            first = self.optimizer.probe.evaluate(closure)
        with one_pass(engine, "backward", cost=0.0):
            pass  # no pass is left: DeepSpeed's reports divide by its time
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        engine.set_gradient_accumulation_boundary(None)
        return first


class PendingEvaluations(NamedTuple):
    """A forward at the first evaluation's weights, waiting for backward to run the others.

    known: the losses of the first evaluations. rest: runs the others, in order. tokens: that the losses are means of.
    """

    known: list[torch.Tensor]
    rest: Callable[[], Iterator[torch.Tensor]]
    tokens: torch.Tensor | None
