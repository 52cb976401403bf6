"""Registration in DeepSpeed: our methods become optimizer types of its JSON and learn where ZeRO lays the parameters.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedEngine._is_supported_optimizer, ._configure_basic_optimizer, ._do_optimizer_sanity_check,
      ._configure_zero_optimizer, ._configure_bf16_optimizer, ._configure_fp16_optimizer, ._configure_lr_scheduler,
      ._scheduler_from_config (all wrapped), .sequence_parallel_size, .has_moe_layers, .pipeline_parallelism,
      ._config.expert_parallel_config, and READ below; what the other files of this folder name
  deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS, deepspeed.runtime.zero.config.ZERO_OPTIMIZATION
"""

from __future__ import annotations

import functools
import warnings
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

from ds_memopt.engines import frozen, in_backward_adapter, in_place_adapter, rotation_adapter, zeroth_order_adapter
from ds_memopt.engines.config_keys import closest, warn_of_typos
from ds_memopt.engines.processes import leave_group_at_exit
from ds_memopt.optimizers import (
    METHOD_KEY,
    METHODS,
    BAdam,
    InPlaceOptimizer,
    MeZO,
    ShardedOptimizer,
    UpdatesInBackward,
    takes,
)
from ds_memopt.shards import MasterCopyPlacement, Zero3Placement, Zero12Placement
from ds_memopt.support import refuse

TESTED_DEEPSPEED = "0.19"


def register() -> None:
    """See `ds_memopt.register`."""
    if getattr(DeepSpeedEngine, "_ds_memopt_registered", False):
        return
    modules = (WRAPPERS, frozen.WRAPPERS, in_place_adapter.WRAPPERS, rotation_adapter.WRAPPERS)
    needed = (*(name for wrappers in modules for name in wrappers), *READ)
    missing = [f"DeepSpeedEngine.{name}" for name in needed if not hasattr(DeepSpeedEngine, name)]
    if not hasattr(zero_utils, "ZERO_SUPPORTED_OPTIMIZERS"):
        missing.append("deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS")
    if missing:
        raise _too_different(missing)
    if not deepspeed.__version__.startswith(TESTED_DEEPSPEED + "."):
        warnings.warn(
            f"ds_memopt was tested with DeepSpeed {TESTED_DEEPSPEED}.*, this is {deepspeed.__version__}: run its tests "
            f"or install deepspeed {TESTED_DEEPSPEED}.*.",
            stacklevel=3,
        )
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS += METHODS.values()
    for wrappers in modules:
        for name, wrapper in wrappers.items():
            setattr(DeepSpeedEngine, name, _wrapped(getattr(DeepSpeedEngine, name), wrapper))
    leave_group_at_exit()
    DeepSpeedEngine._ds_memopt_registered = True


def _too_different(missing: list[str]) -> RuntimeError:
    return RuntimeError(
        f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}, which ds_memopt needs. "
        f"Install deepspeed {TESTED_DEEPSPEED}.*."
    )


def _wrapped(original, wrapper):
    @functools.wraps(original)
    def method(engine, *args, **kwargs):
        return wrapper(functools.partial(original, engine), engine, *args, **kwargs)

    return method


def _is_supported_optimizer(original, engine, word):
    if word in METHODS or original(word):
        return True
    if meant := closest(word, [*METHODS, *DEEPSPEED_OPTIMIZERS]):
        raise ValueError(f'optimizer type {word!r} is unknown. Did you mean "{meant}"?')
    return False


def _configure_basic_optimizer(original, engine, model_parameters):
    """Build the optimizer that the JSON names; here DeepSpeed still knows the module, hence names and roles."""
    word = engine.optimizer_name()
    if word in METHODS:
        warn_of_typos(engine)
        hyper_parameters = dict(engine.optimizer_params() or {})
        total_steps = (engine.scheduler_params() or {}).get("total_num_steps")
        if total_steps is not None and takes(word, "total_steps"):
            hyper_parameters.setdefault("total_steps", total_steps)
        return METHODS[word].from_model(engine.module, model_parameters, **hyper_parameters)
    return original(model_parameters)


def _do_optimizer_sanity_check(original, engine, optimizer):
    """Refuse what the method cannot do, and an optimizer that took the place of one of ours."""
    if isinstance(optimizer, tuple(METHODS.values())):
        for feature in requested_features(engine):
            refuse(type(optimizer), feature)
    elif swapped := next((group[METHOD_KEY] for group in optimizer.param_groups if METHOD_KEY in group), None):
        raise ValueError(
            f"{swapped} was replaced by {type(optimizer).__name__} before DeepSpeed saw it (accelerate does that with "
            f'optimizer offload). Name it in the ds_config instead, "optimizer": {{"type": "{swapped}", ...}}, and '
            "pass accelerate's DummyOptim."
        )
    if isinstance(optimizer, BAdam):
        optimizer.keep_all_groups()
    checked = original(optimizer)
    # Whatever the stage and the precision, ours takes the place of ZeRO's object.
    return ZERO_OPTIMIZATION if isinstance(optimizer, InPlaceOptimizer) else checked


