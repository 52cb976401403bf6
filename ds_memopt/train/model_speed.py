"""What makes a model's step faster or smaller, with the same result but for rounding: `options.SPEED`."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.utils import is_flash_attn_2_available

from ds_memopt.blocks import bare_parameters, partition_into_blocks, wrapped_modules
from ds_memopt.optimizers import method_of
from ds_memopt.train.loss_in_head import LossInHead
from ds_memopt.train.options import SPEED, RunOptions

KEPT_BY_SELECTIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
"""What selective checkpointing does not compute again: products with weights, and PyTorch's fused attention. Plain
attention's products, of tokens with tokens, are computed again."""


def check_speed(options: RunOptions, method: str, device: torch.device, dtype: str) -> dict[str, Any]:
    """The options, as resolved_config.json tells them. ValueError for what does not work with this method or machine.

    method: the optimizer's type. dtype: "bf16", "fp16" or "fp32", that the model computes in.
    """
    if options.attention == "flash_attention_2":
        _check_flash(device, dtype)
    if options.loss_chunks > 1 and method_of(method).uses_losses:
        raise ValueError(
            f"--loss_chunks {options.loss_chunks}: {method} compares losses of forwards that it runs itself, two at a "
            "time, and takes them from whole logits: leave it out, and lower --micro_batch"
        )
    if options.compile and options.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(
            f"--compile {options.compile} is no backend of torch.compile: choose one of {', '.join(known)}"
        )
    return {one.name: getattr(options, one.name) for one in fields(options) if one.metadata["group"] == SPEED}


def check_under_deepspeed(options: RunOptions, zero_stage: int) -> None:
    """ValueError for what FSDP2 alone can do."""
    if options.compile and zero_stage == 3:
        raise ValueError(
            f"--compile {options.compile}: ZeRO-3 gathers each matrix by a hook inside the layer, where graphs break: "
            "take ZeRO-2, or FSDP2 (launch/pretrain_fsdp2.py), which gathers a layer as a whole"
        )
    if getattr(options, "float8", None):
        raise ValueError(f"--float8 {options.float8} is FSDP2's (launch/pretrain_fsdp2.py): leave it out")
    if getattr(options, "replicas", 1) > 1:
        raise ValueError(f"--replicas {options.replicas} is FSDP2's (launch/pretrain_fsdp2.py): leave it out")
    if getattr(options, "reduce_once", False):
        raise ValueError(
            "--reduce_once is FSDP2's (launch/pretrain_fsdp2.py): ZeRO-0 and 1 reduce once a step by themselves, "
            "ZeRO-2 and 3 hold no whole gradients to add micro-batches to. Leave it out"
        )


def _check_flash(device: torch.device, dtype: str) -> None:
    if device.type != "cuda":
        lacks = f"needs a GPU, and this run is on a {device.type}"
    elif not is_flash_attn_2_available():
        lacks = "needs the package flash-attn, which is not installed here: pip install flash-attn"
    elif dtype == "fp32":
        lacks = "computes in bf16 and fp16 alone, and this run in fp32: add --dtype bf16"
    else:
        return
    raise ValueError(
        f"--attention flash_attention_2 {lacks}; or take sdpa, in which PyTorch chooses the fastest that it has, "
        "its own flash attention among them"
    )


def make_ready(model: transformers.PreTrainedModel, options: RunOptions) -> None:
    """Do to a model, before an engine has it, what the options say. ValueError for what the model does not allow."""
    if options.attention:
        set_attention(model, options.attention)
    checkpoint_activations(model, options.gradient_checkpointing)
    if options.loss_chunks > 1:
        LossInHead(model, options.loss_chunks)
    if options.compile:
        compile_layers(model, options.compile)


def set_attention(model: transformers.PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    if (has := attention_of(model)) != implementation:
        raise ValueError(f"--attention {implementation}: {type(model).__name__} has {has} alone: leave it out")


def attention_of(model: transformers.PreTrainedModel) -> str:
    """transformers' attn_implementation that the model computes with."""
    return model.config._attn_implementation


def checkpoint_activations(model: transformers.PreTrainedModel, kind: str) -> None:
    """Let backward compute again what forward does not keep. kind: "none", "full" (a layer's input alone is kept) or
    "selective" (and `KEPT_BY_SELECTIVE`)."""
    if kind == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT_BY_SELECTIVE)
    model.gradient_checkpointing_enable(how)


def compile_layers(model: torch.nn.Module, backend: str) -> None:
    """Compile each layer by itself: they share one graph, and what an engine hangs on the model stays outside."""
    modules = wrapped_modules(model)
    for layer in partition_into_blocks(model, bare_parameters(model)).blocks:
        modules[layer].compile(backend=backend)
