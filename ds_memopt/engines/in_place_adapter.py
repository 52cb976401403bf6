"""Methods that update the stored weights in DeepSpeed: no fp32 masters and no gradient buffers by ZeRO.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT
from deepspeed.runtime.utils import DummyOptim
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.utils import groups

from ds_memopt.engines.adapter import Adapter
from ds_memopt.engines.losses import HandedOut
from ds_memopt.engines.timing import one_pass
from ds_memopt.optimizers import StatePart
from ds_memopt.optimizers.stored_weights.in_place_optimizer import PROGRESS, InPlaceOptimizer
from ds_memopt.shards import PartitionedShards, SplitShards, WholeShards

PLACEMENT_KEY = "ds_memopt_placement"
"""Key of a checkpoint's model states: at which stage and on how many ranks it was saved."""

BY_NAME = (
    "Resume there, or take the run over by name: weights from save_16bit_model, state by `named_state` and `progress` "
    "of the optimizer."
)


class InPlaceAdapter(Adapter):
    """It is also what the engine takes for its ZeRO optimizer: it lays the weights out and passes all else on.

    placement: the stage of ZeRO and the number of ranks. offload: at ZeRO-3, what gathers and partitions.
    """

    # What DeepSpeed looks for in the files' names of parameters: none has a flat fp32 partition.
    bit16_groups: tuple = ()
    fp16_groups: tuple = ()
    bf16_groups: tuple = ()

    optimizer: InPlaceOptimizer

    def __init__(self, optimizer: InPlaceOptimizer) -> None:
        super().__init__(optimizer)
        self._global_grad_norm = None
        self.overflow = False
        self.losses = HandedOut()

    def check_optimizer(self, original: Callable, engine: Any) -> str:
        """Whatever the stage and the precision, this takes the place of ZeRO's object."""
        super().check_optimizer(original, engine)
        return ZERO_OPTIMIZATION

    def configure_zero(self, original: Callable, engine: Any, optimizer: InPlaceOptimizer) -> InPlaceAdapter:
        """original: the engine's own method that builds a ZeRO optimizer."""
        stage = engine.zero_optimization_stage()
        self.dp_process_group = engine.seq_data_parallel_group
        self.placement = {"stage": stage, "ranks": dist.get_world_size(self.dp_process_group)}
        if engine.zero_hpz_partition_size() > 1 and groups._get_zero_param_intra_parallel_group() is None:
            # DeepSpeed would, for a DummyOptim, by a method that its engine lacks.
            groups._create_zero_param_parallel_group(engine.zero_hpz_partition_size())
        # Parameters are partitioned as for inference, without gradient buffers.
        self.offload = original(DummyOptim(list(engine.module.parameters()))) if stage == 3 else None
        engine.clip_fp32_gradients = lambda: None  # no gradients are there to be clipped at the step
        engine.train_step = partial(self.train_step, engine)
        names = optimizer.names_by_tensor()
        if stage == 3:
            optimizer.bind(PartitionedShards(engine.module, names, self.dp_process_group, self.offload))
        else:
            optimizer.bind((SplitShards if stage else WholeShards)(engine.module, names, self.dp_process_group))
        return self

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def forward(self, original: Callable, engine: Any, *inputs: Any, **keywords: Any) -> Any:
        """In training, the method's forward; else the engine's own."""
        if engine.module.training and torch.is_grad_enabled():
            with one_pass(engine, "forward"):
                return self.forward_in_training(original, engine, inputs, keywords)
        return original(*inputs, **keywords)

    def backward(
        self, original: Callable, engine: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        with one_pass(engine, "backward", self.backward_cost(engine)):
            return self.backward_of_method(engine, loss, retain_graph, scale_wrt_gas)

    def forward_in_training(self, original: Callable, engine: Any, inputs: tuple, keywords: Mapping[str, Any]) -> Any:
        """The method's forward. original: the engine's own."""
        raise NotImplementedError

    def backward_of_method(
        self, engine: Any, loss: torch.Tensor, retain_graph: bool, scale_wrt_gas: bool
    ) -> torch.Tensor:
        """The method's backward. Returns the loss as the engine's does."""
        raise NotImplementedError

    def backward_cost(self, engine: Any) -> float | None:
        """Of what the method's backward runs, in forwards such as its forward runs; None: as usual."""

    def train_step(self, engine: Any, *arguments: Any) -> Any:
        """What `engine.train_step` does."""
        raise NotImplementedError

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
            self.optimizer.placement.publish()  # the weights were loaded before
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
        self.optimizer.placement.publish()

    def destroy(self) -> None:
        if self.offload is not None:
            self.offload.destroy()

    def _restore_from_bit16_weights(self) -> None:
        # What DeepSpeed calls after it has loaded weights alone.
        self.optimizer.placement.publish()

    def empty_partition_cache(self) -> None:
        if self.offload is not None:
            self.offload.empty_partition_cache()

    def save_checkpoint(self, original: Callable, engine: Any, *arguments: Any, **keywords: Any) -> Any:
        with self._all_frozen():
            return original(*arguments, **keywords)

    def load_checkpoint(self, original: Callable, engine: Any, *arguments: Any, **keywords: Any) -> Any:
        with self._all_frozen():
            return original(*arguments, **keywords)

    @contextlib.contextmanager
    def _all_frozen(self) -> Iterator[None]:
        """DeepSpeed writes frozen parameters as they are, and of those that train at ZeRO-3 the masters, of which there
        are none."""
        trained = [p for p in self.optimizer.trained_parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def common_checkpoint_state(self, original: Callable, engine: Any, *arguments: Any) -> dict[str, Any]:
        """With the placement at which it was saved."""
        return super().common_checkpoint_state(original, engine, *arguments) | {PLACEMENT_KEY: self.placement}

    def load_module_state_dict(
        self, original: Callable, engine: Any, checkpoint: Mapping[str, Any], *arguments: Any, **keywords: Any
    ) -> None:
        """Unless the weights were cut into other pieces than ZeRO-3 has here."""
        here, there = self.placement, checkpoint.get(PLACEMENT_KEY, self.placement)
        if here != there and 3 in (here["stage"], there["stage"]):
            raise ValueError(
                f"This checkpoint was saved at ZeRO-{there['stage']} on {there['ranks']} ranks, this engine is at "
                f"ZeRO-{here['stage']} on {here['ranks']}. {BY_NAME}"
            )
        return original(checkpoint, *arguments, **keywords)

    def get_all_ckpt_names(self, original: Callable, engine: Any, load_dir: str, tag: str) -> list[str]:
        """Where there is none, DeepSpeed would only say that an assertion failed."""
        files = original(load_dir, tag)
        if not files:
            raise ValueError(
                f"{load_dir}, {tag}, has no weights for this rank: this engine is at ZeRO-{self.placement['stage']}, "
                f"and the checkpoint was saved at another stage or on fewer ranks. {BY_NAME}"
            )
        return files

    def load_zero_checkpoint(
        self, original: Callable, engine: Any, load_dir: str, tag: str, load_optimizer_states: bool = True
    ) -> bool:
        """From files of any number of ranks."""
        if not load_optimizer_states:
            return False
        files = engine._get_all_zero_checkpoint_names(load_dir, tag, engine.bfloat16_enabled())
        if missing := [file for file in files if not Path(file).exists()]:
            raise ValueError(
                f"{missing[0]} is missing: this engine is at ZeRO-{self.placement['stage']}, and the checkpoint was "
                f"saved at ZeRO-0 or with weights of another type. {BY_NAME}"
            )
        if len(files) == self.placement["ranks"]:
            files = [files[dist.get_rank(self.dp_process_group)]]
        loaded = (engine.checkpoint_engine.load(file, map_location="cpu") for file in files)
        self.load_states(state[OPTIMIZER_STATE_DICT] for state in loaded)
        return True
