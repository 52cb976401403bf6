"""Batches of long and short rows: what each step draws, on how many ranks and from where it starts, and in the job."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from spawn import run_ranks
from test_finetune import ROOT, addax, llama, options, run_all, sums, write

from ds_memopt.train.data.length_batches import LengthBatches, divide
from ds_memopt.train.options import FinetuneOptions, PretrainOptions
from ds_memopt.train.presets import find_trained
from ds_memopt.train.ranks import Ranks
from ds_memopt.train.settings import make_settings

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


# --- in the job ---


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """Data with rows of 9 to 33 tokens, and a model."""
    place = tmp_path_factory.mktemp("length_batches")
    write(place / "train.jsonl", sums(25, choices=False))
    write(place / "valid.jsonl", sums(4, choices=False))
    transformers.LlamaForCausalLM(llama()).save_pretrained(place / "model")
    return place


def run_of(job: Path, name: str, **changes) -> FinetuneOptions:
    return options(job / name, job / "model", job, **dict(steps=1, micro_batch=None, accumulation=None) | changes)


def threshold(run: FinetuneOptions) -> int | None:
    facts = json.loads((Path(run.output_dir) / "resolved_config.json").read_text())
    return facts["optimizer"]["params"]["length_threshold"]


def test_the_threshold_is_measured_or_dropped(job):
    """A bucket of gradients takes 16 MiB, and a token of this model 4 KiB. Nothing is validated before training."""
    auto = dict(length_threshold="auto", memory_gib=16.16 / 1024)
    values = {"auto": auto, "auto3": auto | dict(stage=3), "long": dict(length_threshold=33),
              "short": dict(length_threshold=8), "none": dict(length_threshold=None)}  # fmt: skip
    blind = dict(validation_data=None, validation_interval=0)
    runs = [run_of(job, name, deepspeed_config=addax(job, **params), **blind) for name, params in values.items()]
    assert run_ranks(run_all, 2, runs) == [[None] * len(runs)] * 2
    *measured, a, b, c = map(threshold, runs)
    assert all(9 < tokens < 33 for tokens in measured) and (a, b, c) == (None, None, None)


def test_sizes_of_the_halves(job):
    """Those of the config, or half of the 16 rows of the recipe each."""
    alone = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    given = dict(deepspeed_config=str(ROOT / "ds_configs/zero2_addax.json"))
    chosen = dict(deepspeed_config=str(ROOT / "ds_configs/zero2_adamw.json"), optimizer="Addax")
    for changes, sizes in ((given, (6, 4)), (chosen, (8, 8)), (chosen | dict(micro_batch=5), (2, 3))):
        settled = make_settings(run_of(job, "unused", **changes), alone, find_trained)
        params = settled.config["optimizer"]["params"]
        assert (params["zo_batch"], params["fo_batch"]) == sizes
        assert (settled.micro_batch, settled.accumulation) == (sum(sizes), 1)


def test_what_addax_cannot_do_is_refused(job):
    adamw = str(ROOT / "ds_configs/zero2_adamw.json")
    cases = [
        ({}, dict(accumulation=2), "gradient_accumulation_steps is 1 in the DeepSpeed config but 2"),
        ({}, dict(micro_batch=4), "a micro-batch of 4 sequences per rank cannot be zo_batch=2 long and fo_batch=1"),
        ({"zo_batch": None, "fo_batch": 3}, dict(micro_batch=3), "cannot be zo_batch=0 long and fo_batch=3 short"),
        ({"zo_batch": "2"}, {}, "zo_batch='2' is out of range: it must be an integer >= 1"),
        ({"length_threshold": "auto"}, {}, "without a GPU give memory_gib, or a number of tokens"),
        ({"length_threshold": 32}, {}, "zo_batch=2 on 1 ranks needs 2 rows, but 1 rows are longer than 32 tokens"),
        ({}, dict(optimizer="IPSGD"), "--optimizer IPSGD cannot replace Addax"),
        ({}, dict(deepspeed_config=adamw, optimizer="IPSGD", accumulation=2), "but IPSGD holds no gradients"),
    ]
    runs: list = [
        run_of(job, "refused", **dict(deepspeed_config=addax(job, **params)) | changes) for params, changes, _ in cases
    ]
    runs.append(PretrainOptions(deepspeed_config=addax(job), output_dir=str(job / "refused"), steps=1))
    (messages,) = run_ranks(run_all, 1, runs)
    for message, part in zip(messages, [part for *_, part in cases] + ["pre-training are equally long"], strict=True):
        assert part in message
