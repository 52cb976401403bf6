"""BAdam in DeepSpeed: only the active block is given to ZeRO, and the same ZeRO object is built anew for the next one.

All that holds on to the object (schedulers, accelerate, Trainer, the engine's hooks) goes on holding the right one.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from deepspeed.runtime import bf16_optimizer as bf16_module
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage3 as stage3_module
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_memopt.engines.block_state_adapter import BlockStateAdapter
from ds_memopt.optimizers import BAdam, check_meaning
from ds_memopt.shards import is_first_rank

logger = logging.getLogger("ds_memopt")

POSITION_KEY = "ds_memopt_position"
"""Key of a checkpoint's model states: which block was active, to be known before anything else is loaded."""

AS_WEIGHTS = "turn it into weights (zero_to_fp32.py, save_16bit_model) and load them before deepspeed.initialize."

CONFIGURE = {
    DeepSpeedZeroOptimizer: (engine_module, lambda engine: engine._configure_zero_optimizer),
    DeepSpeedZeroOptimizer_Stage3: (stage3_module, lambda engine: engine._configure_zero_optimizer),
    BF16_Optimizer: (engine_module, lambda engine: engine._configure_bf16_optimizer),
    FP16_UnfusedOptimizer: (engine_module, lambda engine: engine._configure_fp16_optimizer),
}
"""For each class that wraps an optimizer: where the engine takes it from, and the engine's method that builds it."""

KEPT = (
    "loss_scaler", "dynamic_loss_scale", "loss_scale_config", "custom_loss_scaler", "external_loss_scale", "overflow",
    "_global_grad_norm", "_grad_acc_post_hooks",
)  # fmt: skip
"""What such an object has learnt in training, or was told by the engine, and must not forget."""


class RotationAdapter(BlockStateAdapter):
    """For methods that train one block of parameters at a time."""

    optimizer: BAdam

    def check_optimizer(self, original: Callable, engine: Any) -> str:
        self.optimizer.keep_all_groups()
        return super().check_optimizer(original, engine)

    def configure_zero(self, original: Callable, engine: Any, optimizer: BAdam) -> Any:
        """With a bucket for gradients, 1 GB by default in ZeRO-3, that is no larger than the largest block."""
        zero_config = engine._config.zero_config
        zero_config.reduce_bucket_size = min(zero_config.reduce_bucket_size, optimizer.largest_block())
        return super().configure_zero(_without_empty_groups(original), engine, optimizer)

    def configure_bf16(self, original: Callable, engine: Any, optimizer: BAdam) -> Any:
        return super().configure_bf16(_without_empty_groups(original), engine, optimizer)

    def take_model_step(self, original: Callable, engine: Any, *arguments: Any, **keywords: Any) -> None:
        """Behind it, where no update can be lost, the switch to the next block."""
        result = original(*arguments, **keywords)
        if self._is_wrapped(engine) and self.optimizer.finish_step():
            release(engine)
            self.optimizer.next_block()
            rebuild(engine)
        return result

    def common_checkpoint_state(self, original: Callable, engine: Any, *arguments: Any) -> dict[str, Any]:
        """With the block that was active."""
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
        ]
        return super().common_checkpoint_state(original, engine, *arguments) | {POSITION_KEY: groups}

    def load_module_state_dict(
        self, original: Callable, engine: Any, checkpoint: Mapping[str, Any], *arguments: Any, **keywords: Any
    ) -> None:
        """First of all the block that was active when the weights were saved becomes active."""
        if self._is_wrapped(engine):
            self._go_to_saved_block(engine, checkpoint)
        return original(checkpoint, *arguments, **keywords)

    def _go_to_saved_block(self, engine: Any, checkpoint: Mapping[str, Any]) -> None:
        if POSITION_KEY not in checkpoint:
            raise ValueError(
                "This checkpoint was not written by BAdam, so what it holds as trained and as frozen does not fit: "
                + AS_WEIGHTS
            )
        groups = checkpoint[POSITION_KEY]
        try:
            check_meaning(self.optimizer, groups)
        except ValueError as error:
            raise ValueError(f"{error} For its weights alone, {AS_WEIGHTS}") from None
        self.go_to(engine, (groups[0]["visit"], groups[0]["visit_step"]))

    def go_to(self, engine: Any, position: tuple[int, int]) -> None:
        """Make the block of a position active, between two steps, with its masters taken from the weights. A
        collective."""
        release(engine)
        self.optimizer.go_to(position)
        rebuild(engine)

    def _is_wrapped(self, engine: Any) -> bool:
        """Whether there is a ZeRO object; without, the method rotates by itself."""
        return engine.optimizer is not self.optimizer


