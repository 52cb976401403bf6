"""Ends a job in which a rank does not arrive, and names the rank and its place. Group timeouts name no rank, and differ
between NCCL, gloo and the groups that DeepSpeed makes."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

from ds_memopt.engines.processes import end, first_failure, meet, say
from ds_memopt.measure import CommunicationMeter
from ds_memopt.results.record import as_text

LONGEST_BEAT_S = 5.0
FAREWELL_S = 10.0


class Beat(NamedTuple):
    """What a rank tells the others. All ranks pass the same stages and call the same collectives, so that of two ranks
    the one with the larger (stage, collectives) is ahead."""

    number: int
    stage: int
    collectives: int  # called in this stage
    name: str  # of the stage
    alone: bool  # one rank may work in this stage while the others wait, as long as it lives

    @property
    def place(self) -> tuple[int, int]:
        return self.stage, self.collectives


class Watchdog:
    """Watches over the ranks of a job from its making to `stop`. All ranks make one, before the process group.

    Each rank writes a beat into a store every few seconds. The first rank reads them all; the others read the first
    one's. The job ends, with one sentence that says so, if a rank
      - has not written for `timeout`: it is stopped, or its machine is gone;
      - has failed, and FAREWELL_S later its launcher has not ended this one, as on another machine;
      - has been behind another for `timeout` without calling a collective; for `patience` in a stage that one rank may
        work in alone.
    A stage that takes long on all ranks, or in which all go forward, never ends it.
    """

    def __init__(self, rank: int, world_size: int, timeout: timedelta, patience: timedelta) -> None:
        self._rank, self._world_size = rank, world_size
        self._timeout, self._patience = timeout, patience
        self._interval = min(LONGEST_BEAT_S, timeout.total_seconds() / 20)
        self._meter = CommunicationMeter()
        self._stage = (0, 0, "the start", True)  # number, collectives before it, name, alone
        self._watched = list(range(world_size)) if rank == 0 else [0]
        self._beats: dict[int, Beat] = {}
        self._done = threading.Event()
        self._lost, self._failure = False, ""
        self._store = meet(rank, world_size, self._beat(0), timeout)
        self._meter.start()
        # Apart, for a server that is stopped does not answer, and the first thread waits.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)  # a thread that is inside the store when Python ends would abort the process

    def enter(self, name: str, alone: bool = False) -> None:
        """The next stage begins. All ranks call, in the same order."""
        self._stage = (self._stage[0] + 1, self._meter.calls(), name, alone)

    def stop(self, together: bool = False) -> None:
        """Watch no longer. together: all ranks stop now, and the first, which holds the store, is the last to go."""
        if self._done.is_set():
            return
        self._done.set()
        atexit.unregister(self.stop)
        self._meter.stop()
        for thread in self._threads:
            thread.join(1)
        if together:
            with contextlib.suppress(RuntimeError):  # the store's: another rank has failed
                if self._rank:
                    self._store.set(f"gone/{self._rank}", b"")
                else:
                    self._store.wait([f"gone/{rank}" for rank in range(1, self._world_size)], timedelta(seconds=5))

    def _beat(self, number: int) -> bytes:
        stage, before, name, alone = self._stage
        return json.dumps(Beat(number, stage, self._meter.calls() - before, name, alone)).encode()

    def _exchange(self) -> None:
        keys = [f"beat/{rank}" for rank in self._watched]
        try:
            for number in itertools.count(1):
                self._store.set(f"beat/{self._rank}", self._beat(number))
                values = self._store.multi_get(keys)
                self._failure = first_failure(self._store)
                self._beats = {r: Beat(*json.loads(value)) for r, value in zip(self._watched, values, strict=True)}
                if self._done.wait(self._interval):
                    return
        except RuntimeError:  # the store's
            self._lost = True

    def _watch(self) -> None:
        before: dict[int, Beat] = {}
        silent, behind = defaultdict(float), defaultdict(float)  # of each rank, for how many seconds
        then = time.monotonic()
        while not self._done.wait(self._interval):
            now = time.monotonic()
            passed, then = min(now - then, 2 * self._interval), now  # less if this process itself was stopped
            if self._failure and not self._done.wait(FAREWELL_S):
                self._end(f"ended, for rank {self._failure}")
            if self._lost and not self._done.wait(FAREWELL_S):
                self._end("ConnectionError: the first rank, or the launcher with the store, has gone")
            beats = self._beats
            front = max((beat.place for beat in beats.values()), default=None)
            for rank, beat in beats.items():
                moved = rank not in before or beat.place != before[rank].place
                silent[rank] = 0 if beat != before.get(rank) else silent[rank] + passed
                behind[rank] = 0 if moved or beat.place == front else behind[rank] + passed
            before = beats
            if beats:
                self._judge(beats, silent, behind)

    def _judge(self, beats: dict[int, Beat], silent: dict[int, float], behind: dict[int, float]) -> None:
        # If the first rank is silent the second says so; should it be gone too, the third a second later, and so on.
        limit = self._timeout.total_seconds() + self._rank
        if gone := [rank for rank in beats if silent[rank] >= limit and rank != self._rank]:
            self._end(
                f"TimeoutError: no answer for {_minutes(self._timeout)} (--timeout_minutes) from "
                f"{_where(gone, beats)}, by its last word, while this rank is in {self._stage[2]}: look at its machine"
            )
        # Of those behind, others may wait as well: in collectives that the last ones have not called yet.
        last = min(beat.place for beat in beats.values())
        for late_after, alone in ((self._timeout, False), (self._patience, True)):
            late = [rank for rank, beat in beats.items() if beat.place == last and beat.alone == alone]
            # One that has fallen silent is no longer waited for: whether it answers decides.
            late = [rank for rank in late if silent[rank] <= 3 * self._interval]
            if late := [rank for rank in late if behind[rank] >= late_after.total_seconds()]:
                self._end(
                    f"TimeoutError: the others have waited {_minutes(late_after)} (--timeout_minutes "
                    f"{self._timeout / timedelta(minutes=1):g}) for {_where(late, beats)}: raise it if that is no fault"
                )

    def _end(self, message: str) -> None:
        if not self._done.is_set():
            say(message)
            end(1)


def _where(ranks: Iterable[int], beats: dict[int, Beat]) -> str:
    """ "ranks 1-3 in step 7" """
    by_stage = defaultdict(list)
    for rank in ranks:
        by_stage[beats[rank].name].append(rank)
    return ", ".join(
        f"{'rank' if len(some) == 1 else 'ranks'} {as_text(some)} in {name}" for name, some in by_stage.items()
    )


def _minutes(time_span: timedelta) -> str:
    return f"{time_span / timedelta(minutes=1):g} minutes"
