"""Gradients on their way from backward to the ranks that update: bucket after bucket, never all of them at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_memopt.shards.in_place_shards import BUCKET, InPlaceShards, Part

Update = Callable[[list[tuple[Part, torch.Tensor | None]]], None]
"""update(bucket): use up the mean gradients, 1-D, of parts of this rank; None for what took no part in the loss."""


class GradientBuckets:
    """Hooks that take each gradient away as soon as backward has completed it, and hand its part to an update.

    All ranks send the same buckets in the same order, whatever the order in which gradients arrive: from the last
    parameter to the first, as backward goes. At most two buckets are held: one on its way while backward makes the
    next.

    shards: how the weights are kept. update: called with each bucket, in order, while backward goes on.
    elements: of small parameters that are reduced together; a larger one is a bucket of its own.
    dtype: of the sums over ranks; None: that of the gradients.
    """

    def __init__(
        self, shards: InPlaceShards, update: Update, elements: int = BUCKET, dtype: torch.dtype | None = None
    ) -> None:
        self._shards, self._update, self._dtype = shards, update, dtype
        self.buckets: list[list[torch.Tensor]] = []
        small: list[torch.Tensor] = []
        for parameter in reversed(list(shards.names_by_tensor)):
            if shards.numel(parameter) >= elements or not shards.reduces:
                self.buckets.append([parameter])
                continue
            alike = not small or small[0].dtype == parameter.dtype
            if not alike or sum(map(shards.numel, small)) + shards.numel(parameter) > elements:
                self.buckets.append(small)
                small = []
            small.append(parameter)
        self.buckets += [small] if small else []
        self._arrived: dict[torch.Tensor, torch.Tensor] = {}
        self._taken: set[torch.Tensor] = set()
        self._next = 0
        self._on_its_way: tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]] | None = None
        self._handles = [p.register_post_accumulate_grad_hook(self._take) for p in shards.names_by_tensor]

    def remove(self) -> None:
        """Take all hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    @property
    def began(self) -> bool:
        """Whether a gradient arrived since the last `finish`."""
        return bool(self._taken)

    def forget(self) -> None:
        """After a backward that was interrupted: nothing of it is left over for the next."""
        self._arrived.clear()
        self._taken.clear()
        self._next, self._on_its_way = 0, None

    def finish(self) -> None:
        """After backward: send and use up the rest, where what has no gradient on any rank counts as zero."""
        self._send(complete=False)
        self._receive()
        self._taken.clear()
        self._next = 0

    @torch.compiler.disable
    def _take(self, parameter: torch.Tensor) -> None:
        name = self._shards.names_by_tensor[parameter]
        if parameter in self._taken:
            parameter.grad = None
            raise ValueError(
                f"{name} got a second gradient before step(), but the first one has changed "
                "it already. Call step() after every backward: gradients cannot be accumulated, raise the micro-batch "
                "instead; and checkpoint activations with use_reentrant=False."
            )
        if parameter.grad.is_sparse:
            parameter.grad = None
            raise ValueError(
                f"{name} has a sparse gradient, but dense ones are needed. Build the embedding with sparse=False."
            )
        self._taken.add(parameter)
        self._arrived[parameter], parameter.grad = parameter.grad, None
        if self._shards.reduces:
            self._send(complete=True)
        else:
            self._use([parameter], [self._shards.local(self._arrived.pop(parameter))])

    @torch.no_grad()
    def _send(self, complete: bool) -> None:
        """Reduce the buckets whose turn it is, if `complete` as far as all their gradients are there."""
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if complete and any(parameter not in self._arrived for parameter in bucket):
                return
            self._next += 1
            gradients = [self._arrived.pop(parameter, None) for parameter in bucket]
            if self._shards.reduces:
                receive = self._shards.reduce(bucket, gradients, self._dtype)
                del gradients
                self._receive()
                self._on_its_way = bucket, receive
            elif bucket[0] not in self._taken:
                self._use(bucket, [None])

    def _receive(self) -> None:
        if self._on_its_way is not None:
            bucket, receive = self._on_its_way
            self._on_its_way = None
            self._use(bucket, receive())

    @torch.no_grad()
    def _use(self, bucket: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
        parts = [self._shards.part(parameter) for parameter in bucket]
        self._update(list(zip(parts, gradients, strict=True)))
