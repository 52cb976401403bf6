"""DeepSpeed's timers and flops profiler, where the method runs the model otherwise than once forward and once back.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal
from unittest import mock

from deepspeed.runtime.engine import EngineTimers

OFF = EngineTimers(enable_micro_timers=False, enable_global_timers=False)


@contextlib.contextmanager
def one_pass(engine, kind: Literal["forward", "backward"], cost: float | None = None) -> Iterator[None]:
    """All that the model runs while this lasts counts as one forward, or as one backward.

    DeepSpeed's hooks on the model would begin a measurement in every forward, also in one beside another, and end that
    of a backward in an epilogue that is not ours.

    cost: of a backward in forwards, for the profiler's FLOPS; None: 2, and what activation checkpointing adds.
    """
    timers = engine.engine_timers.forward_timers if kind == "forward" else engine.engine_timers.backward_timers
    profiler = engine.flops_profiler if engine.flops_profiler_enabled() else None
    profiled = kind == "forward" and profiler is not None and engine.global_rank == 0
    profiled = profiled and engine.global_steps == engine.flops_profiler_profile_step()
    if profiler is not None and cost is not None:
        profiler.recompute_fwd_factor = cost - 2
    if kind == "forward":
        engine.tput_timer.start()
    engine._start_timers(timers)
    if profiled:
        profiler.start_profile()
    try:
        with (
            mock.patch.object(engine, "engine_timers", OFF),
            mock.patch.object(engine, "flops_profiler_enabled", lambda: False),
            mock.patch.object(engine.tput_timer, "start", lambda: None),
        ):
            yield
    finally:
        if profiled:
            profiler.stop_profile()
        engine._stop_timers(timers)
