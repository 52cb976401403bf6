"""Memory-efficient training methods that live inside DeepSpeed and FSDP2."""

from __future__ import annotations

from typing import Any

from ds_memopt.support import SUPPORT

__version__ = "0.1.0"
__all__ = [*SUPPORT, "PortableCheckpoint", "load", "register", "save"]


def __getattr__(name: str) -> Any:
    """The methods, `save`, `load` and `PortableCheckpoint`, imported at their first use: torch takes seconds, and a
    command's --help needs none of it."""
    if name == "PortableCheckpoint":
        from ds_memopt import trainer_checkpoints

        return trainer_checkpoints.PortableCheckpoint
    if name in ("save", "load"):
        from ds_memopt import checkpoint

        return getattr(checkpoint, name)
    if name not in SUPPORT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_memopt import optimizers

    return getattr(optimizers, name)


def register() -> None:
    """Make every method a word in DeepSpeed's JSON: `"optimizer": {"type": "AdamMini"}`.

    Call it once, before deepspeed.initialize, Trainer or Accelerator. Calling it again changes nothing.

    Raises ImportError without deepspeed, RuntimeError where this release of DeepSpeed or torch lacks names
    that are needed: it tells all of them.
    """
    from ds_memopt.engines.private_names import check_private_names

    check_private_names()  # before the import of what uses them
    from ds_memopt.engines.register import register as register_deepspeed

    register_deepspeed()
