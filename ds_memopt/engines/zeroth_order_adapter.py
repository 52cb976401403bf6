"""Zeroth-order methods in DeepSpeed: no gradients and no fp32 masters, and the training loop stays as it is.

The loss that the engine returns was computed at perturbed weights and hangs on a graph of one node. `engine.backward`
asks that node for the loss's factor, runs the step's other forwards on the same inputs, and sends nothing;
`engine.step` sums a few numbers over the ranks and updates the weights.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ds_memopt.engines.in_place_adapter import InPlaceAdapter
from ds_memopt.engines.losses import loss_of, tokens_of
from ds_memopt.engines.timing import one_pass
from ds_memopt.optimizers import MeZO

logger = logging.getLogger("ds_memopt")


class ZerothOrderAdapter(InPlaceAdapter):
    """For methods that go by losses alone."""

    optimizer: MeZO
    freezes = True
    lockstep = None
    lockstep_checked = False

    def configure_zero(self, original: Callable, engine: Any, optimizer: MeZO) -> InPlaceAdapter:
        super().configure_zero(original, engine, optimizer)
        if self.offload is not None and optimizer.lockstep and optimizer.two_sided:
            try:
                self.lockstep = optimizer.new_lockstep()
            except ValueError as error:
                self._tell(f"each layer is gathered once for each sign: {str(error).split('. ')[0]}")
        for parameter in optimizer.names_by_tensor() if self.freezes else ():
            parameter.requires_grad_(False)  # no gradient is needed, and checkpoints then hold all weights as they are
        return self

    def check_lockstep(self, run: Callable[[], tuple[Any, list]], apart: Iterator[torch.Tensor]) -> None:
        """Once: go on in lockstep only if both signs have the losses that they have one after the other, everywhere.

        run: a forward in lockstep, of which the second result is both losses.
        """
        try:
            _, together = run()
        except Exception as error:
            error.add_note(
                "If engine(...) works in evaluation, the model cannot run both signs in lockstep. Then set "
                f'"lockstep": false in the params of {type(self.optimizer).__name__}.'
            )
            raise
        self.lockstep_checked = True
        differ = torch.zeros(1, dtype=torch.float64)
        for first, second in zip(together, apart, strict=False):
            differ += first is None or not torch.allclose(first, second, rtol=1e-6, atol=0, equal_nan=True)
        self.optimizer.shards.sum(differ)
        if differ.item():
            self.lockstep = None
            self._tell("in lockstep the losses differ, so each layer is gathered once for each sign")

    def _tell(self, what: str) -> None:
        if dist.get_rank() == 0:
            logger.info("%s: %s.", type(self.optimizer).__name__, what)

    def forward_in_training(self, original, engine, inputs: tuple, keywords: Mapping[str, Any]) -> Any:
        """The forward at the first evaluation's weights; backward runs the others."""
        output, known, rest = self.evaluate(original, inputs, keywords)
        pending = Pending([value.detach() for value in known], rest, tokens_of(engine, keywords))
        return self.losses.give(output, known[0], pending)

    def evaluate(
        self, original, inputs: tuple, keywords: Mapping[str, Any]
    ) -> tuple[Any, list[torch.Tensor], Callable[[], Iterator[torch.Tensor]]]:
        """The first forwards of a step: output and losses of the first, and what yields the losses of the rest."""
        optimizer, evaluations = self.optimizer, self.optimizer.evaluations()

        def both_signs(probe: int) -> tuple[Any, list[torch.Tensor]]:
            with torch.no_grad(), optimizer.perturbed(evaluations[2 * probe]):
                output, second = self.lockstep.run(original, inputs, keywords)
            return output, [self._loss(output), second]

        def one_by_one(first: int) -> Iterator[torch.Tensor]:
            for evaluation in evaluations[first:]:
                with torch.no_grad(), optimizer.perturbed(evaluation):
                    yield self._loss(original(*inputs, **keywords))

        if self.lockstep is not None and not self.lockstep_checked:
            self.check_lockstep(partial(both_signs, 0), one_by_one(0))
        if self.lockstep is not None:
            output, known = both_signs(0)
            return output, known, partial(_chain, both_signs, range(1, optimizer.probes))
        with torch.no_grad(), optimizer.perturbed(evaluations[0]):
            output = original(*inputs, **keywords)
        return output, [self._loss(output)], partial(one_by_one, 1)

    def _loss(self, output: Any) -> torch.Tensor:
        loss = loss_of(output)
        self.optimizer.check_loss(loss)
        return loss

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
            optimizer.observe(number, value * factor, weight)
        return loss

    def backward_cost(self, engine) -> float:
        """The evaluations that are left, one by one or both signs at once as the first was."""
        return len(self.optimizer.evaluations()) / (1 if self.lockstep is None else 2) - 1

    def train_step(self, engine, closure: Callable[[], Any]) -> Any:
        """One step on any objective that Python can compute, without gradients: a loss, or 1 - accuracy of generated
        text.

        closure: called at every evaluation's weights; it may call engine(...) or engine.module.generate(...). It
            returns what `MeZO.step` takes: the mean over this rank's samples, or (sum, number of samples).
        Returns its first result. All ranks call.
        """
        with one_pass(engine, "forward"):
            first = self.optimizer.evaluate(closure)
        with one_pass(engine, "backward", cost=0.0):
            pass  # no pass is left: DeepSpeed's reports divide by its time
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        engine.set_gradient_accumulation_boundary(None)
        return first


class Pending(NamedTuple):
    """A forward at the first evaluation's weights, waiting for backward to run the others.

    known: the losses of the first evaluations. rest: runs the others, in order. tokens: that the losses are means of.
    """

    known: list[torch.Tensor]
    rest: Callable[[], Iterator[torch.Tensor]]
    tokens: torch.Tensor | None


def _chain(both_signs: Callable, probes: range) -> Iterator[torch.Tensor]:
    for probe in probes:
        yield from both_signs(probe)[1]
