"""Methods that update the stored weights in DeepSpeed: no fp32 masters and no gradient buffers by ZeRO.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedEngine.forward, .backward, .save_checkpoint, .load_checkpoint, ._common_checkpoint_state,
      .load_module_state_dict, ._load_zero_checkpoint, ._get_all_ckpt_names (all wrapped),
      ._get_all_zero_checkpoint_names, .checkpoint_engine, .seq_data_parallel_group, .clip_fp32_gradients
  What DeepSpeedEngine calls or reads of its ZeRO optimizer: .bit16_groups, .fp16_groups, .bf16_groups,
      ._global_grad_norm, .overflow, .dp_process_group, .checkpoint_event_prologue, .checkpoint_event_epilogue,
      ._restore_from_bit16_weights, .empty_partition_cache, .destroy
  deepspeed.runtime.utils.DummyOptim, deepspeed.checkpoint.constants.OPTIMIZER_STATE_DICT
  DeepSpeedZeRoOffload: what the engine builds at ZeRO-3 for a DummyOptim; .partition_all_parameters(), .destroy(),
      .empty_partition_cache()
  deepspeed.utils.groups._get_zero_param_intra_parallel_group, ._create_zero_param_parallel_group
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT
from deepspeed.runtime.utils import DummyOptim
from deepspeed.utils import groups
from torch import nn

from ds_memopt.engines.losses import HandedOut
from ds_memopt.engines.timing import one_pass
from ds_memopt.optimizers import InPlaceOptimizer, StatePart
from ds_memopt.optimizers.stored_weights.in_place_optimizer import PROGRESS
from ds_memopt.shards import PartitionedShards, SplitShards, WholeShards

PLACEMENT_KEY = "ds_memopt_placement"
"""Key of a checkpoint's model states: at which stage and on how many ranks it was saved."""

BY_NAME = (
    "Resume there, or take the run over by name: weights from save_16bit_model, state by `named_state` and `progress` "
    "of the optimizer."
)


class InPlaceAdapter:
    """What the engine takes for its ZeRO optimizer: it lays the weights out and passes everything else on.

    optimizer: the method. model: its model. stage: of ZeRO. offload: at ZeRO-3, what gathers and partitions.
    """

    # What DeepSpeed looks for in the files' names of parameters: none has a flat fp32 partition.
    bit16_groups: tuple = ()
    fp16_groups: tuple = ()
    bf16_groups: tuple = ()

    def __init__(self, optimizer: InPlaceOptimizer, model: nn.Module, stage: int, process_group, offload=None) -> None:
        self.optimizer, self.dp_process_group, self.offload = optimizer, process_group, offload
        self.placement = {"stage": stage, "ranks": dist.get_world_size(process_group)}
        self._global_grad_norm = None
        self.overflow = False
        self.losses = HandedOut()
        names = optimizer.names_by_tensor()
        if stage == 3:
            shards = PartitionedShards(model, names, process_group, offload)
        else:
            shards = (SplitShards if stage else WholeShards)(model, names, process_group)
        optimizer.bind(shards)

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def forward(self, original: Callable, engine, inputs: tuple, keywords: Mapping[str, Any]) -> Any:
        """A forward of the engine in training. original: the engine's own."""
        raise NotImplementedError

    def backward(self, engine, loss: torch.Tensor, retain_graph: bool, scale_wrt_gas: bool) -> torch.Tensor:
        """A backward of the engine. Returns the loss as the engine's does."""
        raise NotImplementedError

    def backward_cost(self, engine) -> float | None:
        """Of what `backward` runs, in forwards such as `forward` runs; None: as usual."""

    def step(self) -> None:
        """Make a step from what the backward calls have left."""
        skipped = self.optimizer.skipped_steps
        self.optimizer.step()
        self.overflow = self.optimizer.skipped_steps > skipped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradients are held."""

    def state_dict(self) -> dict[str, Any]:
        """State by parameter name and place, so that other ranks can read it."""
        parts = [tuple(part) for part in self.optimizer.named_state()]
        return {"param_groups": self.optimizer.state_dict()["param_groups"], "parts": parts}

    def load_state_dict(self, state_dict: dict[str, Any] | None, load_optimizer_states: bool = True) -> None:
        """At stage 0, where the state is in the file of the weights."""
        if not load_optimizer_states:
            self.optimizer.shards.publish()  # the weights were loaded before
        elif state_dict is None:
            raise ValueError(f"This checkpoint was saved at ZeRO-1 or above, this engine is at ZeRO-0. {BY_NAME}")
        else:
            self.load_states([state_dict])

    def load_states(self, state_dicts: Iterable[dict[str, Any]]) -> None:
        """state_dicts: those of all ranks that saved, or of this rank if the same ranks did."""
        groups, parts = [], []
        for state_dict in state_dicts:
            groups = state_dict["param_groups"]
            parts += [StatePart(*part) for part in state_dict.get("parts", ())]
        self.optimizer.load_state_dict({"state": {}, "param_groups": groups})
        self.optimizer.load_named_state(parts, groups[0][PROGRESS])

    def checkpoint_event_prologue(self) -> None:
        """Before weights are saved or loaded: at ZeRO-3 each rank's own pieces are."""
        if self.offload is not None:
            self.offload.partition_all_parameters()

    def checkpoint_event_epilogue(self) -> None:
        self.optimizer.shards.publish()

    def destroy(self) -> None:
        if self.offload is not None:
            self.offload.destroy()

    def _restore_from_bit16_weights(self) -> None:
        # What DeepSpeed calls after it has loaded weights alone.
        self.optimizer.shards.publish()

    def empty_partition_cache(self) -> None:
        if self.offload is not None:
            self.offload.empty_partition_cache()


