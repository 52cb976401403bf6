"""Compile a formula of plain PyTorch without changing a bit of what it gives."""

from __future__ import annotations

from collections.abc import Callable

import torch


def compile_exactly(formula: Callable[..., torch.Tensor], *example) -> Callable[..., torch.Tensor]:
    """`formula` compiled for tensors and ints of any size, after it has given the same bits as the formula itself.

    formula: a function of tensors and ints larger than 1. For 0 and 1 it would be compiled anew.
    example: arguments to compile and to compare with, of a usual size.

    The formula must keep to operations that IEEE 754 or integers define to the bit: +, -, * and conversions, but no
    division, log or cos. (PyTorch's own sqrt of an fp32 tensor on a CPU is not rounded correctly either.)

    Raises RuntimeError if the formula cannot be compiled on this machine, or if the bits differ.
    """
    options = {
        "emulate_precision_casts": True,  # else a GPU would contract a * b + c to one rounding, as no CPU does here
        "cpp.dynamic_threads": True,  # else as many threads as the process had whose compile cache this may come from
    }
    fast = torch.compile(formula, dynamic=True, fullgraph=True, options=options)
    try:
        result = fast(*example)
    except Exception as error:
        raise RuntimeError(
            f"{formula.__name__} cannot be compiled for {example[0].device}. On a CPU this takes g++ or clang++, on a "
            "GPU Triton. Do without compilation: the results are the same, only slower."
        ) from error
    if not torch.equal(result, formula(*example)):
        raise RuntimeError(
            f"{formula.__name__} gives other numbers when compiled for {example[0].device}. Empty PyTorch's compile "
            "cache (TORCHINDUCTOR_CACHE_DIR), or do without compilation."
        )
    return fast
