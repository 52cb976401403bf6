"""Periods that a rank border cuts, and the one sum that completes them.

A method's structure is a sequence of units (row blocks, heads, wavelet groups) in the flattened parameter. One that a
rank border cuts is a seam. Each seam has one slot in a small buffer: every rank adds what it holds of the unit, one
all_reduce sums the buffer, and each holder finishes the unit for itself. Aligned borders give no seams and no traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ds_memopt.shards.layout import RankBorders

Result = TypeVar("Result")

CutUnits = Callable[[str, np.ndarray], np.ndarray]
"""(parameter name, border positions) -> sorted ids of the units that those borders cut."""


class SeamTable:
    """The slots of all cut units of one process group, numbered alike on every rank, from the layout alone."""

    def __init__(self, borders: Mapping[str, np.ndarray], cut_units: CutUnits) -> None:
        self._units: dict[str, np.ndarray] = {}
        self._first_slot: dict[str, int] = {}
        self.num_slots = 0
        for name, positions in borders.items():
            units = cut_units(name, positions) if len(positions) else positions
            if len(units):
                self._units[name] = units
                self._first_slot[name] = self.num_slots
                self.num_slots += len(units)

    def __contains__(self, name: str) -> bool:
        return name in self._units

    def find(self, name: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The cut units among first <= unit < last of a parameter: their ids, and the slot of each."""
        if name not in self._units:
            empty = np.empty(0, dtype=np.int64)
            return empty, empty
        units = self._units[name]
        low, high = np.searchsorted(units, [first, last])
        return units[low:high], self._first_slot[name] + np.arange(low, high)


class Seams:
    """Completes the cut units of one optimizer call: one all_reduce per process group, none where nothing is cut."""

    def __init__(self, borders: tuple[RankBorders, ...], cut_units: CutUnits) -> None:
        by_group: dict[ProcessGroup | None, dict[str, np.ndarray]] = {}
        for part in borders:
            by_group.setdefault(part.process_group, {}).update(part.by_name)
        self.tables = [(group, SeamTable(names, cut_units)) for group, names in by_group.items()]

    def find(self, name: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The cut units among first <= unit < last of a parameter: their ids, and the slot of each in `sum`'s input."""
        base = 0
        for _, table in self.tables:
            if name in table:
                units, slots = table.find(name, first, last)
                return units, slots + base
            base += table.num_slots
        empty = np.empty(0, dtype=np.int64)
        return empty, empty

    @property
    def num_slots(self) -> int:
        return sum(table.num_slots for _, table in self.tables)

    def begin_sum(self, slots: torch.Tensor) -> Callable[[], None]:
        """Begin to sum `slots` ([num_slots] or [num_slots, ...]) over the ranks that share each slot, in place.

        Returns what waits for the sums. Until then `slots` must be left alone. A collective.
        """
        return self._begin(slots, dist.ReduceOp.SUM)

    def begin_max(self, slots: torch.Tensor) -> Callable[[], None]:
        """As `begin_sum`, with the largest of what the ranks have. A collective."""
        return self._begin(slots, dist.ReduceOp.MAX)

    def _begin(self, slots: torch.Tensor, operation: dist.ReduceOp) -> Callable[[], None]:
        base, begun = 0, []
        for group, table in self.tables:
            if table.num_slots:
                part = slots.narrow(0, base, table.num_slots)
                on_wire = part.to(collective_device(group, part.device))
                begun.append((dist.all_reduce(on_wire, operation, group=group, async_op=True), part, on_wire))
            base += table.num_slots

        def wait() -> None:
            for work, part, on_wire in begun:
                work.wait()
                if on_wire is not part:
                    part.copy_(on_wire)

        return wait


def collective_device(group: ProcessGroup | None, device: torch.device) -> torch.device:
    """Where a collective of this group can read a tensor of `device`: with CPU offload over NCCL, not on the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if device.type != "cpu" or accelerator is None or "cpu:" in dist.get_backend_config(group):
        return device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(action: Callable[[], Result]) -> Result | None:
    """What an action on rank 0 returns; None on the others. A collective of all ranks.

    Raises ValueError on all ranks, with the same message, where it failed.
    """
    result, failure = None, [""]
    if is_first_rank():
        try:
            result = action()
        except (OSError, ValueError) as error:
            failure = [str(error)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise ValueError(failure[0])
    return result
