"""When a run saves its checkpoints, and how long its steps wait for them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from ds_memopt.checkpoint import SaveInFlight
from ds_memopt.engines.processes import AskedToEnd
from ds_memopt.train import checkpoint
from ds_memopt.train.ranks import Ranks
from ds_memopt.train.settings import Settings
from ds_memopt.train.termination import NOT_SAVED, SAVED, Termination


class Saving:
    """The checkpoints of one run. All ranks call, in the same order."""

    def __init__(self, engine: Any, settings: Settings, ranks: Ranks) -> None:
        self._engine, self._settings, self._ranks = engine, settings, ranks
        self._folder = settings.output_dir / checkpoint.CHECKPOINTS
        self._in_flight: SaveInFlight | None = None
        self._began = self._last_s = self._stall_s = 0.0

    def save(self, step: int) -> None:
        """Save, or begin to, if steps follow that it can be written behind. SharedError if it cannot be saved."""
        self._ranks.enter(f"the checkpoint of step {step}", alone=True)
        with self._stalled():
            self.finish()
            self._began = time.monotonic()
            if self._settings.async_save and step < self._settings.steps:
                self._in_flight = checkpoint.begin_save(self._engine, step, self._settings)
            else:
                self._save_now(step)

    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is being written behind the steps."""
        return self._in_flight is not None and self._in_flight.is_writing()

    def advance(self) -> None:
        """What there is to do for a checkpoint after a step in which no rank has been writing. SharedError if one could
        not write."""
        if not self._in_flight:
            return
        with self._stalled():
            if self._in_flight.advance():
                self._in_flight, self._last_s = None, time.monotonic() - self._began

    def finish(self) -> None:
        """Wait until what is being written is whole. SharedError if it cannot be."""
        while self._in_flight:
            self.advance()

    def stall_s(self) -> float:
        """Seconds that this rank has waited since it was asked."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def save_and_end(self, step: int, termination: Termination) -> NoReturn:
        """Of a run that was told to stop: save this step, if the time that is left is enough. Raises AskedToEnd."""
        if not self._settings.save_interval:
            raise AskedToEnd(NOT_SAVED, f"SIGTERM: the run ends unsaved after step {step}, for --save_interval is 0")
        self.finish()
        elapsed_s, last_s = self._ranks.largest(termination.elapsed_s(), self._last_s)
        if elapsed_s + last_s > termination.limit_s:
            raise termination.unsaved()
        self._ranks.enter(f"the checkpoint of step {step}", alone=True)
        with self._stalled():
            self._save_now(step)
        raise AskedToEnd(SAVED, f"SIGTERM: step {step} is saved in {self._folder / f'step{step}'}: go on with --resume")

    def _save_now(self, step: int) -> None:
        self._began = time.monotonic()
        checkpoint.save(self._engine, step, self._settings, self._ranks)
        self._last_s = time.monotonic() - self._began

    @contextlib.contextmanager
    def _stalled(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._stall_s += time.monotonic() - began
