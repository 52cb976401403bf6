"""Gradients that are released in backward, in plain PyTorch: the same steps, fewer bytes. On ranks: test_engines.py."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from release_ranks import CASES, GradientsAlive, build, refusal
from tiny import batches, equal, equal_tensors, full_parameters, llama
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR

from ds_memopt import AdamMini, BAdam
from ds_memopt.engines.held_bytes import bytes_of


def backward(model, batch, scale: float = 1.0) -> None:
    (model(input_ids=batch, labels=batch).loss * scale).backward()


def trained(case: str, release: bool, **changes) -> tuple[dict, dict]:
    """With a schedule from 0, a burst on which GWT's limiter acts, and another learning rate after a load of state."""
    model = llama(**changes)
    optimizer = build(case, model, release)
    schedule = LambdaLR(optimizer, lambda step: step / 4)
    for number, batch in enumerate(batches(6)):
        backward(model, batch, 10 if number == 3 else 1)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if number == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return full_parameters(model), optimizer.state_dict()["state"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_steps_and_states_are_the_same_to_the_bit(case, tied):
    kept, released = (trained(case, release, tie_word_embeddings=tied) for release in (False, True))
    assert equal(kept[0], released[0])
    assert equal_tensors(kept[1], released[1]) >= 60


@pytest.mark.parametrize("release", [False, True])
def test_one_gradient_is_there_at_a_time(release):
    model = llama()
    alive = GradientsAlive(model)
    optimizer = build("AdamMini", model, release)
    backward(model, next(batches(1)))
    optimizer.step()
    parameters = list(model.parameters())
    assert alive.most == (max(p.nbytes for p in parameters) if release else bytes_of(parameters))
    assert all((p.grad is None) == release for p in parameters)


def test_what_hooks_do_not_see_is_left_to_step():
    """A parameter that began to train later, one that gets no gradient for a step, and gradients set by a program."""
    ends = []
    for release in (False, True):
        model = llama()
        norm, head, up = model.model.norm.weight, model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight
        norm.requires_grad_(False)
        optimizer = build("AdamMini", model, release)
        optimizer.add_param_group({"params": [("model.norm.weight", norm)]})
        norm.requires_grad_(True)
        for number, batch in enumerate(batches(3)):
            head.requires_grad_(number != 1)
            backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()
        up.grad = torch.ones_like(up)
        optimizer.step()
        ends.append((full_parameters(model), optimizer.state_dict()["state"], [optimizer.state[p] for p in (head, up)]))
    assert equal(ends[0][0], ends[1][0]) and equal_tensors(ends[0][1], ends[1][1]) >= 60
    assert [state["step"].item() for state in ends[1][2]] == [2, 4]


def test_a_second_backward_is_refused():
    model = llama()
    optimizer, batch = build("GWT", model), next(batches(1))
    backward(model, batch)
    message = refusal(backward, model, batch)
    assert message.startswith("lm_head.weight got a second gradient before step(), but release_gradients=True has used")
    assert "accumulate over 1 micro-batch, and make that larger" in message
    optimizer.zero_grad()
    optimizer.step()
    backward(model, batch)


def test_a_scaler_finds_no_gradient():
    model = llama()
    optimizer, scaler = build("AdamMini", model), torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=next(batches(1)), labels=next(batches(1))).loss).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_what_cannot_be_released_is_refused():
    half = llama().half()
    assert "cannot take back a step whose gradients overflow" in refusal(build, "AdamMini", half)
    assert "release_gradients='yes' is out of range: it must be true or false" in refusal(
        AdamMini.from_model, llama(), release_gradients="yes"
    )
    options = {"base": "adam_mini", "base_options": {"release_gradients": True}}
    assert "Leave release_gradients out." in refusal(BAdam.from_model, llama(), **options)
    model, batch = llama(), next(batches(1))
    first, second = build("AdamMini", model), build("AdamMini", model)
    assert "Call release() of that one." in refusal(backward, model, batch)
    first.release()
    second.step()
    backward(model, batch)


def test_release_takes_the_hooks_off_and_the_model_may_go():
    model, batch = llama(), next(batches(1))
    optimizer = build("AdamMini", model)
    optimizer.release()
    backward(model, batch)
    assert all(p.grad is not None for p in model.parameters())
    optimizer = build("AdamMini", model)
    references = weakref.ref(optimizer), weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        model.zero_grad()
        backward(model, batch)  # hooks of an optimizer that is gone
        assert references[0]() is None and all(p.grad is not None for p in model.parameters())
        del model
        assert references[1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("case", CASES)
def test_asking_for_state_makes_no_step(case):
    model = llama()
    optimizer, before = build(case, model), full_parameters(model)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert equal(full_parameters(model), before) and len(state) == len(before)
    assert all(not value.any() for kept in state.values() for value in kept.values())
