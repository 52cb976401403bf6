"""BAdam in DeepSpeed: only the active block is given to ZeRO, and the same ZeRO object is built anew for the next one.

All that holds on to the object (schedulers, accelerate, Trainer, the engine's hooks) goes on holding the right one.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedEngine._take_model_step, ._common_checkpoint_state, .load_module_state_dict (all wrapped),
      ._configure_zero_optimizer, ._configure_bf16_optimizer, ._configure_fp16_optimizer,
      ._config.zero_config.reduce_bucket_size
  deepspeed.runtime.engine.DeepSpeedZeroOptimizer, .BF16_Optimizer, .FP16_UnfusedOptimizer,
      deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3: where the engine takes the classes from
  deepspeed.runtime.bf16_optimizer.see_memory_usage, deepspeed.runtime.zero.utils.gc
  Parameter._hp_mapping, ZeROOptimizer._grad_acc_post_hooks,
      DeepSpeedZeroOptimizer_Stage3.initialize_ds_offload, .parameter_offload,
      PartitionedParameterCoordinator._invalidate_trace, .is_invalid_trace, and KEPT below
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from unittest import mock

from deepspeed.runtime import bf16_optimizer as bf16_module
from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage3 as stage3_module
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

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


@contextlib.contextmanager
def no_empty_group(optimizer) -> Iterator[None]:
    """For ZeRO, which cannot flatten a param group without parameters: such a group is lent its smallest frozen one.

    It gets no gradient, belongs to no interval, has no state and is never updated; it costs its own size in masters,
    gradients and traffic.
    """
    lent = [
        (group, min(trained, key=_size))
        for group, trained in (optimizer.trained_by_group() if isinstance(optimizer, BAdam) else ())
        if not group["params"]
    ]
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


def shrink_bucket(engine, optimizer) -> None:
    """Make ZeRO's bucket for gradients, 1 GB by default in ZeRO-3, no larger than the largest block."""
    if isinstance(optimizer, BAdam):
        zero_config = engine._config.zero_config
        zero_config.reduce_bucket_size = min(zero_config.reduce_bucket_size, optimizer.largest_block())


def take_model_step(original, engine, *arguments, **keywords):
    """A step of the engine, and behind it, where no update can be lost, the switch to the next block."""
    result = original(*arguments, **keywords)
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, BAdam) and engine.optimizer is not optimizer and optimizer.finish_step():
        release(engine)
        optimizer.next_block()
        rebuild(engine)
    return result


def common_checkpoint_state(original, engine, *arguments, **keywords):
    """What a checkpoint says of the run, and which block was active."""
    state = original(*arguments, **keywords)
    if not isinstance(engine.basic_optimizer, BAdam):
        return state
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    return state | {POSITION_KEY: groups}


def load_module_state_dict(original, engine, checkpoint, *arguments, **keywords):
    """Load a model's weights; first of all the block that was active when they were saved becomes active."""
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, BAdam) and engine.optimizer is not optimizer:
        if POSITION_KEY not in checkpoint:
            raise ValueError(
                "This checkpoint was not written by BAdam, so what it holds as trained and as frozen does not fit: "
                + AS_WEIGHTS
            )
        groups = checkpoint[POSITION_KEY]
        try:
            check_meaning(optimizer, groups)
        except ValueError as error:
            raise ValueError(f"{error} For its weights alone, {AS_WEIGHTS}") from None
        release(engine)
        optimizer.go_to((groups[0]["visit"], groups[0]["visit_step"]))
        rebuild(engine)
    return original(checkpoint, *arguments, **keywords)


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


WRAPPERS = {
    "_take_model_step": take_model_step,
    "_common_checkpoint_state": common_checkpoint_state,
    "load_module_state_dict": load_module_state_dict,
}
