"""What activations take, from a run of one and of two layers on fake tensors: no formula, no memory, no GPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: TID251 - it knows no process group
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ds_memopt.train.loss_in_head import LossInHead
from ds_memopt.train.model_speed import checkpoint_activations, set_attention

NO_ACTIVATIONS = ("Parameter", "Buffer")
"""Kinds of MemTracker that are counted elsewhere."""


class Activations(NamedTuple):
    """Peak bytes of forward and backward, weights apart: of a micro-batch's first sequence, and of each further one."""

    first: int
    further: int

    def of(self, micro_batch: int) -> int:
        return self.first + (micro_batch - 1) * self.further


def measure_activations(
    config: PretrainedConfig,
    seq_length: int,
    dtype: torch.dtype,
    *,
    checkpointing: str = "none",
    backward: bool = True,
    loss_chunks: int = 1,
    eager: bool = False,
) -> Activations:
    """Of a causal language model with its loss, logits in fp32 included.

    config: of transformers. seq_length: tokens of each sequence. backward: False for forwards without a graph, as
    MeZO's. checkpointing, loss_chunks: as the jobs' `--gradient_checkpointing` and `--loss_chunks`. eager: attention by
    plain products, which keep a matrix of scores, and not by PyTorch's scaled_dot_product_attention.

    The peaks of models of one and two layers at one and two sequences are extended to all layers: each adds the same.
    A gradient counts while backward makes it, and is taken away then, as an engine or a method does.

    Raises ValueError for a model that cannot run without data.
    """
    prepare = partial(_prepare, checkpointing=checkpointing, loss_chunks=loss_chunks, eager=eager)
    peaks = {}
    for layers in (1, 2):
        for sequences in (1, 2):
            peaks[layers, sequences] = _peak(config, layers, sequences, seq_length, dtype, prepare, backward)
    more = config.num_hidden_layers - 1
    first, second = (peaks[1, n] + more * (peaks[2, n] - peaks[1, n]) for n in (1, 2))
    return Activations(first, second - first)


def _prepare(model: PreTrainedModel, checkpointing: str, loss_chunks: int, eager: bool) -> None:
    if eager:
        set_attention(model, "eager")
    checkpoint_activations(model, checkpointing)
    if loss_chunks > 1:
        LossInHead(model, loss_chunks)


def _peak(
    config: PretrainedConfig,
    layers: int,
    sequences: int,
    seq_length: int,
    dtype: torch.dtype,
    prepare: Callable[[PreTrainedModel], None],
    backward: bool,
) -> int:
    small = copy.deepcopy(config)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:layers]
    small.num_hidden_layers = layers
    small.use_cache = False
    with warnings.catch_warnings(), FakeTensorMode(), no_init_weights():
        warnings.simplefilter("ignore")  # the tracker's, of inputs that are None
        model = AutoModelForCausalLM.from_config(small, dtype=dtype).train()
        prepare(model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_take_away)
        tokens = torch.zeros(sequences, seq_length, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        try:
            with tracker, torch.set_grad_enabled(backward):
                loss = model(input_ids=tokens, labels=tokens).loss
                if backward:
                    loss.backward()
        except DynamicOutputShapeException as error:
            raise ValueError(
                f"{type(model).__name__} cannot run without data, so its activations are not known: what it computes "
                "depends on the tokens, as in a mixture of experts. Plan a dense model of that size."
            ) from error
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"] - sum(size for kind, size in peak.items() if getattr(kind, "value", "") in NO_ACTIVATIONS)


def _take_away(parameter: torch.Tensor) -> None:
    parameter.grad = None
