"""Worker of test_engines.py: gradients that are released in backward, under FSDP2. And what plain runs share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tiny import HYPER, full_parameters, llama, local, shard_fsdp2
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ds_memopt.engines.held_bytes import bytes_of
from ds_memopt.measure import CommunicationMeter
from ds_memopt.optimizers import METHODS

STEPS = 4
CASES = {
    "AdamMini": ("AdamMini", {}),
    "GWT": ("GWT", {}),
    "GWT, adam_mini": ("GWT", {"base": "adam_mini"}),
    "CAME": ("CAME", {}),
}


def build(case: str, model, release: bool = True):
    method, options = CASES[case]
    given = METHODS[method].accepted(HYPER) | options
    return METHODS[method].from_model(model, release_gradients=release, **given)


def trained(case: str, release: bool) -> dict[str, Any]:
    """Weights, states and traffic of a few steps; with release the last one goes on from another optimizer's state."""
    model = shard_fsdp2(llama())
    alive = GradientsAlive(model)
    optimizer = build(case, model, release)
    with CommunicationMeter() as meter:
        for number, batch in enumerate(local(STEPS)):
            if number == STEPS - 1:
                state = get_optimizer_state_dict(model, optimizer)
                optimizer.release()
                optimizer = build(case, model, release)
                set_optimizer_state_dict(model, optimizer, state)
            loss = model(input_ids=batch, labels=batch).loss
            (loss * (10 if number == 2 else 1)).backward()
            alive.between = alive.now()
            optimizer.step()
            optimizer.zero_grad()
    states = [{key: local_of(value) for key, value in optimizer.state[p].items()} for p in model.parameters()]
    return {
        "weights": full_parameters(model),
        "states": states,
        "slots": cut(optimizer),
        "sent": {name: one.sent_bytes for name, one in meter.by_collective().items()},
        "most": alive.most,
        "between": alive.between,
    }


def local_of(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def cut(optimizer) -> dict[str, int]:
    """Blocks that a rank border cuts, by structure, of all the calls that the optimizer has made."""
    slots: dict[str, int] = {}
    for _, indexes in optimizer._indexes.values():
        for structure, index in indexes.items():
            slots[structure] = slots.get(structure, 0) + index.seams.num_slots
    return slots


class GradientsAlive:
    """most: bytes of gradients that were there at once when one more was complete. Built before the optimizer."""

    def __init__(self, model) -> None:
        self.parameters, self.most, self.between = list(model.parameters()), 0, 0
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.look)

    def look(self, _) -> None:
        self.most = max(self.most, self.now())

    def now(self) -> int:
        return bytes_of(p.grad for p in self.parameters if p.grad is not None)


def refusal(call, *arguments, **options) -> str:
    """The message of a ValueError; empty if there is none."""
    try:
        call(*arguments, **options)
    except ValueError as error:
        return str(error)
    return ""


def backward(model, batch: torch.Tensor) -> None:
    model(input_ids=batch, labels=batch).loss.backward()


def refusals() -> dict[str, str]:
    told, batch = {}, local(1)[0]
    model = shard_fsdp2(llama())
    optimizer = build("AdamMini", model)  # which must live
    backward(model, batch)
    told["second backward"] = refusal(backward, model, batch)
    told["ddp"] = refusal(build, "AdamMini", DistributedDataParallel(llama()))
    model = llama()
    optimizer = build("AdamMini", model)
    backward(DistributedDataParallel(model), batch)  # built behind its back
    told["ddp, later"] = refusal(optimizer.step)
    return told


class Branches(torch.nn.Module):
    """Two layers, of which a rank may leave the second out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)

    def forward(self, rows: torch.Tensor, both: bool) -> torch.Tensor:
        return (self.sometimes(self.always(rows)) if both else self.always(rows)).square().mean()


def unused_on_a_rank(release: bool) -> dict[str, torch.Tensor]:
    """FSDP2 then reduces zeros for it, in the order of the others."""
    model = fully_shard(Branches())
    model.set_reduce_scatter_unused_params(True)
    optimizer = build("GWT", model, release)
    for step in range(3):
        model(torch.randn(4, 5), both=step != 1 or dist.get_rank() == 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_parameters(model)


def everything() -> dict:
    runs = {(case, release): trained(case, release) for case in CASES for release in (False, True)}
    unused = {}
    for release in (False, True):
        torch.manual_seed(dist.get_rank())
        unused[release] = unused_on_a_rank(release)
    return {"runs": runs, "unused": unused, "refusals": refusals()}
