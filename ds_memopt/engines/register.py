"""Registration in DeepSpeed: our methods become optimizer types of its JSON, and each engine of theirs gets an adapter.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import deepspeed
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import utils as zero_utils

from ds_memopt.engines.adapter import HOOKS, Adapter, adapter_of, set_adapter
from ds_memopt.engines.block_state_adapter import BlockStateAdapter
from ds_memopt.engines.config_keys import closest, warn_of_typos
from ds_memopt.engines.in_backward_adapter import AddaxAdapter, InBackwardAdapter
from ds_memopt.engines.private_names import TESTED_DEEPSPEED
from ds_memopt.engines.processes import leave_group_at_exit
from ds_memopt.engines.rotation_adapter import RotationAdapter
from ds_memopt.engines.zeroth_order_adapter import ZerothOrderAdapter
from ds_memopt.optimizers import METHOD_KEY, METHODS, capabilities_of
from ds_memopt.optimizers.base.capabilities import Family
from ds_memopt.support import refuse

ADAPTERS: dict[Family, type[Adapter]] = {
    "block state": BlockStateAdapter,
    "rotation": RotationAdapter,
    "zeroth order": ZerothOrderAdapter,
    "in backward": InBackwardAdapter,
    "split batch": AddaxAdapter,
}
"""Which adapter serves a family of methods."""


def register() -> None:
    """See `ds_memopt.register`."""
    if getattr(DeepSpeedEngine, "_ds_memopt_registered", False):
        return
    if not deepspeed.__version__.startswith(TESTED_DEEPSPEED + "."):
        warnings.warn(
            f"ds_memopt was tested with DeepSpeed {TESTED_DEEPSPEED}.*, this is {deepspeed.__version__}: run its tests "
            f"or install deepspeed {TESTED_DEEPSPEED}.*.",
            stacklevel=3,
        )
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS += METHODS.values()
    for name, wrapper in WRAPPERS.items():
        _wrap(name, wrapper)
    for name, hook in HOOKS.items():
        _wrap(name, _hooked(hook))
    leave_group_at_exit()
    DeepSpeedEngine._ds_memopt_registered = True


def _wrap(name: str, wrapper: Callable) -> None:
    """Put wrapper(original, engine, ...) in the place of a method of DeepSpeed's engine."""
    original = getattr(DeepSpeedEngine, name)

    @functools.wraps(original)
    def method(engine, *args, **kwargs):
        return wrapper(functools.partial(original, engine), engine, *args, **kwargs)

    setattr(DeepSpeedEngine, name, method)


def _hooked(hook: str) -> Callable:
    def run(original, engine, *args, **kwargs):
        adapter = adapter_of(engine)
        if adapter is None:
            return original(*args, **kwargs)
        return getattr(adapter, hook)(original, engine, *args, **kwargs)

    return run


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
        if total_steps is not None:
            hyper_parameters = METHODS[word].accepted({"total_steps": total_steps}) | hyper_parameters
        return METHODS[word].from_model(engine.module, model_parameters, **hyper_parameters)
    return original(model_parameters)


def _do_optimizer_sanity_check(original, engine, optimizer):
    """Choose the adapter. Refuse what the method cannot do, and an optimizer that took the place of one of ours."""
    family = capabilities_of(optimizer).family
    if family is not None:
        for feature in requested_features(engine):
            refuse(type(optimizer), feature)
        if optimizer.releases_gradients:
            refuse(type(optimizer), "release_gradients_under_zero")
        adapter = ADAPTERS[family](optimizer)
        set_adapter(engine, adapter)
        return adapter.check_optimizer(original, engine)
    if swapped := next((group[METHOD_KEY] for group in optimizer.param_groups if METHOD_KEY in group), None):
        raise ValueError(
            f"{swapped} was replaced by {type(optimizer).__name__} before DeepSpeed saw it (accelerate does that with "
            f'optimizer offload). Name it in the ds_config instead, "optimizer": {{"type": "{swapped}", ...}}, and '
            "pass accelerate's DummyOptim."
        )
    return original(optimizer)


def requested_features(engine) -> list[str]:
    """Which of the features that some method refuses the config asks for."""
    offload = engine.zero_offload_optimizer()
    autocast = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
    bf16_masters = engine.bf16_master_weights_and_gradients()
    on_cpu = engine.zero_cpu_offload() or not engine.bf16_optimizer_states()
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
        "bf16_masters": bf16_masters and not on_cpu,
        "bf16_masters_on_cpu": bf16_masters and on_cpu,
        "fp16_masters": engine.fp16_master_weights_and_gradients(),
        "quantized_weights": engine.zero_quantized_weights(),
        "quantized_gradients": engine.zero_quantized_gradients(),
        "sequence_parallel": engine.sequence_parallel_size > 1,
        "deepspeed_moe": engine.has_moe_layers,
        "autoep": engine._config.expert_parallel_config.enabled,
        "pipeline": engine.pipeline_parallelism,
        "deepcompile": engine.is_deepcompile_enabled(),
    }
    return [feature for feature, asked in requested.items() if asked]


WRAPPERS = {
    "_is_supported_optimizer": _is_supported_optimizer,
    "_configure_basic_optimizer": _configure_basic_optimizer,
    "_do_optimizer_sanity_check": _do_optimizer_sanity_check,
}
"""Methods of DeepSpeedEngine that run before it has an adapter. Those that run with one: HOOKS."""
