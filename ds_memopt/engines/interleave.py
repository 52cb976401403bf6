"""Two passes over a model in turn, unit by unit, so that ZeRO-3 gathers each unit's weights once for both.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn


class Aborted(Exception):
    """Raised in one pass when the other has failed."""


class _Turns:
    """Of two threads one runs at a time."""

    def __init__(self) -> None:
        self._mine = (threading.Semaphore(1), threading.Semaphore(0))
        self._ended = [False, False]
        self._failed = False

    @contextlib.contextmanager
    def taking(self, me: int) -> Iterator[None]:
        self._mine[me].acquire()
        try:
            yield
        except BaseException:
            self._failed = True
            raise
        finally:
            self._ended[me] = True
            self._mine[1 - me].release()

    def change(self, me: int) -> None:
        """Let the other run until it calls this, or ends."""
        if not self._ended[1 - me]:
            self._mine[1 - me].release()
            self._mine[me].acquire()
        if self._failed:
            raise Aborted


@contextlib.contextmanager
def one_step(offload) -> Iterator[None]:
    """For ZeRO-3, which learns what a step needs and when: all forwards in this, and the backward, are one step.

    offload: what gathers and partitions parameters, or None.
    """
    if offload is None:
        yield
        return
    coordinator = offload.get_param_coordinator()
    coordinator.reset_step()
    with mock.patch.object(coordinator, "reset_step"):  # it would be called at the beginning of each
        yield


def interleaved(
    first: Callable[[], Any], second: Callable[[], Any], units: Sequence[nn.Module], paused: Callable
) -> tuple[Any, Any]:
    """Run `first` in a thread of its own and `second` in this one: of every unit the first pass, then the second.

    units: modules without parameters above them, in any order. paused: a context in which `second` runs while `first`
    waits.
    Returns both results. An exception of either ends both, and is raised.
    """
    turns, outcome, entered, here = _Turns(), {}, [0, 0], threading.get_ident()
    context = _of_this_thread()

    def enter(*_: Any) -> None:
        me = 1 if threading.get_ident() == here else 0
        entered[me] += 1
        if entered[me] == 1:  # the pass has only begun
            return
        if me == 0:
            with paused():
                turns.change(me)
        else:
            turns.change(me)

    def run_first() -> None:
        with context(), contextlib.suppress(Aborted):
            try:
                with turns.taking(0):
                    outcome["first"] = first()
            except Exception as error:
                outcome["error"] = error

    handles = [unit.register_forward_pre_hook(enter, prepend=True) for unit in units]
    thread = threading.Thread(target=run_first, name="zeroth-order half")
    thread.start()
    try:
        with turns.taking(1):
            outcome["second"] = second()
    except Aborted:
        pass
    finally:
        thread.join()
        for handle in handles:
            handle.remove()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["first"], outcome["second"]


def _of_this_thread() -> Callable[[], contextlib.ExitStack]:
    """What makes a context for another thread: with this one's stream and autocast, which torch keeps per thread."""
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    devices = ["cpu"] if stream is None else ["cpu", "cuda"]
    cast = [(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in devices]

    def context() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        for device, dtype, enabled in cast:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        return stack

    return context
