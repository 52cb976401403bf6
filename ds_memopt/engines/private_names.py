"""Every private name of DeepSpeed, torch and FSDP2 that ds_memopt wraps, reads or assumes, and what it is for.

Checked against DeepSpeed 0.19.8 and torch 2.11 to 2.13. `register` checks all of it against what is installed: a name
may be an attribute of its owner, a field of a configuration, or what the owner's own methods set.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import torch

TESTED_DEEPSPEED, TESTED_TORCH = "0.19", "2.11 to 2.13"

ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
FP16 = "deepspeed.runtime.fp16.fused_optimizer:FP16_Optimizer"
FP16_UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"
OFFLOAD = "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload"
COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator"

NAMES: dict[str, dict[str, str]] = {
    ENGINE: {
        # register.py and adapter.py: wrapped
        "_is_supported_optimizer": "knows our words",
        "_configure_basic_optimizer": "builds ours, where the module is known",
        "_do_optimizer_sanity_check": "sees the optimizer first: the adapter is chosen",
        "_configure_zero_optimizer": "builds the ZeRO optimizer; called again to build one anew",
        "_configure_bf16_optimizer": "builds BF16_Optimizer",
        "_configure_fp16_optimizer": "builds FP16_UnfusedOptimizer, for bf16 at ZeRO-0 as well",
        "_configure_lr_scheduler": "its error for cycle_momentum",
        "_scheduler_from_config": "is given the basic optimizer",
        "forward": "runs a method's forwards",
        "backward": "runs a method's backward",
        "_take_model_step": "behind it the next block becomes active",
        "save_checkpoint": "saves weights that train without masters",
        "load_checkpoint": "loads them",
        "_common_checkpoint_state": "what a checkpoint says of the run",
        "load_module_state_dict": "knows the block or the placement first",
        "_get_all_ckpt_names": "names the weights' files",
        "_load_zero_checkpoint": "reads the files of any number of ranks",
        "module_state_dict": "weights without frozen ones",
        "_zero3_consolidated_16bit_state_dict": "the same at ZeRO-3",
        "destroy": "gives the model back",
        # register.py: read, to refuse what a method cannot do
        "optimizer_name": "the word of the config",
        "optimizer_params": "its hyper-parameters",
        "scheduler_params": "total_num_steps",
        "zero_offload_optimizer": "offload to NVMe, partial offload",
        "zero_offload_param": "offload to NVMe",
        "zero_optimization": "whether there is ZeRO",
        "zero_elastic_checkpoint": "a feature",
        "load_universal_checkpoint": "a feature",
        "super_offload": "a feature",
        "zenflow_config": "a feature",
        "autotp_size": "a feature",
        "torch_autocast_enabled": "a feature",
        "torch_autocast_dtype": "a feature",
        "zero_quantized_nontrainable_weights": "a feature",
        "zero_quantized_weights": "a feature",
        "zero_quantized_gradients": "a feature",
        "bf16_master_weights_and_gradients": "a feature",
        "bf16_optimizer_states": "a feature",
        "zero_cpu_offload": "a feature",
        "fp16_master_weights_and_gradients": "a feature",
        "is_deepcompile_enabled": "a feature",
        "sequence_parallel_size": "a feature",
        "has_moe_layers": "a feature",
        "pipeline_parallelism": "a feature",
        "_config": "DeepSpeedConfig",
        # adapters: read, called or set
        "device": "of the losses' counts",
        "optimizer": "the ZeRO optimizer",
        "basic_optimizer": "ours",
        "zero_optimization_stage": "the stage",
        "zero_optimization_partition_weights": "whether it is 3",
        "zero_hpz_partition_size": "ZeRO++: ranks of a node",
        "seq_data_parallel_group": "the ranks that see different data",
        "clip_fp32_gradients": "set to nothing, where no gradients are held",
        "communication_data_type": "of gradients on the wire",
        "gradient_accumulation_steps": "micro-batches of a step",
        "train_micro_batch_size_per_gpu": "rows of one",
        "gradient_clipping": "the config's norm",
        "is_gradient_accumulation_boundary": "whether a step follows",
        "set_gradient_accumulation_boundary": "makes it follow, in train_step",
        "_running_engine_backward": "set while the real backward runs, whose hooks look at it",
        "bfloat16_enabled": "is in the files' names",
        "_get_all_zero_checkpoint_names": "the states' files",
        "checkpoint_engine": "its save and load",
        "_copy_recovery_script": "may fail on one rank alone",
        "step": "in train_step",
        "global_steps": "whether this step is profiled",
        "global_rank": "which rank profiles",
        # timing.py
        "_start_timers": "of forward or backward",
        "_stop_timers": "of forward or backward",
        "engine_timers": "replaced while a method runs the model",
        "tput_timer": "started once a step",
        "flops_profiler": "measures one step",
        "flops_profiler_enabled": "whether it does",
        "flops_profiler_profile_step": "which step",
        "flops_profiler_recompute_fwd_factor": "what checkpointing adds",
    },
    "deepspeed.runtime.engine": {
        "DeepSpeedZeroOptimizer": "rotation: where the engine takes the class from",
        "BF16_Optimizer": "the same",
        "FP16_UnfusedOptimizer": "the same",
        "EngineTimers": "timing.py: those that are off",
    },
    "deepspeed.runtime.zero.stage3": {"DeepSpeedZeroOptimizer_Stage3": "rotation: where the engine takes it from"},
    "deepspeed.runtime.zero.utils": {
        "ZERO_SUPPORTED_OPTIMIZERS": "ours are added",
        "gc": "rotation: silenced for a switch",
    },
    "deepspeed.runtime.zero.config": {"ZERO_OPTIMIZATION": "what _do_optimizer_sanity_check returns for ZeRO"},
    "deepspeed.runtime.zero.config:DeepSpeedZeroConfig": {"reduce_bucket_size": "elements of gradients sent together"},
    "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig": {
        "device": "nvme is refused",
        "ratio": "below 1 is refused",
    },
    "deepspeed.runtime.config:DeepSpeedConfig": {
        "_param_dict": "config_keys.py: the config as it was given",
        "zero_config": "DeepSpeedZeroConfig",
        "expert_parallel_config": "AutoEP",
    },
    "deepspeed.runtime.config": {"DEEPSPEED_OPTIMIZERS": "register.py: its own words, for the nearest one"},
    "deepspeed.runtime.bf16_optimizer": {"see_memory_usage": "rotation: silenced for a switch"},
    "deepspeed.runtime.utils": {"DummyOptim": "stored weights: for it ZeRO-3 only partitions"},
    "deepspeed.checkpoint.constants": {"OPTIMIZER_STATE_DICT": "stored weights: a key of the states' files"},
    "deepspeed.utils.groups": {
        "_get_zero_param_intra_parallel_group": "ZeRO++: whether the group is there",
        "_create_zero_param_parallel_group": "makes it",
    },
    ZERO12: {
        "single_partition_of_fp32_groups": "masters; layout of ZeRO-1 and 2",
        "parallel_partitioned_bit16_groups": "block_state_adapter.py: the weights that they shall be",
        "_link_all_hp_params": "block_state_adapter.py: then hands out parts of these",
        "round_robin_bit16_groups": "layout: parameters in the order of the buffer",
        "round_robin_bit16_offsets": "layout: where each begins",
        "real_dp_process_group": "layout: the ranks that share a buffer",
        "averaged_gradients": "held_bytes.py",
        "destroy": "rotation: takes the hooks off",
        "_grad_acc_post_hooks": "rotation: kept over a switch",
        "_global_grad_norm": "rotation: kept",
        "overflow": "rotation: kept",
        "loss_scaler": "rotation: kept",
        "dynamic_loss_scale": "rotation: kept",
        "custom_loss_scaler": "rotation: kept",
        "external_loss_scale": "rotation: kept",
    },
    ZERO3: {
        "fp16_groups": "layout: the parameters of a sub-group",
        "fp32_partitioned_groups_flat": "masters; layout of ZeRO-3",
        "fp16_partitioned_groups_flat": "block_state_adapter.py: the weights that they shall be",
        "sub_group_process_groups": "layout: the ranks that share a buffer",
        "averaged_gradients": "held_bytes.py",
        "initialize_ds_offload": "rotation: returns the offload that is there",
        "parameter_offload": "rotation: outlives a switch",
        "destroy": "rotation: takes the hooks off",
        "_grad_acc_post_hooks": "rotation: kept over a switch",
        "_global_grad_norm": "rotation: kept",
        "overflow": "rotation: kept",
        "loss_scaler": "rotation: kept",
        "dynamic_loss_scale": "rotation: kept",
        "custom_loss_scaler": "rotation: kept",
        "external_loss_scale": "rotation: kept",
    },
    BF16: {
        "fp32_groups_flat_partition": "masters; layout of ZeRO-1 with fp32 accumulation",
        "bf16_groups": "layout: parameters in the order of the buffer",
        "real_dp_process_group": "layout: the ranks that share a buffer",
        "fp32_groups_gradients_flat": "held_bytes.py",
        "destroy": "rotation: takes the hooks off",
        "_grad_acc_post_hooks": "rotation: kept over a switch",
    },
    FP16: {"fp32_groups_flat": "masters; layout of 16 bits at ZeRO-0", "fp16_groups": "layout: the parameters in it"},
    FP16_UNFUSED: {
        "fp16_groups": "layout of 16 bits at ZeRO-0: the parameters",
        "fp32_groups": "masters; layout: their copies",
        "low_precision_dtype": "rotation: to build it anew",
        "loss_scale_config": "rotation: kept over a switch",
        "overflow": "rotation: kept",
        "_global_grad_norm": "rotation: kept",
    },
    OFFLOAD: {
        "partition_all_parameters": "shards and checkpoints: no weight stays gathered",
        "persistent_parameters": "shards: those that stay gathered between steps",
        "empty_partition_cache": "for save_16bit_model",
        "get_param_coordinator": "interleave.py, rotation",
        "destroy": "rotation: kept from running",
    },
    COORDINATOR: {
        "reset_step": "interleave.py: two passes are one step",
        "_invalidate_trace": "rotation: backward will end at another layer",
        "is_invalid_trace": "whether it is",
    },
    "deepspeed.runtime.zero.partition_parameters:Init": {
        "ds_tensor": "of a parameter at ZeRO-3: this rank's part",
        "ds_numel": "its elements, and those of the part",
        "ds_process_group": "the ranks that share it",
        "ds_secondary_tensor": "ZeRO++: a second copy, dropped when the first has changed",
        "all_gather": "gathers it",
    },
    "deepspeed.utils.mixed_precision_linkage": {"_hp_mapping": "of a parameter: removed with the ZeRO optimizer"},
    "deepspeed.profiling.flops_profiler.profiler:FlopsProfiler": {
        "recompute_fwd_factor": "timing.py: what a method's backward costs",
        "start_profile": "timing.py",
        "stop_profile": "timing.py",
    },
    "torch.distributed.fsdp:FSDPModule": {
        "_get_fsdp_state": "shards/plain_placement.py: after a switch; what is reduced together"
    },
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState": {
        "_fsdp_param_groups": "shards/plain_placement.py: those of it"
    },
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup": {
        "_init_mp_dtypes": "shards/plain_placement.py: looks again at what requires gradients",
        "fsdp_params": "shards/plain_placement.py: what is reduced together",
    },
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam": {
        "sharded_param": "shards/plain_placement.py: the parameter that trains"
    },
    "torch.distributed.distributed_c10d": {
        "_get_default_store": "processes.py: where the first failure is told",
        "default_pg_timeout": "processes.py: of groups made by others",
        "default_pg_nccl_timeout": "the same",
        "_resolve_process_group": "measure/communication.py: of functional collectives",
    },
    "torch._dynamo.eval_frame:OptimizedModule": {"_orig_mod": "blocks/names.py: no word of a parameter's name"},
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:CheckpointWrapper": {
        "_checkpoint_wrapped_module": "blocks/names.py: the same"
    },
    "torch.nn.parallel:DistributedDataParallel": {"_active_ddp_module": "block guard: refuses it"},
    "torch:Tensor": {"_make_wrapper_subclass": "sliced_tensor.py: a tensor without its entries"},
    "torch.distributed._checkpointable:_Checkpointable": {
        "__create_write_items__": "sliced_tensor.py: what this rank saves",
        "__create_chunk_list__": "sliced_tensor.py: what it loads",
        "__get_tensor_shard__": "sliced_tensor.py: where it lies",
    },
    "torch.nn:Module": {
        "_modules": "blocks/names.py: children by name",
        "_non_persistent_buffers_set": "checkpoint/run_state.py: buffers that are computed anew",
        "_parameters": "perturb.py: replaced for one forward",
        "_forward_hooks": "block guard: its own are the first",
        "_compiled_call_impl": "perturb.py: whether it is compiled",
    },
    "torch.serialization": {"_get_layout": "checkpoint_files.py: a checkpoint's metadata may name it"},
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING": "the same"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": "the same"},
}
"""By owner, a module or a class "module:Class": its names, and where or what each is used for."""

ASKED_OF_OURS: dict[str, dict[str, str]] = {
    ENGINE: {
        "dp_process_group": "the ranks that share what is partitioned",
        "overflow": "whether the step was skipped",
        "_global_grad_norm": "norm of the last step",
        "bit16_groups": "whose fp32 partitions it would find",
        "fp16_groups": "the same",
        "bf16_groups": "the same",
        "checkpoint_event_prologue": "before weights are saved or loaded",
        "checkpoint_event_epilogue": "after",
        "_restore_from_bit16_weights": "after weights alone were loaded",
        "empty_partition_cache": "after weights were gathered",
        "set_gradient_accumulation_boundary": "whether a step follows",
        "destroy": "the end",
    },
    "torch.optim.lr_scheduler:LRScheduler": {"_opt_called": "whether the optimizer has made a step"},
}
"""By owner: what it asks of an optimizer, and finds in ours only as long as it asks under this name."""


def missing() -> list[str]:
    """Which names of both tables are not there."""
    lacking = [
        _told(owner, name) for owner, names in NAMES.items() for name in _lacking(names, owner, _attributes, _set_by)
    ]
    return lacking + [
        f"{_told(owner, name)}, asked of its optimizer"
        for owner, names in ASKED_OF_OURS.items()
        for name in _lacking(names, owner, _used_by)
    ]


@functools.cache
def check_private_names() -> None:
    """Raise RuntimeError that names every one that is missing."""
    lacking = missing()
    if not lacking:
        return
    of_torch = [name for name in lacking if name.startswith("torch.")]
    of_deepspeed = [name for name in lacking if name not in of_torch]
    told, remedies = [], []
    if of_deepspeed:
        told.append(f"DeepSpeed {deepspeed.__version__} lacks {', '.join(of_deepspeed)}")
        remedies.append(f"deepspeed {TESTED_DEEPSPEED}.*")
    if of_torch:
        told.append(f"torch {torch.__version__} lacks {', '.join(of_torch)}")
        remedies.append(f"torch {TESTED_TORCH}")
    raise RuntimeError(f"{', and '.join(told)}, which ds_memopt needs. Install {' and '.join(remedies)}.")


def _told(owner: str, name: str) -> str:
    """A class of DeepSpeed's by its name, all else in full."""
    module, _, cls = owner.partition(":")
    return f"{cls}.{name}" if cls and module.startswith("deepspeed.") else f"{owner.replace(':', '.')}.{name}"


