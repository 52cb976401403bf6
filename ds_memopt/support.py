"""What each method supports: the one table behind the errors at construction and the table in the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["tested", "untested", "refused"]


@dataclass(frozen=True)
class Support:
    """How far a feature works with a method. A refusal gives the reason and the remedy."""

    status: Status
    note: str = ""


FEATURES: dict[str, str] = {
    "plain": "Plain PyTorch, one process",
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDP2 (`fully_shard`), HSDP",
    "zero0": "ZeRO-0, fp32 and bf16",
    "zero1": "ZeRO-1",
    "zero1_fp32_accumulation": "ZeRO-1, bf16 with fp32 gradient accumulation",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3, sub-groups and `zero.Init`",
    "zero2_offload": "ZeRO-2 with optimizer offload to the CPU",
    "zero3_offload": "ZeRO-3 with optimizer offload to the CPU",
    "param_offload": "ZeRO-3 with parameter offload to the CPU",
    "trainer": "transformers' Trainer, by JSON",
    "accelerate": "accelerate, by JSON",
    "trainer_fsdp2": "transformers' Trainer under FSDP2, by `optimizer_cls_and_kwargs`",
    "torchtitan": "torchtitan 0.3",
    "resume": "Resume on the same number of GPUs, from the engine's own files",
    "portable": "Resume on another number of GPUs, stage or engine, from a portable checkpoint",
    "zero_to_fp32": "`zero_to_fp32`",
    "fp16": "fp16 with loss scaling",
    "fp16_autocast": "`torch_autocast` in fp16",
    "bf16_autocast": "`torch_autocast`, `torch.autocast` in bf16",
    "bf16_masters": "`bf16_master_weights_and_grads` with `bf16_optimizer_states`",
    "bf16_masters_on_cpu": "`bf16_master_weights_and_grads` with optimizer offload, or without `bf16_optimizer_states`",
    "fp16_masters": "`fp16_master_weights_and_grads`",
    "round_robin_gradients": "`round_robin_gradients`",
    "two_engines": "Two engines in one process, such as actor and critic",
    "one_cycle": "OneCycle, torch's OneCycleLR",
    "profiling": "`wall_clock_breakdown`, `flops_profiler`",
    "release_gradients": "`release_gradients` in plain PyTorch and under FSDP2",
    "release_gradients_under_zero": "`release_gradients` under ZeRO",
    "hpz": "ZeRO++ `zero_hpz_partition_size`",
    "quantized_weights": "ZeRO++ `zero_quantized_weights`",
    "quantized_gradients": "ZeRO++ `zero_quantized_gradients`",
    "sequence_parallel": "Ulysses sequence parallelism",
    "deepspeed_moe": "DeepSpeed's own MoE layers",
    "autoep": "AutoEP",
    "pipeline": "PipelineModule",
    "deepcompile": "DeepCompile",
    "partial_offload": "Partial offload (`offload_optimizer.ratio` < 1)",
    "nvme_offload": "Optimizer offload to NVMe",
    "quantized_frozen": "`zero_quantized_nontrainable_weights`",
    "zenflow": "ZenFlow",
    "super_offload": "SuperOffload",
    "elastic_checkpoint": "`elastic_checkpoint`",
    "universal_checkpoint": "Universal checkpoints (`load_universal`)",
    "tensor_parallel": "Tensor parallelism (AutoTP, DTensor)",
    "fsdp1": "FSDP1",
}

# No GPU has run any of this: `bash launch/gpu_check.sh` checks and measures the steps on one.
GPU_ONLY = Support("untested", "It runs on GPUs only.")

STATE_COMPRESSING: dict[str, Support] = {
    "plain": Support("tested"),
    "ddp": Support("tested"),
    "fsdp2": Support("tested"),
    "zero0": Support("tested"),
    "zero1": Support("tested"),
    "zero1_fp32_accumulation": Support("tested"),
    "zero2": Support("tested"),
    "zero3": Support("tested"),
    "zero2_offload": Support("tested"),
    "zero3_offload": Support("tested"),
    "param_offload": Support("tested"),
    "trainer": Support("tested"),
    "accelerate": Support("tested"),
    "trainer_fsdp2": Support("tested"),
    "torchtitan": Support("tested", "Its optimizers and FSDP2; its Trainer needs a GPU."),
    "resume": Support("tested"),
    "portable": Support("tested"),
    "zero_to_fp32": Support(
        "tested", "Except ZeRO-1 with fp32 accumulation, whose files DeepSpeed's tool reads for no optimizer."
    ),
    "fp16": Support("untested"),
    "fp16_autocast": Support(
        "refused",
        "Its gradient scaler decides on each rank alone whether to step, and ranks would wait for each other's sums. "
        "Use bf16.",
    ),
    "bf16_autocast": Support("tested"),
    "bf16_masters": Support(
        "tested", "At ZeRO-1 to 3. What bf16 weights lack is kept beside them, by `masters`; gradients stay in bf16."
    ),
    "bf16_masters_on_cpu": Support(
        "refused",
        "DeepSpeed lets only its own DeepSpeedCPUAdam step there. Remove zero_optimization.offload_optimizer and set "
        "bf16.bf16_optimizer_states to true, with AdamMini or GWT; or remove bf16.bf16_master_weights_and_grads and "
        "bf16.bf16_optimizer_states.",
    ),
    "fp16_masters": Support(
        "refused",
        "Updates below fp16's precision would be lost. Use bf16, or remove fp16.fp16_master_weights_and_grads.",
    ),
    "round_robin_gradients": Support("tested"),
    "two_engines": Support("tested"),
    "one_cycle": Support("tested"),
    "profiling": Support("tested"),
    "release_gradients": Support("tested"),
    "release_gradients_under_zero": Support(
        "refused",
        "ZeRO reduces the gradients and holds them until the step. Set release_gradients to false, or use FSDP2.",
    ),
    "hpz": Support("tested"),
    "quantized_weights": GPU_ONLY,
    "quantized_gradients": Support("untested", "It quantizes between nodes of GPUs only."),
    "sequence_parallel": Support("tested"),
    "deepspeed_moe": Support("tested", "DeepSpeed has no ZeRO-3 for them."),
    "autoep": Support("untested", "DeepSpeed 0.19.8 fails to set it up with transformers 5.23, for AdamW too."),
    "pipeline": Support("tested", "DeepSpeed has ZeRO-0 and ZeRO-1 for it."),
    "deepcompile": GPU_ONLY,
    "partial_offload": Support(
        "refused",
        "DeepSpeed updates the part on the GPU with its own Adam. Set offload_optimizer.ratio to 1.0 or leave it out.",
    ),
    "nvme_offload": Support(
        "refused",
        "DeepSpeed swaps only states shaped like the partition, and per-block states would stay behind. Set "
        'offload_optimizer.device to "cpu".',
    ),
    "quantized_frozen": GPU_ONLY,
    "zenflow": Support("refused", "ZenFlow brings its own Adam. Remove zero_optimization.zenflow."),
    "super_offload": Support("refused", "SuperOffload brings its own Adam. Remove offload_optimizer.super_offload."),
    "elastic_checkpoint": Support(
        "refused",
        "DeepSpeed would silently cut the per-block states to the partition's unpadded length. Set "
        "zero_optimization.elastic_checkpoint to false.",
    ),
    "universal_checkpoint": Support(
        "refused",
        "DeepSpeed's converter knows Adam's states only and would drop the others. Save a portable checkpoint, by "
        "ds_memopt.save, or resume from the checkpoint itself on as many GPUs as wrote it.",
    ),
    "tensor_parallel": Support(
        "refused", "A rank's part of a matrix is not a row-major interval there. Use ZeRO or FSDP2 without it."
    ),
    "fsdp1": Support("refused", "FSDP1 flattens parameters under names of its own. Use fully_shard (FSDP2) or ZeRO-3."),
}

NO_SET = Support("refused", "It never holds gradients of the whole model. Leave release_gradients out.")

NO_REMAINDERS = Support(
    "refused",
    "It does not keep what bf16 weights lack, and updates below 16 bits' precision would be lost: in 20 steps at lr "
    "1e-5 AdamMini left 85 % of bf16 weights unmoved, and 51 % with fp32 masters. Use AdamMini or GWT, or remove "
    "bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states.",
)

NO_STEP = Support(
    "refused",
    "It does more than to update all weights from their gradients in step(), and that is all the loop does. Use "
    "AdamMini, GWT or CAME there, or another loop.",
)

ROTATING = STATE_COMPRESSING | {
    "trainer_fsdp2": Support("untested"),
    "torchtitan": NO_STEP,
    "bf16_masters": NO_REMAINDERS,
    "release_gradients": NO_SET,
    "release_gradients_under_zero": NO_SET,
    "quantized_frozen": Support(
        "refused",
        "What is frozen now trains later. Set zero_optimization.zero_quantized_nontrainable_weights to false.",
    ),
    "ddp": Support(
        "refused",
        "It averages the gradients of the parameters that trained when it was built, so that from the second block on "
        "every rank would train a model of its own. Use ZeRO-0 or above, or FSDP2.",
    ),
    "pipeline": Support(
        "refused", "A stage sees its own layers only, and stages would rotate apart. Use ZeRO without a pipeline."
    ),
    "deepcompile": Support(
        "refused",
        "It compiles which parameters train, and another block trains later. Set compile.deepcompile to false.",
    ),
}

EXPERTS = Support(
    "refused",
    "Ranks hold different experts under one name, and would get each other's updates. Use AdamMini, BAdam or GWT, or "
    "transformers' layers of experts without AutoEP, whose experts all ranks hold.",
)

NO_MASTERS = Support("tested", "It has no masters, and the keys change nothing.")

ZEROTH_ORDER = STATE_COMPRESSING | {
    "trainer_fsdp2": NO_STEP,
    "torchtitan": NO_STEP,
    "release_gradients": NO_SET,
    "release_gradients_under_zero": NO_SET,
    "zero1_fp32_accumulation": Support("untested", "It has no gradients."),
    "ddp": Support("tested", "It needs none: it adds up the losses itself."),
    "zero2_offload": Support("untested", "It keeps no masters that could be offloaded."),
    "zero3_offload": Support("untested", "It keeps no masters that could be offloaded."),
    "zero_to_fp32": Support("untested", "Use `save_16bit_model`."),
    "bf16_autocast": Support(
        "refused",
        "bf16 activations round the two losses of which g is the difference: measured, g was off by 0.05 of its size "
        "on an untrained model and by 0.8 on a trained one. Remove torch_autocast, or torch.autocast around forwards.",
    ),
    "bf16_masters": NO_MASTERS,
    "bf16_masters_on_cpu": NO_MASTERS,
    "fp16_masters": NO_MASTERS,
    "round_robin_gradients": Support("untested", "It has no gradients."),
    "quantized_gradients": Support("untested", "It has no gradients."),
    "one_cycle": Support("tested", "It has no momentum to be cycled: OneCycleLR needs cycle_momentum=False."),
    "sequence_parallel": Support(
        "refused",
        "The loss is put together from all ranks outside the model, whose forwards the method runs itself. Use ZeRO "
        "without sequence parallelism.",
    ),
    "deepspeed_moe": EXPERTS,
    "autoep": EXPERTS,
    "pipeline": Support("refused", "PipelineEngine runs forwards and backwards itself. Use ZeRO without a pipeline."),
    "deepcompile": Support(
        "refused",
        "It compiles ZeRO's handling of gradients, which the method replaces. Set compile.deepcompile to false.",
    ),
}

IN_BACKWARD = ZEROTH_ORDER | {
    "ddp": Support(
        "refused", "It holds a set of gradients. Use ZeRO-0 or above, FSDP2, or the bare model on all ranks."
    ),
    "round_robin_gradients": Support("untested"),
    "zero1_fp32_accumulation": Support("untested"),
    "quantized_gradients": Support(
        "refused",
        "The method reduces gradients itself, in communication_data_type. Set "
        "zero_optimization.zero_quantized_gradients to false.",
    ),
}

SAME_CODE = Support("untested", "The code is that of AdamMini, with which it is tested.")

FACTORED = STATE_COMPRESSING | {
    "zero0": Support("tested", "In fp32; bf16 is tested with AdamMini, by the same code."),
    "bf16_masters": NO_REMAINDERS,
}
FACTORED |= dict.fromkeys(
    (
        "ddp", "zero1_fp32_accumulation", "zero2_offload", "zero3_offload", "param_offload", "trainer", "zero_to_fp32",
        "round_robin_gradients", "profiling", "pipeline",
    ),
    SAME_CODE,
)  # fmt: skip

SUPPORT: dict[str, dict[str, Support]] = {
    "AdamMini": STATE_COMPRESSING,
    "GWT": STATE_COMPRESSING,
    "CAME": FACTORED,
    "BAdam": ROTATING,
    "IPSGD": IN_BACKWARD | {"bf16_autocast": Support("tested")},
    "Addax": IN_BACKWARD,
    "MeZO": ZEROTH_ORDER,
}
"""For every method, by the class's name: its standing with every feature. The nearer a method's steps are to AdamW's,
the earlier it stands: in this order methods are listed and recommended."""

MARKS: dict[Status, str] = {"tested": "yes", "untested": "untested", "refused": "refused"}


def refuse(cls: type, feature: str) -> None:
    """Raise ValueError, with the reason and the remedy, if the method (or one derived from it) refuses the feature.

    Also for a class that is no method, such as the AdamW that BAdam runs in a block.
    """
    method = next((base.__name__ for base in cls.__mro__ if base.__name__ in SUPPORT), None)
    if method is None:
        raise ValueError(
            f"Nothing is known of {cls.__module__}.{cls.__name__} together with {feature}: it is no method that a "
            f"ds_config can name. Use one of {', '.join(SUPPORT)}, or DeepSpeed's or torch's own AdamW; a new method "
            "needs a row in ds_memopt/support.py."
        )
    support = SUPPORT[method][feature]
    if support.status == "refused":
        raise ValueError(f"{method} does not support {feature}: {support.note}")


def markdown_table() -> str:
    """The table for the documents: one row per feature, one column per method, reasons below."""
    methods = list(SUPPORT)
    lines = ["| | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    notes: list[str] = []
    for feature, title in FEATURES.items():
        cells = []
        for method in methods:
            support = SUPPORT[method][feature]
            cell = MARKS[support.status]
            if support.note:
                if support.note not in notes:
                    notes.append(support.note)
                cell += f" [{notes.index(support.note) + 1}]"
            cells.append(cell)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])
