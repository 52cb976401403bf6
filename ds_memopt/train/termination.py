"""A run that is told to stop: it saves what it has come to, and ends in time."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

from ds_memopt.engines.processes import AskedToEnd, fail
from ds_memopt.train.launcher import deepspeed_is_gone

SAVED, NOT_SAVED = 75, 128 + signal.SIGTERM
"""Exit codes of a run that was told to stop: EX_TEMPFAIL, which asks to be run again, and what a shell reports of a
process that SIGTERM ends."""

SHARE = 0.9
"""Of the grace, for saving. In the rest the ranks say what was done, and leave."""


class Termination:
    """Listens for SIGTERM, and for the end of the `deepspeed` command, in a `with` block of the main thread.

    The step loop asks for `elapsed_s`. Should the block not be left when `limit_s` have passed since the first SIGTERM,
    a thread ends the process. Later ones change nothing. what_is_left: says, for the last message, what there is.
    """

    def __init__(self, grace_seconds: float, what_is_left: Callable[[], str]) -> None:
        self.limit_s = SHARE * grace_seconds
        self._grace, self._what_is_left = f"--grace_seconds {grace_seconds:g}", what_is_left
        self._told_at: float | None = None
        self._left = threading.Event()

    def elapsed_s(self) -> float:
        """Seconds since the first SIGTERM; -1 if there was none."""
        return -1 if self._told_at is None else time.monotonic() - self._told_at

    def tell(self, elapsed_s: float = 0) -> None:
        """This rank, or another one, was told to stop so long ago."""
        if self._told_at is None or elapsed_s > self.elapsed_s():
            self._told_at = time.monotonic() - elapsed_s

    def unsaved(self) -> AskedToEnd:
        """The end of a run that has no time to save."""
        return AskedToEnd(NOT_SAVED, f"SIGTERM: {self._grace} leaves no time to save; {self._what_is_left()}")

    def __enter__(self) -> Termination:
        # The handler waits until the main thread has returned from a collective. The byte in the pipe comes at once.
        told, tells = os.pipe()
        os.set_blocking(tells, False)
        self._handler = signal.signal(signal.SIGTERM, lambda *_: self.tell())
        signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
        self._pipe = told, tells
        self._thread = threading.Thread(target=self._listen, args=(told, deepspeed_is_gone()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        if error is not None and issubclass(error, AskedToEnd):
            return  # still deaf to SIGTERM: launchers send one to ranks that leave after the first
        signal.signal(signal.SIGTERM, self._handler)
        signal.set_wakeup_fd(-1)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)

    def _listen(self, told: int, is_gone: Callable[[], bool]) -> None:
        while not self._left.is_set():
            ready, *_ = select.select([told], [], [], 0.5)
            if signal.SIGTERM in (os.read(told, 100) if ready else b"") or self._told_at is None and is_gone():
                self.tell()
            if self.elapsed_s() > self.limit_s and not self._left.is_set():
                fail(self.unsaved())
