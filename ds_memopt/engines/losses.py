"""Losses that a method hands to the training loop in the place of the model's own, and takes back in backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

IGNORED_LABEL = -100
"""Cross-entropy of transformers and of PyTorch skips it."""


class HandedOut:
    """Hands out losses that hang on a graph of one node: backward tells by which factor one went into what it was
    called on, and computes nothing."""

    def __init__(self) -> None:
        self._last: Any = None
        self._reached: list[tuple[Any, torch.Tensor]] = []

    def give(self, output: Any, loss: torch.Tensor, pending: Any) -> Any:
        """The model's output with this loss in the place of its own. pending: what `take` is to return for it."""
        self._last = pending
        anchor = torch.zeros((), device=loss.device, requires_grad=True)
        return with_loss(output, _Loss.apply(anchor, loss.detach(), self._reached, pending))

    def take(self, loss: torch.Tensor, retain_graph: bool, method: str) -> tuple[Any, torch.Tensor]:
        """Call backward; returns what was pending for the last loss that was given, and its factor.

        Raises ValueError if backward did not reach just that loss, and once.
        """
        pending, self._last = self._last, None
        self._reached.clear()
        if pending is not None and loss.requires_grad:
            loss.backward(retain_graph=retain_graph)
        reached = list(self._reached)
        self._reached.clear()
        if pending is None or [entry for entry, _ in reached] != [pending]:
            raise ValueError(
                "engine.backward was called on something else than the loss that the last engine(...) returned in "
                f"training mode, after engine.train(). {method} runs the model's forward itself: the model must return "
                "the loss, and backward be called on it after every forward. For anything else use engine.train_step."
            )
        return pending, reached[0][1]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, loss, reached, pending):
        ctx.reached, ctx.pending = reached, pending
        return loss.clone()

    @staticmethod
    def backward(ctx, factor):
        ctx.reached.append((ctx.pending, factor))
        return torch.zeros((), device=factor.device), None, None, None


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
            f"The model returned no loss, but a {type(output).__name__}. Pass it labels; for any other objective MeZO "
            "has engine.train_step(closure), whose closure returns a loss."
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
