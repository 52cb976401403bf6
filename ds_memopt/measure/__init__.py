"""Meters for any training loop: time, memory, optimizer state, communication. They know torch, no method of ours."""

from ds_memopt.measure.communication import CommunicationMeter, Traffic, sent_per_payload_byte
from ds_memopt.measure.memory import (
    GIB,
    MIB,
    limit_memory,
    peak_memory_gib,
    reset_peak_memory,
    resident_gib,
    state_bytes,
    state_bytes_per_parameter,
)
from ds_memopt.measure.monitor import write_to_monitor
from ds_memopt.measure.step_timer import OTHER, PHASES, StepTimer
from ds_memopt.measure.utilisation import MEMORY_BANDWIDTH, ModelFlops, peak_flops

__all__ = [
    "GIB",
    "MEMORY_BANDWIDTH",
    "MIB",
    "OTHER",
    "PHASES",
    "CommunicationMeter",
    "ModelFlops",
    "StepTimer",
    "Traffic",
    "limit_memory",
    "peak_flops",
    "peak_memory_gib",
    "reset_peak_memory",
    "resident_gib",
    "sent_per_payload_byte",
    "state_bytes",
    "state_bytes_per_parameter",
    "write_to_monitor",
]
