"""Which block trains when: a pure function of the number of visits, equal on all ranks and on resume."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

ORDERS = ("random", "descending", "ascending", "fixed")

USUAL_SWITCH_EVERY, FEWEST_AUTOMATIC = 100, 10
"""K of the paper's experiments, and what "auto" does not go below: shorter visits are mostly the first step of Adam."""


@dataclass(frozen=True)
class Rotation:
    """The order in which blocks are visited; a block epoch visits each of them once.

    order: "random", a new permutation for every block epoch; "ascending" from input to output, "descending" the other
        way, both from start_block on; "fixed" stays at start_block.
    """

    num_blocks: int
    order: str
    start_block: int
    seed: int

    def block(self, visit: int) -> int:
        """The number of the block that is active during visit 0, 1, 2, ..."""
        epoch, position = divmod(visit, self.num_blocks)
        if self.order == "random":
            # A generator of its own for every block epoch: no state to save, none that a program could disturb.
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed}, {epoch}".encode()))
            return torch.randperm(self.num_blocks, generator=generator, device="cpu")[position].item()
        if self.order == "fixed":
            return self.start_block
        return (self.start_block + (position if self.order == "ascending" else -position)) % self.num_blocks


def automatic_switch_every(total_steps: int | None, num_blocks: int) -> int:
    """Steps per visit: one round through the blocks takes the whole run, within the two limits."""
    if total_steps is None:
        return USUAL_SWITCH_EVERY
    return min(max(total_steps // num_blocks, FEWEST_AUTOMATIC), USUAL_SWITCH_EVERY)
