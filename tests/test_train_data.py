"""What the main job trains on and what it trains: corpora, order of the batches, model presets."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from ds_memopt.train import presets
from ds_memopt.train.data import corpus, order
from ds_memopt.train.data.sequences import SyntheticSequences

# --- data ---


def test_stdlib_is_split_by_file():
    root = Path(sysconfig.get_path("stdlib"))
    names = corpus.stdlib_files(root)
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not any({"test", "site-packages", "tests"} & set(name.split("/")[:-1]) for name in names)
    held_out = [name for name in names if corpus.is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.08

    loaded = corpus.load_corpus("stdlib", None, 64, vocab_size=256)
    halves = (loaded.train, loaded.validation)
    texts = [torch.cat([half[i] for i in range(len(half))]).to(torch.uint8).numpy().tobytes() for half in halves]
    for name in held_out[:5] + ["argparse.py"]:
        marker = (root / name).read_bytes()[200:1500]
        if marker:
            assert [marker in text for text in texts] == [not corpus.is_held_out(name), corpus.is_held_out(name)]
    assert abs(sum(map(len, texts)) - sum((root / name).stat().st_size + 1 for name in names)) < 2 * 64


def _indices(length, micro, accumulation, world, steps, seed=3):
    """Per step, the indices that all ranks together consume."""
    per_rank = [
        list(order.StepBatches(range(length), micro, accumulation, rank, world, seed, steps)) for rank in range(world)
    ]
    return [
        sorted(i for batches in per_rank for batch in batches[s * accumulation : (s + 1) * accumulation] for i in batch)
        for s in range(len(steps))
    ]


def test_data_order_depends_on_the_global_batch_alone():
    whole = _indices(103, 8, 1, 1, range(40))  # 12 steps an epoch: 7 sequences stay out, 3.3 epochs
    assert all(len(set(step)) == 8 for step in whole)
    for micro, accumulation, world in [(4, 1, 2), (2, 2, 2), (1, 2, 4), (2, 4, 1)]:
        assert _indices(103, micro, accumulation, world, range(40)) == whole
    assert _indices(103, 2, 2, 2, range(17, 40)) == whole[17:]  # a resumed run
    assert _indices(103, 8, 1, 1, range(40), seed=4) != whole


def test_an_epoch_visits_each_sequence_once_in_a_new_order():
    steps = _indices(96, 8, 1, 1, range(24))
    first, second = steps[:12], steps[12:]
    assert sorted(i for step in first for i in step) == sorted(i for step in second for i in step) == list(range(96))
    assert first != second


def test_too_little_data_for_one_step():
    with pytest.raises(ValueError, match=r"7 sequences, less than one global batch of 8 \(2 x 2 accumulated x 2"):
        order.StepBatches(range(7), 2, 2, 0, 2, 0, range(1))


def test_validation_covers_the_same_sequences_on_any_number_of_ranks():
    held_out = SyntheticSequences(23, 8, 50, seed=1)

    def rows(world):
        batches = [corpus.validation_batches(held_out, 10, 3, rank, world) for rank in range(world)]
        assert len({len(one) for one in batches}) == 1  # ZeRO-3 gathers on all ranks or hangs
        valid = [
            row for one in batches for _, labels in one for row in labels.tolist() if row[0] != corpus.IGNORED_LABEL
        ]
        return sorted(valid)

    assert len(rows(1)) == 10
    assert rows(1) == rows(2) == rows(4) == sorted(held_out[i * 23 // 10].tolist() for i in range(10))
    assert len(rows(1)) == 10 and len(corpus.validation_batches(held_out, 1000, 3, 0, 1)) == 8  # no more than there are


# --- models ---


def _small_llama() -> transformers.LlamaConfig:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    return transformers.LlamaConfig(**sizes)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tiny", 4.85), ("llama-39m", 38.7), ("llama-67m", 66.9), ("llama-102m", 101.9), ("llama-162m", 162.4),
     ("llama-271m", 271.1), ("llama-1b", 1056), ("llama2-7b", 6738), ("llama2-13b", 13016), ("llama3-8b", 8030)],
)  # fmt: skip
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(presets.find_model(name)[0])
    assert presets.count_parameters(model) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_recipes_of_the_paper_see_the_published_tokens():
    published = {"39m": 1.02, "67m": 1.76, "102m": 2.67, "162m": 4.25, "271m": 7.10, "1b": 26.21}
    for size, billions in published.items():
        recipe = presets.find_model(f"llama-{size}")[1]
        assert recipe.steps * recipe.global_batch * recipe.seq_length / 1e9 == pytest.approx(billions, rel=5e-3)


def test_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.rand(seed + 1)  # whatever was drawn before does not matter
        model = presets.build_model("none", _small_llama(), seed, torch.device("cpu"), partitioned=False)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert 0.015 < weights(0).std() < 0.25 and weights(0).isfinite().all()


def test_weights_that_nothing_fills_are_refused():
    """transformers fills those of this family in the constructor alone, of which the numbers are not the seed's."""
    config = transformers.OpenAIGPTConfig(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    with presets._EmptyIsNaN():
        assert torch.empty(1000).isnan().all() and not torch.ones(1000).isnan().any()
    message = "OpenAIGPTLMHeadModel gives transformer.h.0.attn.c_attn.weight no random value of its own: name a folder"
    for _ in range(8):  # memory that was used before holds NaNs by chance, but not always
        [torch.zeros(8, 24) for _ in range(50)]
        with pytest.raises(ValueError, match=message):
            presets.build_model("none", config, 0, torch.device("cpu"), partitioned=False)


def test_only_matrices_decay():
    model = transformers.LlamaForCausalLM(_small_llama())
    decay, rest = presets.parameter_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decay["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert "weight_decay" not in presets.parameter_groups(model, None)[0]


def test_split_batch():
    recipe = replace(presets.find_model("tiny")[1], global_batch=16, micro_batch=8)
    assert presets.split_batch(recipe, None, None, 1) == (8, 2)
    assert presets.split_batch(recipe, None, None, 2) == (8, 1)
    assert presets.split_batch(recipe, None, None, 3) == (6, 1)  # 16 is rounded up to 18
    assert presets.split_batch(recipe, 2, None, 2) == (2, 4)
    assert presets.split_batch(recipe, None, 4, 2) == (2, 4)
    assert presets.split_batch(recipe, 5, 7, 2) == (5, 7)
