"""Step time, tokens per second, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

PHASES = ("forward", "backward", "optimizer", "communication")
OTHER = "other"


class StepTimer:
    """Mean step time and throughput over an interval of steps, and the split of that time into phases.

    On CUDA the device runs behind the host, so `read()` synchronises it: once per reading, never per step.

        timer = StepTimer(device, world_size)
        timer.watch(model)                         # its forward passes are the phase "forward"
        with CommunicationMeter(timer):            # collectives are the phase "communication"
            for ...:
                loss = model(...)
                with timer.phase("backward"): loss.backward()
                with timer.phase("optimizer"): optimizer.step()
                timer.count(tokens)                # tokens of all ranks in this step
        timer.read()                               # {"step_ms": ..., "tokens_per_s": ..., "forward_ms": ..., ...}
        validate(); timer.start()                  # time between read() and start() belongs to no interval

    Phases exclude each other: what runs in a phase inside another one counts for the inner one alone. On CUDA they are
    times of the stream that is current where the interval starts: "communication" is what this stream waits for, and a
    collective that runs on another stream meanwhile takes none of it.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device, self._world_size = device, world_size
        self._inside: list[str] = []
        self.start()

    def start(self) -> None:
        """Begin a new interval now. On CUDA synchronises the device."""
        self._steps = self._tokens = 0
        self._began = self._now()
        self._stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._marks: list[tuple[Any, str]] = []  # a moment, and what begins then

    def count(self, tokens: int) -> None:
        """One step is done that consumed `tokens` tokens over all ranks. Host work only."""
        self._steps += 1
        self._tokens += tokens

    def watch(self, module: nn.Module) -> None:
        """Count the forward passes of a model as the phase "forward", wherever they are called: zeroth-order methods
        run some of theirs in backward."""
        module.register_forward_pre_hook(lambda *_: self.enter("forward"))
        module.register_forward_hook(lambda *_: self.leave("forward"), always_call=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is of this phase."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def enter(self, name: str) -> None:
        """The phase begins, inside the one that is on."""
        self._inside.append(name)
        self._mark()

    def leave(self, name: str) -> None:
        """The phase that began last under this name ends. Threads that take turns may leave in another order."""
        last = len(self._inside) - 1 - self._inside[::-1].index(name)
        del self._inside[last]
        self._mark()

    def read(self) -> dict[str, float]:
        """Figures of the interval since `start()`: step_ms, tokens_per_s, tokens_per_s_per_gpu (per rank on CPU).

        If phases were told, also their times in a step of this rank: forward_ms, backward_ms, optimizer_ms,
        communication_ms, and other_ms, which is the rest of step_ms. ValueError if no step was counted.
        """
        if not self._steps:
            raise ValueError("no step was counted since start(); call count(tokens) after each step")
        seconds = self._now() - self._began
        tokens_per_s = self._tokens / seconds
        figures = {
            "step_ms": 1000 * seconds / self._steps,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_gpu": tokens_per_s / self._world_size,
        }
        if not self._marks:
            return figures
        spent: Counter[str] = Counter()
        for (began, name), (ended, _) in itertools.pairwise(self._marks):
            spent[name] += began.elapsed_time(ended) if self._stream else 1000 * (ended - began)
        split = {f"{name}_ms": spent[name] / self._steps for name in PHASES}
        return figures | split | {f"{OTHER}_ms": figures["step_ms"] - sum(split.values())}

    def _mark(self) -> None:
        moment: Any
        if self._stream is None:
            moment = time.perf_counter()
        elif torch.cuda.current_stream(self._device) == self._stream:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:  # beside the stream whose time is split
            return
        self._marks.append((moment, self._inside[-1] if self._inside else OTHER))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
