"""Placement never changes the result: N ranks against one process, 20 steps, across heads and rows that are cut."""

from __future__ import annotations

import functools

import pytest
import torch
from exactness import BF16_CASES, FP32_CASES, OPTIMIZERS, all_placements, one_process, one_process_bf16
from spawn import run_ranks
from tiny import distance, full_parameters, llama


@functools.cache
def references():
    torch.set_num_threads(1)
    start = full_parameters(llama())
    return (
        {optimizer: one_process(optimizer) for optimizer in OPTIMIZERS},
        {optimizer: one_process_bf16(optimizer) for optimizer in OPTIMIZERS},
        start,
    )


def moved_apart(weights, reference, start) -> float:
    """Distance between two trained models, relative to the distance that training moved the reference."""
    return distance(weights, reference) / distance(reference, start)


def test_one_rank_is_bit_for_bit_the_plain_optimizer():
    """Where no sum crosses ranks nothing may differ. ZeRO-3 in fp32 is held to AdamW's error instead: on one rank it
    moves AdamW by 5e-7 too, as it lays weights at other addresses and the matrix products round differently."""
    fp32, bf16, start = references()
    results, _, _ = run_ranks(all_placements, 1, True)[0]
    for placement, weights in results["AdamMini"].items():
        reference = bf16 if placement in BF16_CASES else fp32
        apart = moved_apart(weights, reference["AdamMini"], start)
        if placement.startswith("zero3") and placement not in BF16_CASES:
            assert apart <= 3 * moved_apart(results["AdamW"][placement], reference["AdamW"], start), placement
        else:
            assert apart == 0, placement


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_placement_gives_the_same_weights(world_size):
    """Limit: 3x what AdamW shows for the same pair of placements. Measured in fp32: 4.7e-7 to 7e-7 for AdamMini, 5e-7
    to 1.5e-6 for AdamW; in bf16 1.0e-2 and 1.2e-2. A block whose ranks do not add up their sums is off by 1e-3 or more,
    which the last line asserts. (DeepSpeed's own AdamW is off by 0.1 at stage 0 in bf16, where it makes a dummy step:
    stage 1 sets the limit there.)"""
    fp32, bf16, start = references()
    results, cuts, open_seams = run_ranks(all_placements, world_size, world_size == 2)[0]
    for stage in ("zero1", "zero2", "zero3", "zero3, zero.Init", "zero2, round_robin_gradients"):
        cut = cuts[stage]
        assert any("q_proj" in name or "k_proj" in name for name in cut), f"{stage} cuts no head: {cut}"
        rows = ("mlp", "o_proj", "lm_head", "embed")
        assert any(row in name for row in rows for name in cut), f"{stage} cuts no row: {cut}"

    assert set(FP32_CASES) < set(results["AdamMini"])
    for placement in results["AdamMini"]:
        reference = bf16 if placement in BF16_CASES else fp32
        peer = "zero1, bf16" if placement == "zero0, bf16" else placement
        ours = moved_apart(results["AdamMini"][placement], reference["AdamMini"], start)
        adamw = moved_apart(results["AdamW"][peer], reference["AdamW"], start)
        print(f"N={world_size} {placement:32} AdamMini {ours:.2e} AdamW {adamw:.2e} ratio {ours / adamw:.2f}")
        assert ours <= 3 * adamw, placement

    assert moved_apart(open_seams, fp32["AdamMini"], start) > 1e-3
