"""The loss of a causal language model without its logits: the head computes both, some tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from ds_memopt.engines.losses import IGNORED_LABEL


class LossInHead:
    """Makes the head of a model, where labels are given, return the sum of the losses of all tokens, and the model
    divide it. Logits [tokens / chunks, vocabulary] are there at a time, in forward and, made again, in backward; the
    model's output has no `logits` then.

    The head does it in its own forward, so that what an engine or a method hooks on a module (ZeRO-3's gathering, a
    gradient's reduction) sees the usual: one forward of the head, one gradient of its weight. Each chunk's arithmetic
    is the model's own, in fp32 from the logits on; only the sums over chunks have another order.
    PyTorch's own `linear_cross_entropy` (2.13) keeps no logits either, but rounds a loss of bf16 weights to bf16.

    ValueError for a model without a head of its own, or, in its first forward, with one that changes its logits.
    """

    def __init__(self, model: transformers.PreTrainedModel, chunks: int) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"--loss_chunks {chunks}: {type(model).__name__} has no output head: leave it out")
        self.chunks, self.logits_of, self.loss_of_logits = chunks, head.forward, model.loss_function
        self.labels: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None
        model.register_forward_pre_hook(self._take_labels, with_kwargs=True)
        head.forward, model.loss_function = self._head, self._loss

    def _take_labels(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.labels = kwargs.get("labels")

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.labels is None:
            return self.logits_of(hidden)
        rows, targets = hidden.flatten(0, 1), _following(self.labels).flatten()
        parts = zip(rows.chunk(self.chunks), targets.chunk(self.chunks), strict=True)
        losses = [checkpoint(self._part, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        self.sum = torch.stack(losses).sum()
        return self.sum

    def _part(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.logits_of(hidden).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum")

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, **other: Any) -> torch.Tensor:
        """What the model calls with what its head returned."""
        if self.labels is None:  # they were given by position
            return self.loss_of_logits(logits=logits, labels=labels, **other)
        # An engine's hooks may have put an alias into its place.
        if StorageWeakRef(logits.untyped_storage()) != StorageWeakRef(self.sum.untyped_storage()):
            raise ValueError(
                f"--loss_chunks {self.chunks}: this model changes its head's logits before the loss, as by a soft cap, "
                "and the loss that its head computes would lack that: leave it out"
            )
        items = other.get("num_items_in_batch")
        return logits / ((_following(labels) != IGNORED_LABEL).sum() if items is None else items)


def _following(labels: torch.Tensor) -> torch.Tensor:
    """What each token is to predict, [rows, tokens]; the last one of a row nothing."""
    return pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
