"""What the rest of the house may ask of a method. No engine, job or plan looks at a method's class or at its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

Family = Literal["block state", "rotation", "zeroth order", "in backward", "split batch"]


class Capabilities:
    """What a method can do. The defaults are those of any optimizer of torch's or DeepSpeed's, for which this class
    stands where a word of a ds_config is none of ours."""

    family: ClassVar[Family | None] = None
    """Which adapter of engines/ serves the method: "block state" (ZeRO lays flat partitions, the method steps on them),
    "rotation" (as that, while one block trains), "zeroth order" (forwards alone), "in backward" (each gradient is used
    up as it comes), "split batch" (forwards of one half of a batch, backward of the other). None: no adapter."""

    uses_gradients: ClassVar[bool] = True
    """Whether a step runs backward."""

    uses_losses: ClassVar[bool] = False
    """Whether a step compares losses at perturbed weights, in forwards without a graph."""

    writes_weights: ClassVar[bool] = False
    """Whether the method updates the stored weights itself: an engine then holds no fp32 masters, and no set of
    gradients that could be clipped."""

    accumulates: ClassVar[bool] = True
    """Whether a step may have several micro-batches. False: each one is a step."""

    releases_gradients: bool = False
    """Whether this optimizer was told to use each gradient up inside backward and to free it: then there is no set of
    gradients that could be clipped, and each micro-batch is a step."""

    rotates: ClassVar[bool] = False
    """Whether one block of parameters trains at a time. Such a method has `position`, `resume_at` and `go_to`."""

    splits_batch: ClassVar[bool] = False
    """Whether a batch has a zeroth-order half of zo_batch rows and a first-order half of fo_batch rows."""

    smallest_batch: ClassVar[int] = 1
    """Rows that a rank needs in a batch."""

    for_equal_lengths: ClassVar[Mapping[str, Any]] = {}
    """Hyper-parameters, and what they must be where all sequences are equally long."""

    replayable: ClassVar[bool] = False
    """Whether a trajectory of the method tells all of every step."""

    passes: float | None = 1.0
    """Forward and backward passes of a token in a step, where a forward alone is a third; None: they differ."""

    active_block: str | None = None
    """The name of the block that trains; None: all train."""

    update_kept: float | None = None
    """Share of the last step's update that rounding has left on this rank; None: nobody measures it."""

    @classmethod
    def accepted(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values whose names are hyper-parameters of the method."""
        return {}

    @classmethod
    def steps_on_bf16(cls, values: Mapping[str, Any]) -> bool:
        """Whether the method, with these hyper-parameters, wants the bf16 weights themselves and keeps what they lack:
        an engine then holds no fp32 masters."""
        return False

    def step_bytes(self) -> int | None:
        """Bytes that a step with fused kernels reads and writes on this rank, of what has a gradient and state now, or
        of the weights that it writes itself; None: the step is made by PyTorch's operators whatever the back end."""
        return None

    def trained_parameters(self) -> list[torch.Tensor]:
        """The parameters that train, where that is not told by whether they require gradients now; else none."""
        return []

    def largest_block(self) -> int | None:
        """Elements of the largest block that trains at a time; None: all train."""
        return None

    def release(self) -> None:
        """Give the model back: all parameters require gradients that did, and no hook stays on it."""


def capabilities_of(optimizer: Any) -> Capabilities:
    """What an optimizer can do, ours or not."""
    return optimizer if isinstance(optimizer, Capabilities) else Capabilities()
