"""Methods whose step is made inside backward, in DeepSpeed: IPSGD and Addax, in the training loop as it is.

The loss that the engine returns hangs on a graph of one node; `engine.backward` learns from it by which factor the
caller scaled it, agrees with the other ranks, and runs the real backward, in which every gradient is reduced, used up
and freed. `engine.step` lets all ranks see the new weights.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ds_memopt.engines.in_place_adapter import InPlaceAdapter
from ds_memopt.engines.interleave import interleaved, one_step
from ds_memopt.engines.loss_evaluator import LossEvaluator
from ds_memopt.engines.losses import loss_of
from ds_memopt.engines.split_batch import Half, half_of, halves, largest_length, stand_in
from ds_memopt.measure import GIB
from ds_memopt.optimizers import Addax
from ds_memopt.optimizers.stored_weights.repeat import repeatable
from ds_memopt.optimizers.stored_weights.updates_in_backward import UpdatesInBackward
from ds_memopt.shards.gradients import BUCKET

logger = logging.getLogger("ds_memopt")


class PendingHalves(NamedTuple):
    """Forwards that wait for backward.

    zeroth: losses of the zeroth-order half at its evaluations, of zo_count samples. first: the loss of the first-order
    half, with a graph, of fo_count samples, and what computes it again. None: no rank has samples.
    share: of this rank in what the caller has multiplied the loss by.
    """

    zeroth: list[torch.Tensor] | None
    zo_count: Any
    first: torch.Tensor | None
    fo_count: Any
    again: Callable[[], torch.Tensor] | None
    share: float


class InBackwardAdapter(InPlaceAdapter):
    """For methods that update in backward. All of a batch is the first-order half."""

    optimizer: UpdatesInBackward
    done: bool | None = None

    def configure_zero(self, original: Callable, engine: Any, optimizer: UpdatesInBackward) -> InPlaceAdapter:
        method, accumulation = type(optimizer).__name__, engine.gradient_accumulation_steps()
        if accumulation != 1:
            rows = accumulation * engine.train_micro_batch_size_per_gpu()
            raise ValueError(
                f"gradient_accumulation_steps={accumulation}, but {method} holds no gradients that could be "
                f"accumulated: set it to 1 and train_micro_batch_size_per_gpu to {rows}, which with activation "
                "checkpointing takes little more memory."
            )
        if engine.gradient_clipping() and dist.get_rank() == 0:
            logger.warning(
                "%s never has all gradients at once, so gradient_clipping=%s is not applied. Set \"clip\" to "
                "\"two_pass\" (exact, with a second forward and backward) or \"tensor\", and \"max_norm\", in the "
                "optimizer's params.",
                method, engine.gradient_clipping(),
            )  # fmt: skip
        super().configure_zero(original, engine, optimizer)
        elements = min(BUCKET, engine._config.zero_config.reduce_bucket_size)
        optimizer.watch_gradients(elements=elements, dtype=engine.communication_data_type)
        return self

    def forward_in_training(self, original: Callable, engine, inputs: tuple, keywords: Mapping[str, Any]) -> Any:
        whole = half_of(engine, keywords) if keywords else Half({}, len(inputs[0]))
        count = torch.as_tensor(whole.count, dtype=torch.float64, device=engine.device).view(1).clone()
        self.optimizer.placement.sum(count)
        output, first, again = self.first_order(partial(original, *inputs), whole)
        pending = PendingHalves(None, 0, first, whole.count, again, self.share_of(keywords, count.item()))
        return self.losses.give(output, as_weighed(first, whole.count, keywords), pending)

    def first_order(self, original: Callable, half: Half) -> tuple[Any, torch.Tensor, Callable[[], torch.Tensor]]:
        """A forward with a graph: output, loss, and what computes the loss again."""

        def run() -> Any:
            return original(**half.keywords)

        again = repeatable(run, next(iter(self.optimizer.names_by_tensor())).device)
        output = run()
        return output, loss_of(output), lambda: loss_of(again())

    def share_of(self, keywords: Mapping[str, Any], count: float) -> float:
        """What makes of a mean over `count` tokens of all ranks what the caller wants, who averages sums over
        num_items_in_batch tokens over the ranks."""
        items = keywords.get("num_items_in_batch")
        return 1.0 if items is None else count / (float(items) * self.placement["ranks"])

    def backward_of_method(self, engine, loss: torch.Tensor, retain_graph: bool, scale_wrt_gas: bool) -> torch.Tensor:
        optimizer = self.optimizer
        pending, factor = self.losses.take(loss, retain_graph, type(optimizer).__name__)
        factor = factor.double() * pending.share
        self.observe(pending, factor)
        if pending.first is None:
            total, count = 0.0, 0.0
        else:
            total, count = pending.first.float() * (factor * pending.fo_count).float(), pending.fo_count
        agreed = optimizer.begin(total, count)
        if not agreed:
            self.done = agreed is not None and optimizer.without_first_order()
            return loss
        scale = float(factor) * float(count)
        again = pending.again
        engine._running_engine_backward = True
        try:
            self.done = optimizer.first_order(total, agreed, lambda: again().float() * scale)
        finally:
            engine._running_engine_backward = False
        return loss

    def observe(self, pending: PendingHalves, factor: torch.Tensor) -> None:
        """Hand the losses of a zeroth-order half to the method: there is none."""

    def backward_cost(self, engine) -> float | None:
        """With two passes: two backwards, and a forward between them."""
        return 1 + 2 * (2 + engine.flops_profiler_recompute_fwd_factor()) if self.optimizer.clip == "two_pass" else None

    def step(self) -> None:
        """Count the step that backward has made."""
        if self.done is None:
            raise ValueError(
                f"{type(self.optimizer).__name__} has no step to end. Call engine.backward(loss) before engine.step()."
            )
        self.optimizer.end_step(self.done)
        self.optimizer._opt_called = True  # torch's schedulers look there for a call of step()
        self._global_grad_norm = self.optimizer.grad_norm
        self.overflow, self.done = not self.done, None

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Every micro-batch is a step."""

    def train_step(self, engine, batch: Mapping[str, Any]) -> torch.Tensor:
        """One step on a batch: keywords of the model. Returns the mean loss over this rank's rows. All ranks call."""
        loss = loss_of(engine(**batch))
        engine.backward(loss)
        engine.step()
        return loss.detach()


