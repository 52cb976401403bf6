"""A run that is stopped and resumed: the same bits at the same N, the same numbers at another N."""

from __future__ import annotations

import re

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from resume_ranks import AFTER, BEFORE, STAGES, continue_with_and_without_state, resume, save_and_go_on
from spawn import run_ranks
from tiny import HYPER, batches, distance, full_parameters, llama, train_plain

from ds_memopt import AdamMini
from ds_memopt.optimizers import METHODS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(save_and_go_on, 2, folder)


def test_new_processes_continue_bit_for_bit(saved):
    folder, ranks = saved
    resumed = run_ranks(resume, 2, folder)[0]
    assert set(resumed) == {*STAGES, "fsdp2", "fsdp2, BAdam"}
    for name, weights in resumed.items():
        assert distance(weights, ranks[0][name]["end"]) == 0, name


def test_zero_to_fp32_gives_the_weights_at_the_checkpoint(saved):
    """Not for ZeRO-1 with fp32 accumulation, whose files DeepSpeed's tool reads for no optimizer."""
    folder, ranks = saved
    fp32 = ("zero1", "zero2", "zero3", "zero3, GWT", "zero2, BAdam", "zero3, offload, BAdam")
    for name in (*fp32, "zero2, compact", "zero3, compact"):
        weights = get_fp32_state_dict_from_zero_checkpoint(folder / name)
        for parameter, value in ranks[0][name]["saved"].items():
            assert torch.equal(weights[parameter], value), (name, parameter)


def test_deepspeed_hands_out_the_momentum_of_a_parameter(saved):
    _, ranks = saved
    whole = ranks[0]["zero1"]["lm_head momentum"]
    assert whole.shape == (101, 40) and whole.abs().max() > 0
    for name in ("zero2", "zero3"):
        torch.testing.assert_close(ranks[0][name]["lm_head momentum"], whole, rtol=1e-4, atol=1e-7)


def test_state_by_name_is_sliced_anew_for_three_ranks_and_another_stage(saved):
    """Written by two ranks under ZeRO-2, continued by three under ZeRO-3, against one process that never stopped.

    Limit 1e-5 of the distance moved; measured 5e-7 for Adam-mini and 8e-7 for GWT. Without the state the run ends 1e-2
    of that distance away or more."""
    _, ranks = saved
    runs = {}
    for written, goes_on in (("zero2", "zero3"), ("zero2, GWT", "zero3, GWT")):
        parts = [part for rank in ranks for part in rank[written]["parts"]]
        assert {"step", "exp_avg", "block_exp_avg_sq"} <= {part.key for part in parts}
        runs[goes_on] = ranks[0][written]["saved"], parts
    for stage, (with_state, without) in run_ranks(continue_with_and_without_state, 3, runs)[0].items():
        model = llama()
        start = full_parameters(model)
        case = STAGES[stage]
        method, hyper = METHODS[case.get("optimizer", "AdamMini")], case.get("hyper", HYPER)
        train_plain(model, method.from_model(model, model.parameters(), **hyper), batches(BEFORE + AFTER))
        whole = full_parameters(model)
        moved = distance(whole, start)
        print(stage, distance(with_state, whole) / moved, distance(without, whole) / moved)
        assert distance(with_state, whole) <= 1e-5 * moved
        assert distance(without, whole) > 1e-2 * moved


def test_state_by_name_with_a_hole_is_refused_and_changes_nothing(saved):
    _, ranks = saved
    parts = [part for rank in ranks for part in rank["zero2"]["parts"]]
    hole = [part for part in parts if not (part.name == "lm_head.weight" and part.key == "exp_avg")]
    model = llama()
    optimizer = AdamMini.from_model(model, model.parameters(), **HYPER)
    train_plain(model, optimizer, batches(1))
    before = [(part.key, part.values.clone()) for part in optimizer.named_state()]
    message = "The state offered for lm_head.weight lacks exp_avg[0:4040]. Hand in what all ranks gave out."
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_named_state(hole)
    after = [(part.key, part.values) for part in optimizer.named_state()]
    assert all(k == kk and torch.equal(v, vv) for (k, v), (kk, vv) in zip(before, after, strict=True))
    optimizer.load_named_state(parts)
    loaded = {part.name: part for part in optimizer.named_state() if part.key == "exp_avg"}
    for part in parts:
        if part.key == "exp_avg":
            held = loaded[part.name].values[part.start : part.start + len(part.values)]
            assert torch.equal(held, part.values), part.name