def _lacking(names: Iterable[str], owner: str, *ways: Callable[[Any], set[str]]) -> list[str]:
    """Those of the names that none of the ways finds."""
    module, _, cls = owner.partition(":")
    try:
        found = importlib.import_module(module)
        found = getattr(found, cls) if cls else found
    except (ImportError, AttributeError):
        return list(names)
    left = list(names)
    for names_of in ways:
        there = names_of(found) if left else ()
        left = [name for name in left if name not in there]
    return left


def _attributes(owner: Any) -> set[str]:
    return {*dir(owner), *getattr(owner, "__annotations__", ()), *getattr(owner, "model_fields", ())}


def _set_by(owner: Any) -> set[str]:
    """The attributes that functions of a module, or of a class and its bases, set: of instances, or of parameters."""
    return {code.co_names[index] for code in _code_of(owner) for index in _stored(code.co_code)}


def _stored(steps: bytes) -> Iterator[int]:
    """Indices of the names that a function's bytecode sets as attributes. dis.get_instructions tells them as well, but
    takes a quarter of a second of every start for all that it tells besides."""
    high = 0
    for operation, low in zip(steps[::2], steps[1::2], strict=True):
        if operation == dis.opmap["STORE_ATTR"]:
            yield high | low
        high = (high | low) << 8 if operation == dis.EXTENDED_ARG else 0


def _used_by(owner: type) -> set[str]:
    """The attributes that they set, read, or ask for as hasattr does."""
    codes = list(_code_of(owner))
    return {name for code in codes for name in code.co_names} | {
        value for code in codes for value in code.co_consts if isinstance(value, str)
    }


def _code_of(owner: Any) -> Iterator[types.CodeType]:
    holders = inspect.getmro(owner) if inspect.isclass(owner) else (owner,)
    for value in (value for holder in holders for value in vars(holder).values()):
        if type(value) is property:  # isinstance would look into objects that warn of it
            value = value.fget
        elif type(value) in (staticmethod, classmethod):
            value = value.__func__
        if type(value) is types.FunctionType:
            yield from _with_inner(inspect.unwrap(value).__code__)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)
