"""Products with the weights of a model's layers in float8, by torchao: `--float8`."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
from torch import nn

from ds_memopt.blocks import bare_parameters, partition_into_blocks
from ds_memopt.optimizers import method_of

MULTIPLE = 16
"""Of both sizes of a matrix: the hardware's products in float8 want it."""


def check_float8(recipe: str, method: str, device: torch.device, dtype: str) -> None:
    """ValueError for what does not work with this method or machine."""
    if importlib.util.find_spec("torchao") is None:
        lacks = "needs the package torchao, which is not installed here: pip install torchao"
    elif dtype != "bf16":
        lacks = f"casts from bf16 and back, and this run is in {dtype}: add --dtype bf16"
    elif method_of(method).uses_losses:
        lacks = f"rounds by up to 6 %, and {method} compares losses at weights that differ by less: leave it out"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        lacks = (
            f"needs compute capability 8.9 or more, which {torch.cuda.get_device_name(device)} has not: leave it out"
        )
    else:
        return
    raise ValueError(f"--float8 {recipe} {lacks}")


def use_float8(model: nn.Module, recipe: str, device: torch.device) -> str:
    """Swap torchao's layers in for the linear ones of the model's layers, with the same weights and names; returns what
    was done. On a CPU the products are emulated. ValueError if no matrix has sizes that divide by 16."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layers = tuple(f"{layer}." for layer in partition_into_blocks(model, bare_parameters(model)).blocks)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(layers)}
    fitting = {name for name, m in linear.items() if not (m.in_features % MULTIPLE or m.out_features % MULTIPLE)}
    if not fitting:
        raise ValueError(
            f"--float8 {recipe}: of {len(linear)} linear layers none has sizes that divide by {MULTIPLE}: leave it out"
        )
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type == "cpu")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in fitting)
    emulated = ", emulated" if config.emulate else ""
    return f"float8, {recipe}{emulated}: {len(fitting)} of {len(linear)} linear layers; head and embedding are not"
