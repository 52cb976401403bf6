"""What a run will hold and send, before it is begun: bytes of each rank by kind, and bytes on the wire."""

from ds_memopt.plan.estimate import (
    estimate_zero0_model_states_mem_needs_all_live,
    estimate_zero1_model_states_mem_needs_all_live,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs_all_live,
)
from ds_memopt.plan.predict import DTYPES, RULES, Prediction, predict

__all__ = [
    "DTYPES",
    "RULES",
    "Prediction",
    "estimate_zero0_model_states_mem_needs_all_live",
    "estimate_zero1_model_states_mem_needs_all_live",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs_all_live",
    "predict",
]
