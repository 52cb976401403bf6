"""Bytes that collectives move, counted on the host as they are called.

Every Python route to a collective (`torch.distributed`, `deepspeed.comm`, FSDP2, `_coalescing_manager`, functions
that a library captured at start-up) ends in a method of c10d's `ProcessGroup`. The meter replaces those methods on the
class, so each collective is counted once, whoever calls it. DTensor's functional collectives call
`torch.ops._c10d_functional` instead; they are wrapped too. Counting reads shapes only: no synchronisation. With a
timer the calls are timed, and so is `Work.wait`, where the caller of an asynchronous collective waits.

Not seen, because they never pass through Python: the reducer of `DistributedDataParallel`, collectives inside a
`torch.compile` graph, and DeepSpeed's shared-memory all_reduce for inference on CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.distributed_c10d import ProcessGroup, Work, _resolve_process_group, get_process_group_ranks

from ds_memopt.measure.step_timer import StepTimer

# method of ProcessGroup -> (collective, position of the argument whose bytes are the payload).
# The payload is the larger side of all_gather (its output) and reduce_scatter (its input), else one rank's tensor.
# torch 2.11 and 2.12 call the names with "base" or "tensor", torch 2.13 the "single" ones; a missing name is skipped.
_METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", None),
}

# functional op -> (collective, whether the input must be multiplied by the group's size to get the payload)
_FUNCTIONAL = {
    "all_reduce": ("all_reduce", False),
    "all_reduce_": ("all_reduce", False),
    "all_reduce_coalesced": ("all_reduce", False),
    "all_gather_into_tensor": ("all_gather", True),
    "all_gather_into_tensor_coalesced": ("all_gather", True),
    "reduce_scatter_tensor": ("reduce_scatter", False),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", False),
    "all_to_all_single": ("all_to_all", False),
    "broadcast": ("broadcast", False),
    "broadcast_": ("broadcast", False),
}


@dataclass(frozen=True)
class Traffic:
    """What one rank did in one kind of collective.

    calls: number of calls. payload_bytes: size of the tensors (of an all_gather the whole output, of a reduce_scatter
    the whole input). sent_bytes: what a rank puts on the wire, see `sent_per_payload_byte`.
    """

    calls: int
    payload_bytes: int
    sent_bytes: int


def sent_per_payload_byte(collective: str, group_size: int) -> float:
    """Bytes that one of N ranks sends for each payload byte, under ring algorithms.

    all_reduce 2(N-1)/N; all_gather, reduce_scatter and all_to_all (N-1)/N; send 1; recv and barrier 0.
    Rooted collectives are not symmetric: broadcast, reduce, gather and scatter move S(N-1) bytes in all (S = the tensor
    of one rank), so the mean rank sends (N-1)/N of S.
    """
    if collective in ("recv", "barrier"):
        return 0.0
    if collective == "send":
        return 1.0
    share = (group_size - 1) / group_size
    return 2 * share if collective == "all_reduce" else share


class CommunicationMeter:
    """Counts this rank's collectives between `start()` and `stop()`, or inside a `with` block; several meters may run.

    `meter.bytes_sent()` is the wire total of this rank in bytes, `meter.by_collective()` and `meter.by_group()` split
    it. Counts add up over repeated start/stop pairs until `reset()`. Needs no process group to be initialised.

    timer: gets the time of collectives, and of waiting for them, as its phase "communication".
    """

    def __init__(self, timer: StepTimer | None = None) -> None:
        self._timer = timer
        # By collective, and name and size of the process group: to hash a thousand ranks in every call would be slow.
        self._calls: Counter[tuple[str, tuple[str, int]]] = Counter()
        self._payload: Counter[tuple[str, tuple[str, int]]] = Counter()
        self._ranks: dict[tuple[str, int], tuple[int, ...]] = {}

    def start(self) -> None:
        """Begin counting. RuntimeError if this meter is running already."""
        if self in _running:
            raise RuntimeError("this CommunicationMeter is running already; call stop() first")
        if not _running:
            _install()
        _running.append(self)

    def stop(self) -> None:
        """Stop counting; what was counted stays. RuntimeError if this meter is not running."""
        if self not in _running:
            raise RuntimeError("this CommunicationMeter is not running; call start() first")
        _running.remove(self)
        if not _running:
            _remove()

    def __enter__(self) -> CommunicationMeter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget all counts."""
        self._calls.clear()
        self._payload.clear()

    def calls(self) -> int:
        """Number of collectives called, barriers included."""
        return self._calls.total()

    def payload_bytes(self) -> int:
        """Sum of the payloads, in bytes."""
        return self._payload.total()

    def bytes_sent(self) -> int:
        """Bytes that this rank sent, under the convention of `sent_per_payload_byte`."""
        return sum(traffic.sent_bytes for traffic in self.by_collective().values())

    def by_collective(self) -> dict[str, Traffic]:
        """Traffic of each collective ("all_reduce", "all_gather", ...), over all process groups."""
        return _sum_over(self.by_collective_and_group(), lambda collective, _: collective)

    def by_group(self) -> dict[tuple[int, ...], Traffic]:
        """Traffic of each process group, which its global ranks name, over all collectives."""
        return _sum_over(self.by_collective_and_group(), lambda _, ranks: ranks)

    def by_collective_and_group(self) -> dict[tuple[str, tuple[int, ...]], Traffic]:
        """Traffic of each (collective, global ranks of its process group)."""
        traffic = {}
        for (collective, place), calls in self._calls.items():
            ranks, payload = self._ranks[place], self._payload[collective, place]
            sent = round(payload * sent_per_payload_byte(collective, len(ranks)))
            traffic[collective, ranks] = Traffic(calls, payload, sent)
        return traffic

    def _count(self, collective: str, group: ProcessGroup, payload: int) -> None:
        place = group.group_name, group.size()
        if place not in self._ranks:
            self._ranks[place] = tuple(get_process_group_ranks(group))
        self._calls[collective, place] += 1
        self._payload[collective, place] += payload


