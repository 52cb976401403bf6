"""Meters for any training loop: time, memory, optimizer state, communication. They know torch, no method of ours."""

from ds_memopt.measure.communication import CommunicationMeter, Traffic, sent_per_payload_byte
from ds_memopt.measure.memory import GIB, peak_memory_gib, reset_peak_memory, state_bytes, state_bytes_per_parameter
from ds_memopt.measure.throughput import StepTimer

__all__ = [
    "GIB",
    "CommunicationMeter",
    "StepTimer",
    "Traffic",
    "peak_memory_gib",
    "reset_peak_memory",
    "sent_per_payload_byte",
    "state_bytes",
    "state_bytes_per_parameter",
]
