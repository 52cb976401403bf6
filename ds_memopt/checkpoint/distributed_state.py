"""An optimizer's state for torch.distributed.checkpoint: by parameter name, for any number of ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ds_memopt.checkpoint.owners import Claim, share_out
from ds_memopt.checkpoint.part_files import WORDS
from ds_memopt.checkpoint.run_state import Run
from ds_memopt.engines.processes import of_all_ranks, on_all_ranks, rank_and_world_size
from ds_memopt.engines.sliced_tensor import SlicedTensor
from ds_memopt.optimizers import StatePart, capabilities_of

NUMBERS = "numbers"


class OptimizerState:
    """Gives torch.distributed.checkpoint the state of a method of ours, under FSDP2 and in plain PyTorch.

        dcp.save({"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer)}, checkpoint_id=folder)

    A state is saved as "parameter:key", 1-D and without padding, so that other ranks load other parts of it. Loading
    fills the optimizer's state in place; load the weights with it.

    Raises ValueError for an optimizer that is none of ours, and for BAdam.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if capabilities_of(optimizer).family is None or optimizer.rotates:
            raise ValueError(
                f"OptimizerState does not know {type(optimizer).__name__}. Use ds_memopt.save and load, or for torch's "
                "optimizers get_optimizer_state_dict."
            )
        if optimizer.bound:
            raise ValueError("DeepSpeed holds this optimizer's state otherwise. Use ds_memopt.save(engine, folder).")
        self._run = Run.of((model, optimizer))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A collective. Zeros where no step has made any state yet."""
        parts = on_all_ranks(lambda: list(self._run.states()))
        told = of_all_ranks([
            Claim(part.name, part.key, part.start, part.stop, WORDS[part.values.dtype], part.values.itemsize)
            for part in parts
        ])  # fmt: skip
        numel: dict[tuple[str, str], int] = {}
        for claim in itertools.chain(*told):
            numel[claim[:2]] = max(claim.stop, numel.get(claim[:2], 0))
        mine: dict[tuple[str, str], list[Claim]] = {}
        for claim in share_out(told)[rank_and_world_size()[0]]:
            mine.setdefault(claim[:2], []).append(claim)
        pieces: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
        for part in parts:
            if len(part.values):
                pieces.setdefault(part[:2], {}).update(_cut(part, mine.get(part[:2], [])))
        state: dict[str, Any] = {
            f"{name}:{key}": SlicedTensor(numel[name, key], held, [claim.start for claim in mine.get((name, key), [])])
            for (name, key), held in pieces.items()
        }
        return state | {NUMBERS: json.dumps({"progress": self._run.progress(), "groups": self._run.groups()})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what torch.distributed.checkpoint has filled in. A collective for some methods.

        Raises ValueError for the state of another method, of other options or of other blocks.
        """
        numbers = json.loads(state_dict[NUMBERS])
        parts = [
            StatePart(*word.rsplit(":", 1), start, values)
            for word, tensor in state_dict.items() if word != NUMBERS for start, values in tensor.pieces.items()
        ]  # fmt: skip
        self._run.optimizer.load_named_state(parts, numbers["progress"])
        self._run.load_groups(numbers["groups"])


def _cut(part: StatePart, saved: list[Claim]) -> Iterator[tuple[int, torch.Tensor]]:
    """A part in pieces, so that what this rank saves of it is some of them."""
    inside = {edge for claim in saved for edge in (claim.start, claim.stop) if part.start < edge < part.stop}
    for start, stop in itertools.pairwise(sorted({part.start, part.stop, *inside})):
        yield start, part.values[start - part.start : stop - part.start]