def build(adapter: type[InPlaceAdapter], engine, optimizer: InPlaceOptimizer, original: Callable) -> InPlaceAdapter:
    """In the place of the engine's ZeRO optimizer. original: the engine's own method that builds one."""
    stage = engine.zero_optimization_stage()
    if engine.zero_hpz_partition_size() > 1 and groups._get_zero_param_intra_parallel_group() is None:
        # DeepSpeed would, for a DummyOptim, by a method that its engine lacks.
        groups._create_zero_param_parallel_group(engine.zero_hpz_partition_size())
    # Parameters are partitioned as for inference, without gradient buffers.
    offload = original(DummyOptim(list(engine.module.parameters()))) if stage == 3 else None
    engine.clip_fp32_gradients = lambda: None  # no gradients are there to be clipped at the step
    return adapter(optimizer, engine.module, stage, engine.seq_data_parallel_group, offload)


def forward(original, engine, *inputs, **keywords):
    """In training, the method's forward; else the engine's own."""
    adapter = engine.optimizer
    if isinstance(adapter, InPlaceAdapter) and engine.module.training and torch.is_grad_enabled():
        with one_pass(engine, "forward"):
            return adapter.forward(original, engine, inputs, keywords)
    return original(*inputs, **keywords)


def backward(original, engine, loss, retain_graph=False, scale_wrt_gas=True):
    """The method's backward, where it has one."""
    adapter = engine.optimizer
    if isinstance(adapter, InPlaceAdapter):
        with one_pass(engine, "backward", adapter.backward_cost(engine)):
            return adapter.backward(engine, loss, retain_graph, scale_wrt_gas)
    return original(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)


def common_checkpoint_state(original, engine, *arguments, **keywords):
    """What a checkpoint says of the run, and where it was saved."""
    state = original(*arguments, **keywords)
    if isinstance(engine.optimizer, InPlaceAdapter):
        state[PLACEMENT_KEY] = engine.optimizer.placement
    return state


def load_module_state_dict(original, engine, checkpoint, *arguments, **keywords):
    """Load a model's weights, unless they were cut into other pieces than ZeRO-3 has here."""
    if isinstance(engine.optimizer, InPlaceAdapter) and PLACEMENT_KEY in checkpoint:
        here, there = engine.optimizer.placement, checkpoint[PLACEMENT_KEY]
        if here != there and 3 in (here["stage"], there["stage"]):
            raise ValueError(
                f"This checkpoint was saved at ZeRO-{there['stage']} on {there['ranks']} ranks, this engine is at "
                f"ZeRO-{here['stage']} on {here['ranks']}. {BY_NAME}"
            )
    return original(checkpoint, *arguments, **keywords)


def get_all_ckpt_names(original, engine, load_dir, tag):
    """Files of weights; of none DeepSpeed would only say that an assertion failed."""
    files = original(load_dir, tag)
    if isinstance(engine.optimizer, InPlaceAdapter) and not files:
        raise ValueError(
            f"{load_dir}, {tag}, has no weights for this rank: this engine is at "
            f"ZeRO-{engine.optimizer.placement['stage']}, and the checkpoint was saved at another stage or on fewer "
            f"ranks. {BY_NAME}"
        )
    return files


def load_zero_checkpoint(original, engine, load_dir, tag, load_optimizer_states=True):
    """Load the state from ZeRO's files, of any number of ranks."""
    adapter = engine.optimizer
    if not isinstance(adapter, InPlaceAdapter):
        return original(load_dir, tag, load_optimizer_states)
    if not load_optimizer_states:
        return False
    files = engine._get_all_zero_checkpoint_names(load_dir, tag, engine.bfloat16_enabled())
    if missing := [file for file in files if not Path(file).exists()]:
        raise ValueError(
            f"{missing[0]} is missing: this engine is at ZeRO-{adapter.placement['stage']}, and the checkpoint was "
            f"saved at ZeRO-0 or with weights of another type. {BY_NAME}"
        )
    if len(files) == adapter.placement["ranks"]:
        files = [files[dist.get_rank(adapter.dp_process_group)]]
    loaded = (engine.checkpoint_engine.load(file, map_location="cpu") for file in files)
    adapter.load_states(state[OPTIMIZER_STATE_DICT] for state in loaded)
    return True


def as_frozen(original, engine, *arguments, **keywords):
    """Saving or loading a checkpoint: DeepSpeed writes frozen parameters as they are, and of those that train at ZeRO-3
    the masters, which there are not."""
    trained = []
    if isinstance(engine.optimizer, InPlaceAdapter):
        trained = [p for p in engine.optimizer.optimizer.trained_parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        return original(*arguments, **keywords)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


WRAPPERS = {
    "save_checkpoint": as_frozen,
    "load_checkpoint": as_frozen,
    "forward": forward,
    "backward": backward,
    "_get_all_ckpt_names": get_all_ckpt_names,
    "_common_checkpoint_state": common_checkpoint_state,
    "load_module_state_dict": load_module_state_dict,
    "_load_zero_checkpoint": load_zero_checkpoint,
}
