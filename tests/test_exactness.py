"""Placement never changes the result: N ranks against one process, 5 steps, across cut heads, rows and groups."""

from __future__ import annotations

import functools

import pytest
import torch
from exactness_ranks import (
    BF16_CASES,
    FOR_HSDP,
    LIMIT_OF,
    RULES,
    all_placements,
    one_process,
    one_process_bf16,
    shards_held_twice,
)
from spawn import run_ranks
from tiny import distance, full_parameters, llama

METHODS = [rule for rule in RULES if rule != "AdamW"]


@functools.cache
def references():
    torch.set_num_threads(1)
    start = full_parameters(llama())
    return {rule: one_process(rule) for rule in RULES}, {rule: one_process_bf16(rule) for rule in RULES}, start


def moved_apart(weights, reference, start) -> float:
    """Distance between two trained models, relative to the distance that training moved the reference."""
    return distance(weights, reference) / distance(reference, start)


def test_one_rank_is_bit_for_bit_the_plain_optimizer():
    """Where no sum crosses ranks nothing may differ. ZeRO-3 in fp32 is held to AdamW's error instead: on one rank it
    moves AdamW by 5e-7 too, as it lays weights at other addresses and the matrix products round differently."""
    fp32, bf16, start = references()
    results, _, _ = run_ranks(all_placements, 1)[0]
    for rule in METHODS:
        for placement, weights in results[rule].items():
            reference = bf16 if placement in BF16_CASES else fp32
            apart = moved_apart(weights, reference[rule], start)
            print(f"N=1 {rule:15} {placement:32} {apart:.2e}")
            if placement.startswith("zero3") and placement not in BF16_CASES:
                adamw = moved_apart(results["AdamW"]["zero3"], reference["AdamW"], start)
                assert apart <= 3 * adamw, (rule, placement)
            else:
                assert apart == 0, (rule, placement)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_placement_gives_the_same_weights(world_size):
    """Limit: 3x what AdamW shows for the same pair of placements (7e-6 to 3.1e-5 in fp32, 1.7e-2 in bf16); in fp32
    8e-6.

    Measured: up to 5.5e-6, and in bf16 up to 2.1 times AdamW's; the table in ds_memopt/shards/README.md has more steps.
    Blocks whose ranks do not add up their sums are off by 3e-3 or more, which the last lines assert. (DeepSpeed's own
    AdamW is off by 0.1 at stage 0 in bf16, where it makes a dummy step: stage 1 sets the limit there.)"""
    fp32, bf16, start = references()
    results, cuts, open_seams = run_ranks(all_placements, world_size)[0]
    for stage in ("zero2" if world_size == 2 else "zero1", "zero3"):
        for rule in ("AdamMini", "GWT, adam_mini", "BAdam, adam_mini"):
            cut = cuts[rule][stage]["block"]
            assert any("q_proj" in name or "k_proj" in name for name in cut), f"{stage} cuts no head: {cut}"
            rows = ("mlp", "o_proj", "lm_head", "embed")
            assert any(row in name for row in rows for name in cut), f"{stage} cuts no row: {cut}"
    if world_size == 3:
        for stage in ("zero1", "zero3"):
            assert cuts["GWT"][stage]["group"], f"{stage} cuts no wavelet group"

    if world_size == 2:
        # In bf16 rounding hides open seams; that the layouts are the same as in fp32 does not depend on it.
        for rule in METHODS:
            for placement, cut in cuts[rule].items():
                assert cut == cuts[rule]["zero2"] or not placement.startswith(("zero1", "zero2, bf16")), (
                    rule,
                    placement,
                )

    for rule in METHODS:
        for placement, weights in results[rule].items():
            reference = bf16 if placement in BF16_CASES else fp32
            peer = LIMIT_OF.get(placement, placement)
            ours = moved_apart(weights, reference[rule], start)
            adamw = moved_apart(results["AdamW"][peer], reference["AdamW"], start)
            print(f"N={world_size} {rule:15} {placement:32} {ours:.2e}, AdamW {adamw:.2e}, ratio {ours / adamw:.2f}")
            assert ours <= (3 * adamw if placement in BF16_CASES else min(3 * adamw, 8e-6)), (rule, placement)

    assert len(open_seams) == (5 if world_size == 3 else 0)
    for rule, weights in open_seams.items():
        apart = moved_apart(weights, fp32[rule], start)
        print(f"N={world_size} {rule:15} with open seams {apart:.1e}")
        assert apart > 1e-3, rule


def test_shards_that_are_held_twice_give_the_same_weights():
    """HSDP. The limit is that of the other placements; measured up to 1.2e-6, AdamW 6.1e-6."""
    fp32, _, start = references()
    results = run_ranks(shards_held_twice, 4)[0]
    adamw = moved_apart(results["AdamW"], fp32["AdamW"], start)
    for rule in FOR_HSDP[1:]:
        ours = moved_apart(results[rule], fp32[rule], start)
        print(f"N=4 {rule:15} HSDP, 2 x 2 {ours:.2e}, AdamW {adamw:.2e}, ratio {ours / adamw:.2f}")
        assert ours <= min(3 * adamw, 8e-6), rule
