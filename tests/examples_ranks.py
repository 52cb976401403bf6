"""The workers of test_examples.py on two ranks: launch/examples/ as their users run them, as far as a CPU goes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ds_memopt.optimizers import METHODS

EXAMPLES = Path(__file__).resolve().parent.parent / "launch" / "examples"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained_by_trainer(folder: str) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """For each method the weights before the example's training, after it under DistributedDataParallel, and after it
    under FSDP2."""
    trained = {}
    for method in ("AdamMini", "GWT", "CAME"):
        before, after = _run_trainer(method, folder)
        before_sharding, sharded = _run_trainer(method, folder, sharded=True)
        assert all(torch.equal(before[name], before_sharding[name]) for name in before)
        trained[method] = {"before": before, "DDP": after, "FSDP2": sharded}
    return trained


def _run_trainer(method: str, folder: str, sharded: bool = False) -> list[dict[str, torch.Tensor]]:
    made = []
    make_state, train = AcceleratorState.__init__, transformers.Trainer.train

    def make_state_sharded(self, *arguments, fsdp_plugin=None, **named) -> None:
        make_state(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    def note(trainer: transformers.Trainer) -> None:
        made.append({name: whole(p) for name, p in trainer.model.named_parameters()})
        train(trainer)
        assert sharded == all(isinstance(p, DTensor) for p in trainer.model.parameters())
        made.append({name: whole(p) for name, p in trainer.model.named_parameters()})

    arguments = [
        "--method",
        method,
        "--output_dir",
        folder,
        "--max_steps",
        "3",
        "--learning_rate",
        "1e-3",
        "--per_device_train_batch_size",
    ]
    arguments += ["2", "--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "true", "--weight_decay", "0.1"]
    AcceleratorState._reset_state(True)
    with mock.patch.object(transformers.Trainer, "train", note), mock.patch.object(sys, "argv", ["", *arguments]):
        if not sharded:
            runpy.run_path(str(EXAMPLES / "trainer_fsdp2.py"), run_name="__main__")
        else:  # accelerate refuses no CPU here, it takes DistributedDataParallel in silence
            with mock.patch.object(AcceleratorState, "__init__", make_state_sharded):
                runpy.run_path(str(EXAMPLES / "trainer_fsdp2.py"), run_name="__main__")
    return made


def in_torchtitan(folder: str) -> tuple[dict[str, dict[str, dict[str, torch.Tensor]]], str]:
    """What has been trained, by method, and what a pipeline is told."""
    trained = {method: _run_torchtitan(method, f"{folder}/{method}") for method in ("AdamMini", "GWT", "CAME")}
    return trained, _refused_in_a_pipeline()


def _refused_in_a_pipeline() -> str:
    """What a rank is told that holds another part of the model than the first."""
    from torchtitan.components.optimizer import ParamGroupConfig

    from ds_memopt.torchtitan_optimizers import NamedOptimizersContainer

    part = torch.nn.ModuleDict({f"layer{torch.distributed.get_rank()}": torch.nn.Linear(4, 4)})
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamMini", optimizer_kwargs={"lr": 1e-3})
    try:
        NamedOptimizersContainer.Config(param_groups=[group]).build(model_parts=[part])
    except ValueError as error:
        return str(error)
    return ""


def _run_torchtitan(method: str, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of torchtitan's debug model, of one layer, before and after three steps on the same random gradients: by
    an optimizer of the whole model, and in torchtitan's container under FSDP2, whose state torchtitan makes first, and
    which is saved by torch.distributed.checkpoint, trains on, and is loaded before the third step."""
    from torchtitan.components.optimizer import ParamGroupConfig
    from torchtitan.models.llama3 import model_registry

    from ds_memopt.torchtitan_optimizers import NamedOptimizersContainer

    options = {"lr": 8e-4, "betas": (0.9, 0.95)} | ({"level": 1} if method == "GWT" else {})
    spec = model_registry("debugmodel").model
    spec.layers = spec.layers[:1]
    plain, part = spec.build(), spec.build()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in plain.named_parameters()}
    for model in (plain, part):
        for name, p in model.named_parameters():
            p.data.copy_(weights[name])
    named = list(plain.named_parameters())
    groups = [
        {"params": [pair for pair in named if ("norm" in pair[0]) == norms], "weight_decay": decay}
        for norms, decay in ((True, 0.0), (False, 0.1))
    ]
    alone = METHODS[method].from_model(plain, groups, **options)
    fully_shard(part.layers["0"])
    fully_shard(part)
    config = NamedOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name=method, optimizer_kwargs=options | {"weight_decay": decay})
            for pattern, decay in ((r"norm", 0.0), (r".*", 0.1))
        ]
    )
    container = config.build(model_parts=[part])
    gradients = [{n: torch.randn(w.shape, generator=generator) for n, w in weights.items()} for _ in range(3)]

    def step(number: int) -> None:
        for name, p in part.named_parameters():
            p.grad = distribute_tensor(gradients[number][name], p.device_mesh, p.placements)
        container.step()
        container.zero_grad()

    norm = part.norm.weight
    assert norm.to_local().numel() < norm.numel(), "the norm's block is not cut"
    container.state_dict()  # makes state, and no step
    for number in (0, 1):
        step(number)
    dcp.save({"optimizer": container}, checkpoint_id=folder)
    kept = {name: p.detach().clone() for name, p in part.named_parameters()}
    step(0)
    for name, p in part.named_parameters():
        p.data.copy_(kept[name])
    dcp.load({"optimizer": container}, checkpoint_id=folder)
    step(2)
    for number in range(3):
        for name, p in plain.named_parameters():
            p.grad = gradients[number][name]
        alone.step()
    return {
        "before": weights,
        "alone": {name: whole(p) for name, p in plain.named_parameters()},
        "sharded": {name: whole(p) for name, p in part.named_parameters()},
    }
