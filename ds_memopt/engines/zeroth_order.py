"""Zeroth-order methods in DeepSpeed: no gradients and no fp32 masters, and the training loop stays as it is.

The loss that the engine returns was computed at perturbed weights and hangs on a graph of one node. `engine.backward`
asks that node for the loss's factor, runs the step's other forwards on the same inputs, and sends nothing;
`engine.step` sums a few numbers over the ranks and updates the weights.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedEngine.forward, .backward (both wrapped), .seq_data_parallel_group, .is_gradient_accumulation_boundary
  deepspeed.runtime.utils.DummyOptim
  DeepSpeedZeRoOffload: what the engine builds at ZeRO-3 for a DummyOptim; .persistent_parameters, .destroy(),
      .empty_partition_cache()
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import DummyOptim
from torch import nn

from ds_memopt.optimizers import MeZO
from ds_memopt.shards import PartitionedShards, SplitShards, WholeShards

logger = logging.getLogger("ds_memopt")

IGNORED_LABEL = -100


class ZerothOrderOptimizer:
    """What the engine takes for its ZeRO optimizer: it lays the weights out and passes everything else on.

    optimizer: the method. model: its model. stage: of ZeRO. offload: at ZeRO-3, what gathers and partitions.
    """

    # What DeepSpeed looks for in the files' names of parameters: none has a flat fp32 partition.
    bit16_groups: tuple = ()
    fp16_groups: tuple = ()
    bf16_groups: tuple = ()

    def __init__(self, optimizer: MeZO, model: nn.Module, stage: int, process_group, offload=None) -> None:
        self.optimizer, self.dp_process_group, self.offload = optimizer, process_group, offload
        self._global_grad_norm = None
        self.overflow = False
        self.pending: Pending | None = None
        self.superseded: list[Pending] = []  # forwards without a backward of their own, as in evaluation
        names = optimizer.names_by_tensor()
        if stage == 3:
            shards = PartitionedShards(model, names, process_group, offload)
        else:
            shards = (SplitShards if stage else WholeShards)(model, names, process_group)
        optimizer.bind(shards)
        self.lockstep_checked = False
        self.lockstep = None
        if stage == 3 and optimizer.lockstep and optimizer.two_sided:
            try:
                self.lockstep = optimizer.new_lockstep()
            except ValueError as error:
                self._tell(f"each layer is gathered once for each sign: {error}")
        for parameter in names:
            parameter.requires_grad_(False)  # no gradient is needed, and checkpoints then hold all weights as they are

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def check_lockstep(self, together: list[torch.Tensor | None], apart: Iterator[torch.Tensor]) -> None:
        """Once: go on in lockstep only if both signs have the losses that they have one after the other, everywhere."""
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

    def step(self) -> None:
        """Make a step from what the backward calls have observed."""
        skipped = self.optimizer.skipped_steps
        self.optimizer.step()
        self.overflow = self.optimizer.skipped_steps > skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: there are no gradients."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict_list, load_optimizer_states: bool = True, **ignored) -> None:
        """state_dict_list: the states of all ranks at ZeRO-1 to 3, else one state."""
        if load_optimizer_states:
            own = state_dict_list
            if isinstance(state_dict_list, list):
                own = state_dict_list[dist.get_rank(self.dp_process_group)]
            self.optimizer.load_state_dict(own)
        self.optimizer.shards.publish()  # the weights were loaded before

    def checkpoint_event_prologue(self) -> None:
        """Before weights are saved or loaded: at ZeRO-3 each rank's own pieces are."""
        if self.offload is not None:
            self.offload.partition_all_parameters()

    def checkpoint_event_epilogue(self) -> None:
        self.optimizer.shards.publish()

    def destroy(self) -> None:
        if self.offload is not None:
            self.offload.destroy()

    def _restore_from_bit16_weights(self) -> None:
        # What DeepSpeed calls after it has loaded weights alone.
        self.optimizer.shards.publish()

    def empty_partition_cache(self) -> None:
        if self.offload is not None:
            self.offload.empty_partition_cache()


def build(engine, optimizer: MeZO, original: Callable) -> ZerothOrderOptimizer:
    """In the place of the engine's ZeRO optimizer. original: the engine's own method that builds one."""
    stage = engine.zero_optimization_stage()
    # Parameters are partitioned as for inference, without gradient buffers.
    offload = original(DummyOptim(list(engine.module.parameters()))) if stage == 3 else None
    engine.train_step = partial(train_step, engine)
    engine.clip_fp32_gradients = lambda: None  # there are no gradients: gradient_clipping has no meaning
    return ZerothOrderOptimizer(optimizer, engine.module, stage, engine.seq_data_parallel_group, offload)


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
    def forward(ctx, anchor, loss, pending):
        ctx.pending = pending
        return loss.clone()

    @staticmethod
    def backward(ctx, factor):
        ctx.pending.factor = factor
        return torch.zeros((), device=factor.device), None, None


def forward(original, engine, *inputs, **keywords):
    """In training, the forward at the first evaluation's weights; else the engine's own."""
    wrapper = engine.optimizer
    if not (isinstance(wrapper, ZerothOrderOptimizer) and engine.module.training and torch.is_grad_enabled()):
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
        wrapper.check_lockstep(both_signs(0)[1], one_by_one(0))
    if wrapper.lockstep is not None:
        output, known = both_signs(0)
        rest = partial(_chain, both_signs, range(1, optimizer.probes))
    else:
        with torch.no_grad(), optimizer.perturbed(evaluations[0]):
            output = original(*inputs, **keywords)
        known, rest = [loss_of(output)], partial(one_by_one, 1)
    loss = known[0]
    if wrapper.pending is not None:
        wrapper.superseded.append(wrapper.pending)
    wrapper.pending = Pending([value.detach() for value in known], rest, tokens_of(engine, keywords))
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    return with_loss(output, _Loss.apply(anchor, loss, wrapper.pending))


def _chain(both_signs: Callable, probes: range) -> Iterator[torch.Tensor]:
    for probe in probes:
        yield from both_signs(probe)[1]


def backward(original, engine, loss, retain_graph=False, scale_wrt_gas=True):
    """Run the step's other forwards on the same inputs. Returns the loss as the engine's backward does."""
    wrapper = engine.optimizer
    if not isinstance(wrapper, ZerothOrderOptimizer):
        return original(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
    optimizer, pending = wrapper.optimizer, wrapper.pending
    wrapper.pending = None
    superseded, wrapper.superseded = wrapper.superseded, []
    if scale_wrt_gas:
        loss = loss / engine.gradient_accumulation_steps()
    if loss.requires_grad:
        loss.backward(retain_graph=retain_graph)
    if pending is None or pending.factor is None or any(other.factor is not None for other in superseded):
        raise ValueError(
            f"{type(optimizer).__name__} runs the model's forward itself, so it must return the loss, and backward "
            "must be called on that loss after every forward. For any other objective use "
            "engine.train_step(closure), whose closure returns a loss."
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

    transformers names the loss in `model.loss_type`. With num_items_in_batch, as from Trainer, the caller has weighted.
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
