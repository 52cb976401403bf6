"""CAME against the package of its authors (came-pytorch 0.1.3), in one process.

Every placement gives what one process gives: test_every_method.py.
"""

from __future__ import annotations

import pytest
import torch
from came_pytorch import CAME as Authors
from tiny import batches, distance, full_parameters, llama, train_plain
from torch import nn

from ds_memopt import CAME

HYPER = {"lr": 1e-3, "weight_decay": 0.1, "clip_threshold": 0.7}


def theirs(parameters) -> Authors:
    return Authors(parameters, betas=(0.9, 0.99, 0.999), eps=(1e-30, 1e-16), **HYPER)


def ours(model: nn.Module, **changes) -> CAME:
    hyper = HYPER | {"betas": (0.9, 0.99), "confidence_beta": 0.999} | changes
    return CAME.from_model(model, list(model.parameters()), **hyper)


def test_a_llama_moves_as_with_the_authors_package():
    """Measured: 8e-7 of the distance moved. Without clipping 0.36."""
    data, start = list(batches(12)), full_parameters(llama())
    model, twin, unclipped = llama(), llama(), llama()
    train_plain(model, ours(model), data)
    train_plain(twin, theirs(twin.parameters()), data)
    train_plain(unclipped, ours(unclipped, clip_threshold=1e6), data)
    expected = full_parameters(twin)
    moved = distance(expected, start)
    assert distance(full_parameters(model), expected) < 1e-5 * moved
    assert distance(full_parameters(unclipped), expected) > 0.1 * moved


class Experts(nn.Module):
    """Matrices for three experts, stacked, as transformers keeps them; or each a parameter of its own."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        weights = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
        parts = [weights] if stacked else list(weights)
        self.weights = nn.ParameterList(nn.Parameter(part.clone()) for part in parts)

    def forward(self, step: int) -> torch.Tensor:
        stacked = torch.cat([part.reshape(-1, 5, 7) for part in self.weights])
        size = 1.0 + 9.0 * (torch.arange(3) == step % 3).view(3, 1, 1)  # in turn one has a gradient that is clipped
        return (size * (stacked * torch.arange(1.0, 8.0)).sin()).sum()


def test_each_expert_of_a_stack_is_a_matrix():
    """As the authors' package does with the experts apart. Measured: 2.5e-6 of the distance moved; clipped together, as
    their package does with the stack, 0.34."""
    stacked, apart, together = Experts(stacked=True), Experts(stacked=False), Experts(stacked=True)
    for model, optimizer in (
        (stacked, ours(stacked)), (apart, theirs(apart.parameters())), (together, theirs(together.parameters())),
    ):  # fmt: skip
        for step in range(12):
            model(step).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = torch.stack(list(apart.weights))
    moved = (expected - Experts(stacked=True).weights[0]).norm()
    assert (stacked.weights[0] - expected).norm() < 1e-5 * moved
    assert (together.weights[0] - expected).norm() > 1e-2 * moved


def test_its_state_is_two_numbers_per_row_and_column_and_one_per_element():
    model = llama()
    optimizer = ours(model)
    train_plain(model, optimizer, batches(1))
    numbers = {name: sum(v.numel() for key, v in optimizer.state[p].items() if key != "step")
               for name, p in model.named_parameters()}  # fmt: skip
    for name, p in model.named_parameters():
        assert numbers[name] == p.numel() + (2 * sum(p.shape) + 2 if p.ndim > 1 else p.numel()), name


def test_three_betas_and_eps_are_refused():
    with pytest.raises(ValueError, match="^betas=.* two numbers in"):
        CAME.from_model(llama(), betas=(0.9, 0.999, 0.9999))
    with pytest.raises(ValueError, match="'eps' is AdamW's and has no meaning for CAME"):
        CAME.from_model(llama(), eps=1e-8)
