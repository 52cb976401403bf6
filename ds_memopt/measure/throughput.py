"""Step time and tokens per second."""

from __future__ import annotations

import time

import torch


class StepTimer:
    """Mean step time and throughput over an interval of steps.

    On CUDA the device runs behind the host, so `read()` synchronises it: once per reading, never per step.

        timer = StepTimer(device, world_size)
        timer.start()
        for ...: train(); timer.count(tokens)      # tokens of all ranks in this step
        timer.read()                               # {"step_ms": ..., "tokens_per_s": ..., "tokens_per_s_per_gpu": ...}
        validate(); timer.start()                  # time between read() and start() belongs to no interval
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device, self._world_size = device, world_size
        self.start()

    def start(self) -> None:
        """Begin a new interval now. On CUDA synchronises the device."""
        self._steps = self._tokens = 0
        self._began = self._now()

    def count(self, tokens: int) -> None:
        """One step is done that consumed `tokens` tokens over all ranks. Host work only."""
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Figures of the interval since `start()`: step_ms, tokens_per_s, tokens_per_s_per_gpu (per rank on CPU).

        ValueError if no step was counted.
        """
        if not self._steps:
            raise ValueError("no step was counted since start(); call count(tokens) after each step")
        seconds = self._now() - self._began
        tokens_per_s = self._tokens / seconds
        return {
            "step_ms": 1000 * seconds / self._steps,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_gpu": tokens_per_s / self._world_size,
        }

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
