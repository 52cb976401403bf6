"""FSDP2 behind the words of DeepSpeed's engine that the training loop uses; checkpoints by torch.distributed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.accelerator import get_accelerator
from deepspeed.monitor.monitor import MonitorMaster
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ds_memopt.blocks import bare_parameters, partition_into_blocks, wrapped_modules
from ds_memopt.optimizers import capabilities_of


def shard(model: nn.Module, bf16: bool = False, replicas: int = 1) -> None:
    """Shard a model, each layer as a unit. bf16: compute and gather in bf16, and reduce in fp32. replicas: groups of
    neighbouring ranks, over each of which the model is sharded (HSDP)."""
    modules, mesh = wrapped_modules(model), None
    if replicas > 1:
        sizes = (replicas, dist.get_world_size() // replicas)
        mesh = init_device_mesh(get_accelerator().device_name(), sizes, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in partition_into_blocks(model, bare_parameters(model)).blocks:
        fully_shard(modules[layer], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def fill(model: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Move a sharded model, whose parameters are on the meta device, to a device. All ranks call.

    whole: on the first rank the same model in CPU memory, whose weights it gets, one at a time; None on the others.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.to_empty(device=device)
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole is not None else {}, options=options)


class Fsdp2Engine:
    """What the training loop asks of an engine: forward, backward and step, the figures of a step, checkpoints.

    module: a model after `shard`. optimizer: of its parameters; Addax, and IPSGD with clip="two_pass", would need
    closures. lr_scheduler: steps with the optimizer. accumulation: micro-batches per step. gradient_clipping: largest
    norm of all gradients, or 0; without meaning where no set of gradients is held. monitor: DeepSpeed's. reduce_once:
    ranks sum gradients in the last micro-batch of a step alone, and each holds whole ones from the first on.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        accumulation: int,
        gradient_clipping: float,
        monitor: MonitorMaster,
        reduce_once: bool = False,
    ) -> None:
        self.module, self.optimizer, self.basic_optimizer = module, optimizer, optimizer
        self.lr_scheduler, self.accumulation = lr_scheduler, accumulation
        self.gradient_clipping, self.monitor, self.reduce_once = gradient_clipping, monitor, reduce_once
        self.method = capabilities_of(optimizer)
        self.global_steps = self.micro_steps = 0
        self._norm: torch.Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        """The model's output. A method without gradients runs all forwards of a micro-batch here, and this is the loss
        of the first."""
        if not self.method.uses_gradients and self.module.training:
            return SimpleNamespace(loss=self.optimizer.probe.evaluate(lambda: self.module(**inputs).loss))
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        if self.reduce_once:
            self.module.set_requires_gradient_sync((self.micro_steps + 1) % self.accumulation == 0)
        if self.method.uses_gradients:
            (loss / self.accumulation).backward()

    def step(self) -> None:
        """After the last micro-batch of a step, update the weights; else nothing."""
        self.micro_steps += 1
        if self.micro_steps % self.accumulation:
            return
        self._norm = None if self.method.releases_gradients else self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        self.global_steps += 1

    def _clip(self) -> torch.Tensor | None:
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        if not parameters:  # used up in backward, or never made
            return None
        norm = get_total_norm([p.grad for p in parameters]).full_tensor()
        if self.gradient_clipping:
            clip_grads_with_norm_(parameters, self.gradient_clipping, norm)
        return norm

    def train(self) -> None:
        self.module.train()
        self.module.reshard()  # the root keeps its weights gathered after a forward, until a backward

    def eval(self) -> None:
        self.module.eval()

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> torch.Tensor | None:
        """Of the last step, before clipping."""
        return self._norm

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        """Save all state as folder/tag. All ranks call, and none waits for one that cannot write.

        save_latest must be false: `latest` is the caller's.
        """
        assert not save_latest
        path = Path(folder, tag)
        try:
            dcp.save(self._state() | {"progress": self._progress()}, checkpoint_id=path)
        except dcp.CheckpointException as error:  # on all ranks alike, and no Exception
            raise OSError("; ".join(f"rank {rank}: {why[0]}" for rank, why in error.failures.items())) from error

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict]:
        """Restore what `save_checkpoint` saved on as many ranks. All ranks call."""
        path = Path(folder, tag)
        loaded = {"progress": self._progress()}
        dcp.load(loaded, checkpoint_id=path)
        progress = loaded["progress"]
        self.global_steps = progress["global_steps"]
        self.micro_steps = self.global_steps * self.accumulation
        self.lr_scheduler.load_state_dict(progress["lr_scheduler"])
        if self.method.rotates:
            self.optimizer.resume_at(progress["position"])
        state = self._state()
        dcp.load(state, checkpoint_id=path)
        self.module.load_state_dict(state["model"])
        set_optimizer_state_dict(self.module, self.optimizer, state["optimizer"])
        return str(path), {}

    def _state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.module, self.optimizer)
        return {"model": self.module.state_dict(), "optimizer": optimizer}

    def _progress(self) -> dict[str, Any]:
        """What must be known before the state's shapes are: a method that rotates has that of the active block."""
        position = {"position": list(self.optimizer.position)} if self.method.rotates else {}
        return {"global_steps": self.global_steps, "lr_scheduler": self.lr_scheduler.state_dict(), **position}
