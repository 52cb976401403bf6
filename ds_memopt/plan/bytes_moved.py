"""What PyTorch's operators read and write, on tensors that hold nothing too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITTEN_ONLY = {"copy_", "fill_", "zero_"}
"""Operators that do not read what they overwrite."""


class BytesMoved(TorchDispatchMode):
    """While this lasts, counts in `total` the bytes that operators read and write. Views count nothing."""

    total = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None) -> Any:
        result = operator(*arguments, **(keywords or {}))
        name = operator.overloadpacket.__name__
        if not operator.is_view and "empty" not in name:
            read = arguments[1:] if name in WRITTEN_ONLY else arguments
            self.total += sum(map(_bytes, tree_leaves((read, result))))
        return result


def _bytes(value: Any) -> int:
    """Of an expanded tensor the memory behind it."""
    if not isinstance(value, torch.Tensor):
        return 0
    return min(value.numel() * value.itemsize, value.untyped_storage().nbytes())
