"""Our figures in DeepSpeed's monitor, and so in TensorBoard, Weights & Biases, Comet or CSV files."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any


def write_to_monitor(monitor: Any, figures: Mapping[str, Any], samples: int) -> None:
    """Write every number of `figures` as "ds_memopt/<name>", numbers inside a mapping as "ds_memopt/<name>/<key>".

    monitor: `engine.monitor` of DeepSpeed, which the blocks tensorboard, wandb, comet and csv_monitor of the ds_config
    turn on; if none is on, and on all ranks but the first, nothing is written. samples: sequences seen so far, the axis
    of DeepSpeed's own events. What is no number, such as None, is left out.
    """
    if not monitor.enabled:
        return
    events = []
    for name, value in figures.items():
        parts = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, number in parts:
            if isinstance(number, Real):
                events.append(("/".join(filter(None, ("ds_memopt", name, key))), number, samples))
    monitor.write_events(events)