class AddaxAdapter(InBackwardAdapter):
    """For Addax: a batch is divided by the length of its rows."""

    optimizer: Addax

    def configure_zero(self, original: Callable, engine: Any, optimizer: Addax) -> InPlaceAdapter:
        super().configure_zero(original, engine, optimizer)
        self.evaluator = LossEvaluator(optimizer, gathers=self.offload is not None)
        on_cpu = next(iter(optimizer.names_by_tensor())).device.type == "cpu"
        if optimizer.length_threshold == "auto" and optimizer.memory_gib is None and on_cpu:
            raise ValueError(
                'length_threshold="auto" needs to know what memory a rank may use: without a GPU give memory_gib, or a '
                "number of tokens for length_threshold."
            )
        return self

    def train_step(
        self, engine, zo_batch: Mapping[str, Any] | None, fo_batch: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """One step on a batch for each half; None on a rank that has no rows of it.

        zo_batch, fo_batch: keywords of the model. Returns the mean loss over this rank's rows. All ranks call.
        """
        return super().train_step(engine, {"zo_batch": zo_batch, "fo_batch": fo_batch})

    def forward_in_training(self, original: Callable, engine, inputs: tuple, keywords: Mapping[str, Any]) -> Any:
        if inputs:
            raise ValueError(
                "Addax divides a batch by the length of its rows: call engine(...) with keywords only, such as "
                "input_ids=..., attention_mask=..., labels=..., or engine.train_step(zo_batch, fo_batch)."
            )
        optimizer = self.optimizer
        if "zo_batch" in keywords:
            given = [batch for batch in keywords.values() if batch is not None]
            if not given:
                raise ValueError("engine.train_step needs a batch for one half at least, on every rank.")
            both = [
                stand_in(given[0]) if keywords[key] is None else half_of(engine, keywords[key])
                for key in ("zo_batch", "fo_batch")
            ]
            return self.run(original, engine, *both, {})
        if optimizer.length_threshold == "auto":
            optimizer.length_threshold = self.choose_threshold(original, engine, keywords)
        both = halves(engine, keywords, optimizer.length_threshold, optimizer.zo_batch)
        return self.run(original, engine, *both, keywords)

    def run(self, original: Callable, engine, zo: Half, fo: Half, keywords: Mapping[str, Any]) -> Any:
        """The forwards of both halves; each is left out if no rank has samples of it. keywords: as the caller gave."""
        counts = torch.tensor([float(zo.count), float(fo.count)], dtype=torch.float64, device=engine.device)
        self.optimizer.placement.sum(counts)
        some_zo, some_fo = counts.tolist()
        output = zeroth = first = again = None

        def zeroth_order() -> tuple[Any, list[torch.Tensor]]:
            output, known, rest = self.evaluator.evaluate(original, (), zo.keywords)
            return output, [value.detach() for value in (*known, *rest())]

        def first_order() -> tuple[Any, torch.Tensor, Callable]:
            return self.first_order(original, fo)

        use_zo, use_fo = bool(some_zo) and self.optimizer.alpha > 0, bool(some_fo) and self.optimizer.alpha < 1
        if not use_zo and not use_fo:  # nothing is to be learnt from this batch: the step is skipped, and counted
            use_fo, fo = True, stand_in(fo.keywords)
        with one_step(self.offload):
            if use_zo and use_fo and self.evaluator.lockstep is not None and self.evaluator.lockstep_checked:
                (_, zeroth), (output, first, again) = interleaved(
                    zeroth_order, first_order, self.evaluator.lockstep.units, self.optimizer.probe.paused
                )
            else:
                if use_zo:
                    output, zeroth = zeroth_order()
                if use_fo:
                    output, first, again = first_order()
        share = self.share_of(keywords, some_fo if zo is fo else some_zo + some_fo)
        pending = PendingHalves(zeroth, zo.count, first, fo.count, again, share)
        measured = [(torch.stack(zeroth).mean(), zo.count)] if use_zo else []
        measured += [(first, fo.count)] if use_fo else []
        count = fo.count if zo is fo else zo.count + fo.count
        return self.losses.give(output, as_weighed(_mean(measured), count, keywords), pending)

    def observe(self, pending: PendingHalves, factor: torch.Tensor) -> None:
        for number, value in enumerate(pending.zeroth or ()):
            value = value.double() * factor * pending.zo_count if pending.zo_count else 0.0
            self.optimizer.probe.observe(number, value, pending.zo_count)

    def choose_threshold(self, original: Callable, engine, keywords: Mapping[str, Any]) -> int:
        """The largest that fits on all ranks, with what is held beside activations already."""
        optimizer, device = self.optimizer, engine.device
        held = sum(getattr(p, "ds_tensor", p).nbytes for p in engine.module.parameters())
        kept = (
            sum(len(part.elements) for part in optimizer.placement.parts())
            * {"residual": 2, "fp32": 4, "none": 0}[optimizer.keep]
        )
        buckets = 2 * max(BUCKET, *map(optimizer.placement.numel, optimizer.names_by_tensor())) * 2
        limit = optimizer.memory_gib * GIB if optimizer.memory_gib else torch.cuda.mem_get_info(device)[1]
        available = max(0, int(limit - held - kept - buckets))
        rows = optimizer.fo_batch or engine.train_micro_batch_size_per_gpu()
        chosen = torch.tensor(float(largest_length(original, keywords, rows, available)), device=device)
        dist.all_reduce(chosen, op=dist.ReduceOp.MIN, group=self.dp_process_group)
        if not chosen.item():
            raise ValueError(
                f'length_threshold="auto": {limit / GIB:.2f} GiB hold the weights and what is kept of them, '
                f"{(held + kept + buckets) / GIB:.2f} GiB, and no row of one token beside. Raise memory_gib, or use "
                "more GPUs."
            )
        self.evaluator.tell(
            f"length_threshold is {int(chosen)}: {rows} rows of it take {available / GIB:.2f} GiB in backward"
        )
        return int(chosen)


def as_weighed(loss: torch.Tensor, count: Any, keywords: Mapping[str, Any]) -> torch.Tensor:
    """A mean over this rank's `count` tokens as the caller wants it, who adds ranks' sums over num_items_in_batch."""
    items = keywords.get("num_items_in_batch")
    return loss if items is None else loss * (float(count) / float(items))


def _mean(measured: list[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    """Of the losses of this rank's halves over all their samples, as far as it has some."""
    losses = torch.stack([loss.detach().float() for loss, _ in measured])
    counts = losses.new_tensor([float(count) for _, count in measured])
    return (losses * counts).sum() / counts.sum() if bool(counts.any()) else losses.mean()
