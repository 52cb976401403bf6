"""Under the names of DeepSpeed's estimators: what model states take under every method, in place of a rule of thumb."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ds_memopt.measure import GIB
from ds_memopt.plan.predict import RULES, Prediction, predict


def _estimate(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    *,
    stage: int,
    methods: Iterable[str] = tuple(RULES),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: str = "bf16",
) -> dict[str, Prediction]:
    """Print the GiB that weights, masters, gradients and states take on each GPU, and return the predictions by method.

    As deepspeed.runtime.zero's functions of these names, with the same first arguments. There is no
    additional_buffer_factor, because buffers are counted, and no "cold" twin, because the total of parameters does not
    tell into which blocks they fall: build the model on the meta device, where it takes no memory.

    model: on any device. num_gpus_per_node, num_nodes: their product is the number of ranks. methods: of "AdamW" and
    ours. options: of a method, by its name. dtype: as in `predict`.

    Raises ValueError as `predict` does.
    """
    ranks = num_gpus_per_node * num_nodes
    given = options or {}
    predictions = {
        method: predict(model, method, given.get(method), stage=stage, ranks=ranks, dtype=dtype) for method in methods
    }
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    print(f"ZeRO-{stage}, {num_nodes} x {num_gpus_per_node} GPUs, {total / 1e6:.0f}M parameters; GiB of each GPU:")
    for method, prediction in predictions.items():
        buffers = max(prediction.backward, prediction.step)
        print(f"  {method:10} {prediction.held / GIB:8.2f} and {buffers / GIB:.2f} of buffers")
    return predictions


estimate_zero0_model_states_mem_needs_all_live = partial(_estimate, stage=0)
estimate_zero1_model_states_mem_needs_all_live = partial(_estimate, stage=1)
estimate_zero2_model_states_mem_needs_all_live = partial(_estimate, stage=2)
estimate_zero3_model_states_mem_needs_all_live = partial(_estimate, stage=3)
