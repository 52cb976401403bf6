"""Zeroth-order methods in DeepSpeed: no gradients and no fp32 masters, and the training loop stays as it is.

The loss that the engine returns was computed at perturbed weights and hangs on a graph of one node. `engine.backward`
asks that node for the loss's factor, runs the step's other forwards on the same inputs, and sends nothing;
`engine.step` sums a few numbers over the ranks and updates the weights.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedEngine.forward, .backward (both wrapped), .is_gradient_accumulation_boundary,
      .set_gradient_accumulation_boundary
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_memopt.engines import inplace
from ds_memopt.engines.inplace import InPlaceAdapter
from ds_memopt.optimizers import MeZO

logger = logging.getLogger("ds_memopt")

IGNORED_LABEL = -100


class ZerothOrderAdapter(InPlaceAdapter):
    """For methods that go by losses alone."""

    def __init__(self, optimizer: MeZO, model: nn.Module, stage: int, process_group, offload=None) -> None:
        super().__init__(optimizer, model, stage, process_group, offload)
        self.pending: Pending | None = None
        self.reached: list[Pending] = []  # by the backward that runs now
        self.lockstep_checked = False
        self.lockstep = None
        if stage == 3 and optimizer.lockstep and optimizer.two_sided:
            try:
                self.lockstep = optimizer.new_lockstep()
            except ValueError as error:
                self._tell(f"each layer is gathered once for each sign: {error}")
        for parameter in optimizer.names_by_tensor():
            parameter.requires_grad_(False)  # no gradient is needed, and checkpoints then hold all weights as they are

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


def build(engine, optimizer: MeZO, original: Callable) -> ZerothOrderAdapter:
    """In the place of the engine's ZeRO optimizer. original: the engine's own method that builds one."""
    engine.train_step = partial(train_step, engine)
    return inplace.build(ZerothOrderAdapter, engine, optimizer, original)


class Pending:
    """A forward at the first evaluation's weights, waiting for backward to run the others.

    known: the losses of the first evaluations. rest: runs the others, in order. tokens: that the losses are means of.
    """

    def __init__(
        self, known: list[torch.Tensor], rest: Callable[[], Iterator[torch.Tensor]], tokens: torch.Tensor | None
    ) -> None:
        self.known, self.rest, self.tokens = known, rest, tokens
        self.factor: torch.Tensor | None = None


class _Loss(torch.autograd.Function):
    """The loss, hanging on a node that learns by which factor it went into what backward was called on."""

    @staticmethod
    def forward(ctx, anchor, loss, reach):
        ctx.reach = reach
        return loss.clone()

    @staticmethod
    def backward(ctx, factor):
        ctx.reach(factor)
        return torch.zeros((), device=factor.device), None, None


def forward(original, engine, *inputs, **keywords):
    """In training, the forward at the first evaluation's weights; else the engine's own."""
    wrapper = engine.optimizer
    if not (isinstance(wrapper, ZerothOrderAdapter) and engine.module.training and torch.is_grad_enabled()):
        return original(*inputs, **keywords)
    optimizer, evaluations = wrapper.optimizer, wrapper.optimizer.evaluations()

    def both_signs(probe: int) -> tuple[Any, list[torch.Tensor]]:
        with torch.no_grad(), optimizer.perturbed(evaluations[2 * probe]):
            output, second = wrapper.lockstep.run(original, inputs, keywords)
        return output, [loss_of(output), second]

    def one_by_one(first: int) -> Iterator[torch.Tensor]:
        for evaluation in evaluations[first:]:
            with torch.no_grad(), optimizer.perturbed(evaluation):
                yield loss_of(original(*inputs, **keywords))

    if wrapper.lockstep is not None and not wrapper.lockstep_checked:
        wrapper.check_lockstep(partial(both_signs, 0), one_by_one(0))
    if wrapper.lockstep is not None:
        output, known = both_signs(0)
        rest = partial(_chain, both_signs, range(1, optimizer.probes))
    else:
        with torch.no_grad(), optimizer.perturbed(evaluations[0]):
            output = original(*inputs, **keywords)
        known, rest = [loss_of(output)], partial(one_by_one, 1)
    loss = known[0]
    wrapper.pending = Pending([value.detach() for value in known], rest, tokens_of(engine, keywords))
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    return with_loss(output, _Loss.apply(anchor, loss, partial(_reach, wrapper.reached, wrapper.pending)))


def _reach(reached: list[Pending], pending: Pending, factor: torch.Tensor) -> None:
    pending.factor = factor
    reached.append(pending)


def _chain(both_signs: Callable, probes: range) -> Iterator[torch.Tensor]:
    for probe in probes:
        yield from both_signs(probe)[1]


def backward(original, engine, loss, retain_graph=False, scale_wrt_gas=True):
    """Run the step's other forwards on the same inputs. Returns the loss as the engine's backward does."""
    wrapper = engine.optimizer
    if not isinstance(wrapper, ZerothOrderAdapter):
        return original(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
    optimizer, pending = wrapper.optimizer, wrapper.pending
    wrapper.pending = None
    wrapper.reached.clear()
    if scale_wrt_gas:
        loss = loss / engine.gradient_accumulation_steps()
    if loss.requires_grad:
        loss.backward(retain_graph=retain_graph)
    if pending is None or wrapper.reached != [pending]:
        raise ValueError(
            "engine.backward was called on something else than the loss that the last engine(...) returned. "
            f"{type(optimizer).__name__} runs the model's forward itself: the model must return the loss, and backward "
            "be called on it after every forward. For any other objective use engine.train_step(closure), whose "
            "closure returns a loss."
        )
    # In fp64: g is the small difference of two losses, to whose rounding none may be added.
    factor, gas = pending.factor.double(), engine.gradient_accumulation_steps()
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


def train_step(engine, closure: Callable[[], Any]):
    """One step on any objective that Python can compute, without gradients: a loss, or 1 - accuracy of generated text.

    closure: called at every evaluation's weights; it may call engine(...) or engine.module.generate(...). It returns
        what `MeZO.step` takes: the mean over this rank's samples, or (sum, number of samples).
    Returns its first result. All ranks call.
    """
    first = engine.optimizer.optimizer.evaluate(closure)
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    engine.set_gradient_accumulation_boundary(None)
    return first


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what a model returned: a scalar, an attribute or item `loss`, or the first of a tuple.

    Raises ValueError where there is none.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, (tuple, list)) and output:
        loss = output[0]
    elif not isinstance(output, torch.Tensor):
        loss = getattr(output, "loss", None)
    if not (isinstance(loss, torch.Tensor) and loss.dim() == 0):
        raise ValueError(
            f"The model returned no loss, but a {type(output).__name__}. Pass it labels, or use "
            "engine.train_step(closure), whose closure returns a loss."
        )
    return loss


def with_loss(output: Any, loss: torch.Tensor) -> Any:
    """What the model returned, with this loss in the place of its own."""
    if isinstance(output, torch.Tensor):
        return loss
    if isinstance(output, (tuple, list)):
        return type(output)((loss, *output[1:]))
    if isinstance(output, Mapping):
        output["loss"] = loss
    else:
        output.loss = loss
    return output


def tokens_of(engine, keywords: Mapping[str, Any]) -> torch.Tensor | None:
    """Over how many labels a transformers model took the loss's mean; None where nothing tells.

    The name of a transformers model's loss_function tells. With num_items_in_batch, as from Trainer, the caller has
    weighted.
    """
    labels = keywords.get("labels")
    if labels is None or keywords.get("num_items_in_batch") is not None:
        return None
    name = getattr(getattr(engine.module, "loss_function", None), "__name__", None)
    if name == "ForCausalLMLoss":
        labels = labels[..., 1:]  # the first token is predicted from nothing
    elif name != "ForMaskedLMLoss":
        return None
    return (labels != IGNORED_LABEL).sum()


WRAPPERS = {"forward": forward, "backward": backward}