def requested_features(engine) -> list[str]:
    """Which of the features that some method refuses the config asks for."""
    offload = engine.zero_offload_optimizer()
    autocast = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
    requested = {
        "elastic_checkpoint": engine.zero_optimization() and engine.zero_elastic_checkpoint(),
        "universal_checkpoint": engine.load_universal_checkpoint(),
        "nvme_offload": offload is not None and offload.device == "nvme",
        "partial_offload": offload is not None and offload.ratio < 1,
        "super_offload": offload is not None and engine.super_offload(),
        "quantized_frozen": engine.zero_quantized_nontrainable_weights(),
        "zenflow": engine.zenflow_config() is not None,
        "tensor_parallel": engine.autotp_size() > 1,
        "fp16_autocast": autocast == torch.float16,
        "bf16_autocast": autocast == torch.bfloat16,
        "low_precision_masters": engine.bf16_master_weights_and_gradients()
        or engine.fp16_master_weights_and_gradients(),
        "quantized_weights": engine.zero_quantized_weights(),
        "quantized_gradients": engine.zero_quantized_gradients(),
        "sequence_parallel": engine.sequence_parallel_size > 1,
        "deepspeed_moe": engine.has_moe_layers,
        "autoep": engine._config.expert_parallel_config.enabled,
        "pipeline": engine.pipeline_parallelism,
        "deepcompile": engine.is_deepcompile_enabled(),
    }
    return [feature for feature, asked in requested.items() if asked]


def _configure_zero_optimizer(original, engine, optimizer):
    if isinstance(optimizer, UpdatesInBackward):
        return in_backward_adapter.build(engine, optimizer, original)
    if isinstance(optimizer, MeZO):
        return zeroth_order_adapter.build(engine, optimizer, original)
    if not isinstance(optimizer, ShardedOptimizer):
        return original(optimizer)
    names = optimizer.names_by_tensor()  # before ZeRO puts its flat buffers in the parameters' place
    rotation_adapter.shrink_bucket(engine, optimizer)
    with rotation_adapter.no_empty_group(optimizer):
        zero = original(optimizer)
    _bind(optimizer, Zero3Placement if engine.zero_optimization_partition_weights() else Zero12Placement, zero, names)
    return zero


def _configure_lr_scheduler(original, engine):
    try:
        original()
    except ValueError as error:
        if isinstance(engine.basic_optimizer, tuple(METHODS.values())) and "cycle_momentum" in str(error):
            raise ValueError(
                f"{type(engine.basic_optimizer).__name__} has no momentum that a schedule could cycle. Give the "
                "scheduler cycle_momentum=False, in JSON false."
            ) from error
        raise


def _scheduler_from_config(original, engine, optimizer):
    """Build the scheduler that the JSON names; torch's take no object that wraps an optimizer."""
    return original(
        engine.basic_optimizer if isinstance(engine.basic_optimizer, tuple(METHODS.values())) else optimizer
    )


def _configure_bf16_optimizer(original, engine, optimizer):
    if not isinstance(optimizer, ShardedOptimizer):
        return original(optimizer)
    names = optimizer.names_by_tensor()
    with rotation_adapter.no_empty_group(optimizer):
        wrapper = original(optimizer)
    _bind(optimizer, Zero12Placement, wrapper, names)
    return wrapper


def _bind(optimizer: ShardedOptimizer, placement, *layout) -> None:
    try:
        optimizer.bind(placement(*layout))
    except AttributeError as error:
        raise _too_different([str(error)]) from error


def _configure_fp16_optimizer(original, engine, optimizer, low_precision_dtype):
    if not isinstance(optimizer, ShardedOptimizer):
        return original(optimizer, low_precision_dtype)
    names = optimizer.names_by_tensor()
    # To create states, DeepSpeed makes a step with zero gradients here and nowhere else: it would decay the weights
    # and count as the first step, so that stage 0 would differ from all others. Our states are created when needed.
    with mock.patch.object(optimizer, "step", lambda: None):
        wrapper = original(optimizer, low_precision_dtype)
    _bind(optimizer, MasterCopyPlacement, wrapper, names)
    return wrapper


READ = (
    "zero_offload_optimizer", "zero_elastic_checkpoint", "load_universal_checkpoint", "super_offload", "zenflow_config",
    "zero_quantized_nontrainable_weights", "zero_quantized_weights", "zero_quantized_gradients",
    "bf16_master_weights_and_gradients", "fp16_master_weights_and_gradients", "is_deepcompile_enabled",
    "zero_hpz_partition_size", "flops_profiler_enabled", "flops_profiler_profile_step",
    "scheduler_params", "autotp_size", "torch_autocast_enabled", "torch_autocast_dtype",
    "zero_optimization_partition_weights",
)  # fmt: skip
WRAPPERS = {
    "_is_supported_optimizer": _is_supported_optimizer,
    "_configure_basic_optimizer": _configure_basic_optimizer,
    "_do_optimizer_sanity_check": _do_optimizer_sanity_check,
    "_configure_zero_optimizer": _configure_zero_optimizer,
    "_configure_bf16_optimizer": _configure_bf16_optimizer,
    "_configure_fp16_optimizer": _configure_fp16_optimizer,
    "_configure_lr_scheduler": _configure_lr_scheduler,
    "_scheduler_from_config": _scheduler_from_config,
}
