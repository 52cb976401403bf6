"""A small model, wrappers for it, and the worker of test_names.py on two ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import distance, ds_config, equal, initialize
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ds_memopt.blocks import bare_parameters
from ds_memopt.engines import fsdp2_engine
from ds_memopt.optimizers import METHODS

OPTIONS = dict.fromkeys(METHODS, {"lr": 1e-2}) | {
    "GWT": {"lr": 1e-2, "level": 1, "include": [r"^layers.*up.weight"]},
    # The first block is a matrix alone: of the two param groups, that of the vectors has nothing in it.
    "BAdam": {
        "lr": 1e-2, "switch_every": 2, "order": "ascending", "include_embedding": True, "include_lm_head": True,
    },
    "MeZO": {"lr": 1e-2, "compiled": False, "layer_fraction": 0.5, "magnitude_fraction": 0.7, "momentum": 0.5},
    "IPSGD": {"lr": 1e-2, "rule": "adalomo"}, "Addax": {"lr": 1e-2, "alpha": 0.5, "compiled": False},
}  # fmt: skip
IN_PLACE = ("MeZO", "IPSGD", "Addax")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 13), nn.Linear(13, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """It has a child that is called as DDP calls what it wraps, and parameters of one row, which one rank alone has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, 6), nn.ModuleList(Layer() for _ in range(2))
        self.module = nn.Linear(6, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return (self.module(x).squeeze(-1).float() - tokens / 11).square().mean()


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def each_layer(wrapper):
    def wrap(model: Net) -> Net:
        for number, layer in enumerate(model.layers):
            model.layers[number] = wrapper(layer)
        return model

    return wrap


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


INSIDE = {"checkpointed layers": each_layer(checkpoint_wrapper), "compiled layers": each_layer(compiled)}
AROUND = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "compiled DDP of compiled layers": lambda m: compiled(DistributedDataParallel(INSIDE["compiled layers"](m))),
}


def data(steps: int, rank: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5 + rank)
    return [torch.randint(0, 11, (4, 5), generator=generator) for _ in range(steps)]


def train(method: str, model: nn.Module, optimizer, batches: list[torch.Tensor]) -> None:
    for tokens in batches:
        if method == "Addax":
            optimizer.step(lambda: model(tokens[:2]), lambda: model(tokens[2:]))  # noqa: B023
        elif method in IN_PLACE:
            optimizer.step(lambda: model(tokens))  # noqa: B023
        else:
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in bare_parameters(model).items()
    }


def shard(model: Net) -> Net:
    fsdp2_engine.shard(model)
    return model


def run_sharded(model: Net) -> Net:
    with torch.no_grad():
        shard(model)(data(1)[0])
    assert not hasattr(model.module.weight, "to_local"), "the root keeps its weights gathered"
    return model


def build(method: str, seed: int = 0, wrap=shard):
    """A sharded model in bf16, so that what updates in place has something to keep, and its optimizer."""
    model = wrap(net(seed).bfloat16() if method in IN_PLACE else net(seed))
    return model, METHODS[method].from_model(model, **OPTIONS[method])


def distributed_state_dicts(folder: Path) -> dict:
    """For each method and form: whether weights stood still while state was asked for before the first step; then
    distances from a run as a whole, relative to the distance moved: of that run, of one resumed from what it saved, and
    where state is not flat, of one resumed from its weights alone."""
    results, batches = {}, data(6, dist.get_rank())
    for method in METHODS:
        before = weights(net().bfloat16() if method in IN_PLACE else net())
        model, optimizer = build(method)
        train(method, model, optimizer, batches)
        whole = weights(model)
        moved = distance(before, whole)
        for flat in (False, True) if method in ("AdamMini", "BAdam", "MeZO") else (False,):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            model, optimizer = build(method)
            get_optimizer_state_dict(model, optimizer, options=options)
            untouched = equal(weights(model), before)
            train(method, model, optimizer, batches[:1])  # of a visit's two steps with BAdam
            path = folder / f"{method} {flat}"
            dcp.save(state_of(model, optimizer, options), checkpoint_id=path)
            train(method, model, optimizer, batches[1:])
            ends = [weights(model)]
            for with_optimizer in (True,) if flat else (True, False):
                model, optimizer = build(method, seed=1)
                state = state_of(model, optimizer, options) if with_optimizer else {"model": model.state_dict()}
                dcp.load(state, checkpoint_id=path)
                model.load_state_dict(state["model"])
                if with_optimizer:
                    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
                train(method, model, optimizer, batches[1:])
                ends.append(weights(model))
            results[method, flat] = untouched, *(distance(end, whole) / moved for end in ends)
    return results


def state_of(model: nn.Module, optimizer, options: StateDictOptions) -> dict:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


def wrapped(method: str) -> dict[str, float]:
    """Distances from the bare model of wrapped ones, and of one that has run before its optimizer was built and shows
    whole parameters, all sharded, relative to the distance moved."""
    batches, ends = data(3, dist.get_rank()), {}
    inside = {name: lambda model, wrap=wrap: shard(wrap(model)) for name, wrap in INSIDE.items()}
    for name, wrap in {"": shard, "run before": run_sharded, **inside}.items():
        model, optimizer = build(method, wrap=wrap)
        train(method, model, optimizer, batches)
        ends[name] = weights(model)
    bare = ends.pop("")
    moved = distance(bare, weights(net().bfloat16() if method in IN_PLACE else net()))
    return {name: distance(end, bare) / moved for name, end in ends.items()}


def mezo_under_ddp() -> list[dict[str, torch.Tensor]]:
    ends = []
    for wrap in (copy.copy, DistributedDataParallel):
        model, optimizer = build("MeZO", wrap=wrap)
        train("MeZO", model, optimizer, data(3, dist.get_rank()))
        ends.append(weights(model))
    return ends


def two_ranks(folder: Path) -> dict:
    return {
        "state dicts": distributed_state_dicts(folder),
        "wrapped": {method: wrapped(method) for method in ("AdamMini", "BAdam", "MeZO")},
        "DDP": mezo_under_ddp(),
        "engine": list(bare_parameters(initialize(net(), ds_config(2)))),
    }


def built_too_early(method: str, replace) -> str:
    """The error of a first step where the parameters were replaced after the optimizer was built."""
    model = net() if replace is fully_shard else net().to("meta")
    optimizer = METHODS[method].from_model(model, **OPTIONS[method])
    replace(model)
    try:
        train(method, model, optimizer, data(1))
    except ValueError as error:
        return str(error)
    return "no error"
