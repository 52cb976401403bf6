"""What the models and methods of the jobs compute for a token, as `measure.ModelFlops` counts it."""

from __future__ import annotations

from typing import Any

import transformers

from ds_memopt.measure import ModelFlops
from ds_memopt.train.presets import count_parameters


def model_flops(model: transformers.PreTrainedModel, method: Any, seq_length: int | None) -> ModelFlops | str:
    """Of a step on sequences that are all this long; or, where the formula does not hold, why not. None: they differ.

    method: the optimizer. One that does not run a forward and a backward for every token says so by `passes`, None if
    that is no constant.
    """
    if seq_length is None:
        return "MFU is null: the sequences differ in length"
    config = model.config.get_text_config()
    passes = getattr(method, "passes", 1.0)
    if passes is None:
        return f"MFU is null: the passes of {type(method).__name__} are not the same for all tokens and steps"
    if getattr(config, "num_experts_per_tok", None):
        return "MFU is null: a token goes through some of the experts only"
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(heads, int):
        return f"MFU is null: {type(model).__name__} does not tell its layers and attention heads"
    parameters, embedding = count_parameters(model), model.get_input_embeddings()
    output = model.get_output_embeddings()
    if output is None or output.weight is not embedding.weight:
        parameters -= count_parameters(embedding)  # a table of which a token reads one row
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFlops(parameters, layers, heads, head_dim, seq_length, passes)
