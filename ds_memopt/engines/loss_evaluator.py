"""The forwards of a probe, as an engine runs them: one by one, or at ZeRO-3 both signs while a layer is gathered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ds_memopt.engines.losses import loss_of
from ds_memopt.optimizers import Addax, MeZO

logger = logging.getLogger("ds_memopt")


class LossEvaluator:
    """Runs the evaluations of a step on one batch.

    optimizer: a method with a probe. gathers: whether weights are gathered for each forward: then lockstep is tried.
    lockstep: what runs both signs in one forward, or None.
    """

    def __init__(self, optimizer: MeZO | Addax, gathers: bool) -> None:
        self._method, self.probe, self._shards = type(optimizer).__name__, optimizer.probe, optimizer.placement
        self.lockstep, self.lockstep_checked = None, False
        if gathers and self.probe.lockstep and self.probe.two_sided:
            try:
                self.lockstep = self.probe.new_lockstep()
            except ValueError as error:
                self.tell(f"each layer is gathered once for each sign: {str(error).split('. ')[0]}")

    def evaluate(
        self, original, inputs: tuple, keywords: Mapping[str, Any]
    ) -> tuple[Any, list[torch.Tensor], Callable[[], Iterator[torch.Tensor]]]:
        """The first forwards of a step: output and losses of the first, and what yields the losses of the rest."""
        perturbed, evaluations = self.probe.perturbed, self.probe.evaluations()

        def both_signs(probe: int) -> tuple[Any, list[torch.Tensor]]:
            with torch.no_grad(), perturbed(evaluations[2 * probe]):
                output, second = self.lockstep.run(original, inputs, keywords)
            return output, [self._loss(output), second]

        def one_by_one(first: int) -> Iterator[torch.Tensor]:
            for evaluation in evaluations[first:]:
                with torch.no_grad(), perturbed(evaluation):
                    yield self._loss(original(*inputs, **keywords))

        if self.lockstep is not None and not self.lockstep_checked:
            self._check_lockstep(partial(both_signs, 0), one_by_one(0))
        if self.lockstep is not None:
            output, known = both_signs(0)
            return output, known, partial(_chain, both_signs, range(1, self.probe.probes))
        with torch.no_grad(), perturbed(evaluations[0]):
            output = original(*inputs, **keywords)
        return output, [self._loss(output)], partial(one_by_one, 1)

    def _loss(self, output: Any) -> torch.Tensor:
        loss = loss_of(output)
        self.probe.check_loss(loss)
        return loss

    def _check_lockstep(self, run: Callable[[], tuple[Any, list]], apart: Iterator[torch.Tensor]) -> None:
        """Once: go on in lockstep only if both signs have the losses that they have one after the other, everywhere.

        run: a forward in lockstep, of which the second result is both losses.
        """
        try:
            _, together = run()
        except Exception as error:
            error.add_note(
                "If engine(...) works in evaluation, the model cannot run both signs in lockstep. Then set "
                f'"lockstep": false in the params of {self._method}.'
            )
            raise
        self.lockstep_checked = True
        differ = torch.zeros(1, dtype=torch.float64)
        for first, second in zip(together, apart, strict=False):
            differ += first is None or not torch.allclose(first, second, rtol=1e-6, atol=0, equal_nan=True)
        self._shards.sum(differ)
        if differ.item():
            self.lockstep = None
            self.tell("in lockstep the losses differ, so each layer is gathered once for each sign")

    def tell(self, what: str) -> None:
        """Log it, once for all ranks."""
        if dist.get_rank() == 0:
            logger.info("%s: %s.", self._method, what)


def _chain(both_signs: Callable, probes: range) -> Iterator[torch.Tensor]:
    for probe in probes:
        yield from both_signs(probe)[1]
