"""A trace of some steps by PyTorch's profiler: every operator and kernel on a time line."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from ds_memopt.train.ranks import Ranks

PASSED_OVER = 3
"""Steps before: the first ones allocate, compile and start collectives. The profiler is on in the last of them."""


class StepTrace:
    """Traces steps on the first rank, after `PASSED_OVER`, and writes folder/trace.json.gz. steps: 0 does nothing."""

    def __init__(self, folder: Path, steps: int, ranks: Ranks) -> None:
        self._profiler: profile | None = None
        if not steps or not ranks.is_main:
            return
        self._path = folder / "trace.json.gz"
        self._profiler = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (ranks.device.type == "cuda"),
            schedule=schedule(wait=PASSED_OVER - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self._path))
        print(f"{self._path}: open it at https://ui.perfetto.dev", flush=True)

    def step(self) -> None:
        """After each step."""
        if self._profiler:
            self._profiler.step()

    def stop(self) -> None:
        """After the last."""
        if self._profiler:
            self._profiler.stop()
