"""What stands between DeepSpeed's engine and a method. Each family of methods has one adapter, with its own hooks.

`register` wraps each method of DeepSpeedEngine in HOOKS once. An engine whose optimizer is one of ours has an adapter,
chosen when DeepSpeed first sees the optimizer; what it calls then is the adapter's hook. Every other engine has none,
and its own methods run as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ds_memopt.optimizers import NamedOptimizer

HOOKS = {
    "_configure_zero_optimizer": "configure_zero",
    "_configure_bf16_optimizer": "configure_bf16",
    "_configure_fp16_optimizer": "configure_fp16",
    "_configure_lr_scheduler": "configure_lr_scheduler",
    "_scheduler_from_config": "scheduler_from_config",
    "forward": "forward",
    "backward": "backward",
    "_take_model_step": "take_model_step",
    "save_checkpoint": "save_checkpoint",
    "load_checkpoint": "load_checkpoint",
    "_common_checkpoint_state": "common_checkpoint_state",
    "load_module_state_dict": "load_module_state_dict",
    "_get_all_ckpt_names": "get_all_ckpt_names",
    "_load_zero_checkpoint": "load_zero_checkpoint",
    "module_state_dict": "module_state_dict",
    "_zero3_consolidated_16bit_state_dict": "module_state_dict",
    "destroy": "destroy_engine",
}
"""For each method of DeepSpeedEngine that is wrapped: the hook of the adapter that runs in its place."""

_ATTRIBUTE = "_ds_memopt_adapter"


class Adapter:
    """The hooks of a family. Each is called in the place of the engine's own method, `original`, which has its engine
    already, with what the engine's method was called with. Where nothing else is said it does what DeepSpeed does.

    optimizer: the method.
    """

    def __init__(self, optimizer: NamedOptimizer) -> None:
        self.optimizer = optimizer

    def check_optimizer(self, original: Callable, engine: Any) -> str:
        """Which of DeepSpeed's objects shall wrap the optimizer: first of all hooks, before anything is built."""
        return original(self.optimizer)

    def configure_zero(self, original: Callable, engine: Any, optimizer: NamedOptimizer) -> Any:
        """Build what the engine takes for its ZeRO optimizer."""
        return original(optimizer)

    def configure_bf16(self, original: Callable, engine: Any, optimizer: NamedOptimizer) -> Any:
        """Build the wrapper with fp32 masters, for bf16 at ZeRO-1 with fp32 gradient accumulation."""
        return original(optimizer)

    def configure_fp16(self, original: Callable, engine: Any, optimizer: NamedOptimizer, dtype: Any) -> Any:
        """Build the wrapper with fp32 masters for 16-bit weights at ZeRO-0."""
        return original(optimizer, dtype)

    def configure_lr_scheduler(self, original: Callable, engine: Any) -> None:
        """Build the scheduler, of the config or of the user. Ours have no momentum that could be cycled."""
        try:
            original()
        except ValueError as error:
            if "cycle_momentum" in str(error):
                raise ValueError(
                    f"{type(self.optimizer).__name__} has no momentum that a schedule could cycle. Give the scheduler "
                    "cycle_momentum=False, in JSON false."
                ) from error
            raise

    def scheduler_from_config(self, original: Callable, engine: Any, optimizer: Any) -> Any:
        """Build the scheduler that the JSON names; torch's take no object that wraps an optimizer."""
        return original(self.optimizer)

    def forward(self, original: Callable, engine: Any, *inputs: Any, **keywords: Any) -> Any:
        """A forward of the engine."""
        return original(*inputs, **keywords)

    def backward(
        self, original: Callable, engine: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Any:
        """A backward of the engine; returns the loss."""
        return original(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)

    def take_model_step(self, original: Callable, engine: Any, *arguments: Any, **keywords: Any) -> None:
        """A step of optimizer and scheduler, at the end of accumulation."""
        return original(*arguments, **keywords)

    def save_checkpoint(self, original: Callable, engine: Any, *arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **keywords)

    def load_checkpoint(self, original: Callable, engine: Any, *arguments: Any, **keywords: Any) -> Any:
        return original(*arguments, **keywords)

    def common_checkpoint_state(
        self, original: Callable, engine: Any, weights: Any, zero_optimizer_state: bool, save_frozen_param: bool
    ) -> dict[str, Any]:
        """What a checkpoint says of the run. At ZeRO-1 too all frozen weights, where they may be none for long:
        DeepSpeed writes them at ZeRO-2 and 3 only, and without them zero_to_fp32 would lose them."""
        frozen_later_train = bool(self.optimizer.trained_parameters())
        return original(weights, zero_optimizer_state, save_frozen_param or frozen_later_train and zero_optimizer_state)

    def load_module_state_dict(
        self, original: Callable, engine: Any, checkpoint: Mapping[str, Any], *arguments: Any, **keywords: Any
    ) -> None:
        """Load a model's weights from a checkpoint, before its optimizer's state."""
        return original(checkpoint, *arguments, **keywords)

    def get_all_ckpt_names(self, original: Callable, engine: Any, load_dir: str, tag: str) -> list[str]:
        """The files of a checkpoint that hold weights."""
        return original(load_dir, tag)

    def load_zero_checkpoint(
        self, original: Callable, engine: Any, load_dir: str, tag: str, load_optimizer_states: bool = True
    ) -> bool:
        """Load the optimizer's state from ZeRO's files. Returns whether it was loaded."""
        return original(load_dir, tag, load_optimizer_states)

    def module_state_dict(self, original: Callable, engine: Any, *arguments: Any, **keywords: Any) -> Any:
        """All weights, or without frozen ones: those that train, if not now, are none of them."""
        trained = [p for p in self.optimizer.trained_parameters() if not p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(True)
        try:
            return original(*arguments, **keywords)
        finally:
            for parameter in trained:
                parameter.requires_grad_(False)

    def destroy_engine(self, original: Callable, engine: Any) -> None:
        """Then the model is as it was before the method."""
        original()
        self.optimizer.release()


def adapter_of(engine: Any) -> Adapter | None:
    """The adapter of an engine whose optimizer is one of ours; None for any other."""
    return vars(engine).get(_ATTRIBUTE)


def set_adapter(engine: Any, adapter: Adapter) -> None:
    setattr(engine, _ATTRIBUTE, adapter)
