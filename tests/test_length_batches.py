"""Batches of long and short rows: what each step draws, on how many ranks and from where it starts."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ds_memopt.train.length_batches import LengthBatches, divide

LENGTHS = random.Random(0).choices((5, 9, 17, 40, 300), k=101)


def drawn(threshold: int | None, world: int, steps: range, seed: int = 3) -> list[tuple[list[int], list[int]]]:
    """Long and short rows that all ranks together draw in each step, 12 and 4 of them."""
    zo, fo = 12 // world, 4 // world
    halves = divide(LENGTHS, threshold)
    ranks = [list(LengthBatches(halves, zo, fo, rank, world, seed, steps)) for rank in range(world)]
    assert all(len(batch) == zo + fo for batches in ranks for batch in batches)
    return [
        (sorted(i for batch in step for i in batch[:zo]), sorted(i for batch in step for i in batch[zo:]))
        for step in zip(*ranks, strict=True)
    ]


def test_every_rank_gets_long_and_short_rows_at_every_step():
    for long, short in drawn(17, 2, range(60)):
        assert len(set(long)) == 12 and all(LENGTHS[i] > 17 for i in long)
        assert len(set(short)) == 4 and all(LENGTHS[i] <= 17 for i in short)


@pytest.mark.parametrize("threshold", [17, None])
def test_steps_depend_on_the_global_batch_and_the_seed_alone(threshold):
    whole = drawn(threshold, 1, range(60))
    assert drawn(threshold, 2, range(60)) == drawn(threshold, 4, range(60)) == whole
    assert drawn(threshold, 2, range(23, 60)) == whole[23:]  # a resumed run
    assert drawn(threshold, 1, range(60), seed=4) != whole


def test_an_epoch_of_each_half_is_a_permutation():
    """The halves have different numbers of rows, and so of steps until each row was seen once."""
    halves = divide(LENGTHS, 17)
    steps = drawn(17, 2, range(60))
    for half, rows, size in ((0, halves.long, 12), (1, halves.short, 4)):
        epoch = len(rows) // size
        orders = [[tuple(step[half]) for step in steps[start : start + epoch]] for start in (0, epoch)]
        for order in orders:
            assert max(Counter(i for step in order for i in step).values()) == 1
            assert len({i for step in order for i in step}) == epoch * size > len(rows) - size
        assert orders[0] != orders[1]


@pytest.mark.parametrize("threshold", [None, 300, 4])
def test_without_two_lengths_both_halves_are_drawn_apart_from_all_rows(threshold):
    halves = divide(LENGTHS, threshold)
    assert halves.length_threshold is None and list(halves.long) == list(halves.short) == list(range(101))
    assert str(halves) == "both halves of a batch are drawn, apart, from all 101 rows"
    steps = drawn(threshold, 2, range(8))
    assert any(LENGTHS[i] <= 9 for long, _ in steps for i in long)
    assert any(LENGTHS[i] == 300 for _, short in steps for i in short)
    orders = [list(LengthBatches(halves, 5, 5, 0, 1, seed, range(100))) for seed in (0, 1)]
    assert all(sorted(batch[:5]) != sorted(batch[5:]) for order in orders for batch in order)


def test_too_few_rows_of_a_half():
    halves = divide([3, 9, 9, 9], 5)
    assert str(halves) == "3 rows are longer than 5 tokens, 1 are not"
    with pytest.raises(
        ValueError, match="zo_batch=2 on 2 ranks needs 4 rows, but 3 rows are longer than 5 .* lower zo_"
    ):
        LengthBatches(halves, 2, 1, 0, 2, 0, range(1))
    with pytest.raises(ValueError, match="fo_batch=2 on 1 ranks needs 2 rows, .* or choose another length_threshold"):
        LengthBatches(halves, 1, 2, 0, 1, 0, range(1))
