"""Writes the trajectory of a run: a few numbers per step, from which its weights can be made again."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from ds_memopt.optimizers.probes.checksum import as_hex, checksum
from ds_memopt.optimizers.probes.probe import Probe
from ds_memopt.optimizers.probes.trajectory import SKIPPED, TrajectoryHeader, TrajectoryWriter, check_writable
from ds_memopt.optimizers.stored_weights.in_place_optimizer import InPlaceOptimizer
from ds_memopt.shards import on_first_rank


class _Unwritten:
    """The trajectory on all ranks but the first."""

    def append(self, *record: Any) -> None:
        """The first rank writes the same."""


class Recorder:
    """Writes each step of a method with a probe, if a file is named. All ranks make one, and the first writes.

    Raises ValueError, on all ranks, for a file that cannot be written.
    """

    START: ClassVar[dict[str, Any]] = {"base_checksum": ""}
    """How its part of the method's `progress` begins."""

    def __init__(self, optimizer: InPlaceOptimizer, probe: Probe, trajectory: str | None) -> None:
        self._optimizer, self._probe, self._trajectory = optimizer, probe, trajectory
        self._writer: TrajectoryWriter | _Unwritten | None = None
        if trajectory is not None:
            on_first_rank(partial(check_writable, trajectory))

    def open(self) -> None:
        """Before the first step of a run or of its continuation. All look at the weights, the first rank writes."""
        if self._trajectory is None or self._writer is not None:
            return
        optimizer = self._optimizer
        if not optimizer.progress["base_checksum"]:
            parts = list(optimizer.placement.parts())
            total = checksum(((part.name, part.start, part.elements) for part in parts), parts[0].elements.device)
            optimizer.placement.sum_of_parts(total)
            optimizer.set_progress(base_checksum=as_hex(total))
        names = optimizer.names_by_tensor()
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        header = TrajectoryHeader(
            method=type(optimizer).__name__,
            hyper=optimizer.described | {"weight_decay": decays, "layers": self._probe.directions.layers},
            probes=self._probe.probes,
            parameters=[[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups],
            base_checksum=optimizer.progress["base_checksum"],
            dtype=str(next(iter(names)).dtype).removeprefix("torch."),
        )
        resume_after = optimizer.steps - 1 if optimizer.steps else None
        self._writer = on_first_rank(partial(TrajectoryWriter, self._trajectory, header, resume_after)) or _Unwritten()

    def append(self, step: int, made: bool, projected: list[float]) -> None:
        """Write a step, with g of each probe as it was observed. made: whether it moved the weights."""
        if self._writer is not None:
            rates = [group["lr"] for group in self._optimizer.param_groups]
            self._writer.append(step, 0 if made else SKIPPED, projected, rates)

    def close(self) -> None:
        """The file is to be cut back to a step that was loaded: open it anew."""
        self._writer = None
