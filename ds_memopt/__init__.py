"""Memory-efficient training methods that live inside DeepSpeed and FSDP2."""

from ds_memopt.optimizers import GWT, IPSGD, AdamMini, Addax, BAdam, MeZO

__version__ = "0.1.0"
__all__ = ["GWT", "IPSGD", "AdamMini", "Addax", "BAdam", "MeZO", "register"]


def register() -> None:
    """Make every method a word in DeepSpeed's JSON: `"optimizer": {"type": "AdamMini"}`.

    Call it once, before deepspeed.initialize, Trainer or Accelerator. Calling it again changes nothing.

    Raises ImportError without deepspeed, RuntimeError where this release of DeepSpeed lacks a name that is needed.
    """
    from ds_memopt.engines.register import register as register_deepspeed

    register_deepspeed()