def _without_empty_groups(original: Callable) -> Callable:
    def configure(optimizer: BAdam) -> Any:
        with no_empty_group(optimizer):
            return original(optimizer)

    return configure


@contextlib.contextmanager
def no_empty_group(optimizer: BAdam) -> Iterator[None]:
    """For ZeRO, which cannot flatten a param group without parameters: such a group is lent its smallest frozen one.

    It gets no gradient, belongs to no interval, has no state and is never updated; it costs its own size in masters,
    gradients and traffic.
    """
    lent = [(group, min(trained, key=_size)) for group, trained in optimizer.trained_by_group() if not group["params"]]
    for group, parameter in lent:
        group["params"] = [parameter.requires_grad_(True)]
        if _size(parameter) > 0.05 * optimizer.largest_block() and not group.get("lent_told") and is_first_rank():
            logger.warning(
                "BAdam: a param group has no parameter in %s. ZeRO needs one there, and gets %s (%d elements): its "
                "masters, gradients and traffic come on top. Groups with parameters of every layer avoid that.",
                optimizer.active_block, optimizer.name_of(parameter), _size(parameter),
            )  # fmt: skip
            group["lent_told"] = True
    yield
    for _, parameter in lent:
        parameter.requires_grad_(False)


def _size(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def release(engine) -> None:
    """Take the ZeRO object's hooks off the parameters. ZeRO-3 keeps those that gather and partition."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        with mock.patch.object(wrapper.parameter_offload, "destroy"):
            wrapper.destroy()
    elif hasattr(wrapper, "destroy"):
        wrapper.destroy()
    for parameter in engine.module.parameters():
        if hasattr(parameter, "_hp_mapping"):
            del parameter._hp_mapping  # destroy() empties it, and safe_get_full_fp32_param would then return zeros


def rebuild(engine) -> None:
    """Build the ZeRO object anew, in place, around the parameters that are in the optimizer's param groups now."""
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    module, configure = CONFIGURE[type(wrapper)]
    kept = {name: getattr(wrapper, name) for name in KEPT if hasattr(wrapper, name)}

    def in_place(*arguments, **keywords):
        wrapper.__init__(*arguments, **keywords)
        return wrapper

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, type(wrapper).__name__, in_place))
        stack.enter_context(quiet(logging.getLogger("DeepSpeed")))
        stack.enter_context(mock.patch.object(bf16_module, "see_memory_usage"))  # it prints whatever the level is
        if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            offload = wrapper.parameter_offload
            stack.enter_context(mock.patch.object(wrapper, "initialize_ds_offload", lambda **keywords: offload))
            # It would collect garbage, for 0.2 s, to make room for the whole model; a block needs little.
            stack.enter_context(mock.patch.object(zero_utils, "gc"))
        low_precision = (wrapper.low_precision_dtype,) if isinstance(wrapper, FP16_UnfusedOptimizer) else ()
        again = configure(engine)(optimizer, *low_precision)
    assert again is wrapper, "the engine built another object"
    for name, value in kept.items():
        setattr(wrapper, name, value)
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        coordinator = wrapper.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()  # backward will end at another layer


@contextlib.contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    """Only warnings, from a logger that would tell at every switch what it told at the start."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