def _sum_over(parts: dict[tuple[str, tuple[int, ...]], Traffic], name: Callable[..., Any]) -> dict[Any, Traffic]:
    totals: dict[Any, Traffic] = {}
    for key, one in parts.items():
        old = totals.get(name(*key), Traffic(0, 0, 0))
        totals[name(*key)] = Traffic(
            old.calls + one.calls, old.payload_bytes + one.payload_bytes, old.sent_bytes + one.sent_bytes
        )
    return totals


_running: list[CommunicationMeter] = []
_originals: list[tuple[Any, str, Any]] = []


def _install() -> None:
    for name, (collective, position) in _METHODS.items():
        # vars(), not getattr(): putting back the bare function would lose the C++ method's binding to `self`.
        if name in vars(ProcessGroup):
            _replace(ProcessGroup, name, vars(ProcessGroup)[name], _counting_method(name, collective, position))
    _replace(Work, "wait", vars(Work)["wait"], _timed(Work.wait))
    operators = torch.ops._c10d_functional
    for name, (collective, times_group_size) in _FUNCTIONAL.items():
        if hasattr(operators, name):
            original = getattr(operators, name)
            _replace(operators, name, original, _CountingOperator(original, collective, times_group_size))


def _replace(owner: Any, name: str, original: Any, replacement: Any) -> None:
    _originals.append((owner, name, original))
    setattr(owner, name, replacement)


def _remove() -> None:
    while _originals:
        setattr(*_originals.pop())


def _counting_method(name: str, collective: str, position: int | None) -> Callable:
    original = _timed(getattr(ProcessGroup, name))

    def method(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        work = original(group, *args, **kwargs)
        payload = 0 if position is None else _bytes((*args, *kwargs.values())[position])
        for meter in _running:
            meter._count(collective, group, payload)
        return work

    return method


class _CountingOperator:
    """A functional collective that counts when called and is the original in every other respect."""

    def __init__(self, original: Any, collective: str, times_group_size: bool) -> None:
        self._original, self._collective, self._times_group_size = original, collective, times_group_size

    def __call__(self, *args: Any) -> Any:
        result = _timed(self._original)(*args)
        group = args[-1]  # a name up to torch 2.13, which also takes the group itself
        group = _resolve_process_group(group) if isinstance(group, str) else group
        payload = _bytes(args[0]) * (group.size() if self._times_group_size else 1)
        for meter in _running:
            meter._count(self._collective, group, payload)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _timed(function: Callable) -> Callable:
    """The same, in the phase "communication" of the timers."""

    def method(*args: Any, **kwargs: Any) -> Any:
        timers = [meter._timer for meter in _running if meter._timer]
        for timer in timers:
            timer.enter("communication")
        try:
            return function(*args, **kwargs)
        finally:
            for timer in timers:
                timer.leave("communication")

    return method


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
