"""What every method must have and do: it enters this table by being registered.

Exactness at every placement, resuming, state by name, bytes against the plan, refusal of bad hyper-parameters (see also
test_hyper_parameters.py), a row of support, a ds_config, a page and tests of its formula.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from every_method_ranks import (
    PLACEMENTS,
    RANKS,
    STEPS,
    configs_of,
    file_name,
    hyper_of,
    plain_step,
    rows_cut_by_zero2,
    train_alone,
    train_everywhere,
)
from exactness_ranks import groups
from spawn import run_ranks
from tiny import batches, distance, equal, full_parameters, llama

from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.base.named_state import StatePart
from ds_memopt.support import FEATURES, SUPPORT

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "ds_memopt/optimizers/README.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict]:
    """What each of two ranks found, by method."""
    return run_ranks(train_everywhere, RANKS, list(METHODS), tmp_path_factory.mktemp("checkpoints"), timeout_s=1000)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    return {word: train_alone(word) for word in METHODS}


def moved(weights: dict[str, torch.Tensor]) -> float:
    return distance(weights, full_parameters(llama()))


def tolerance(word: str) -> float:
    """Of the distance that the weights move. Measured: up to 2.8e-6, and 2e-4 where g is the small difference of two
    losses. A rank that takes what it holds of a block for the whole is off by more than 1e-3, see below."""
    return 1e-3 if METHODS[word].uses_losses else 1e-5


@pytest.mark.parametrize("word", METHODS)
def test_every_placement_gives_the_weights_of_one_process(word, runs, alone):
    assert len(rows_cut_by_zero2()) == 2
    assert set(runs[0][word]["weights"]) == set(PLACEMENTS)
    for placement, weights in runs[0][word]["weights"].items():
        assert distance(weights, alone[word]) < tolerance(word) * moved(alone[word]), placement


@pytest.mark.parametrize("word", METHODS)
def test_open_seams_are_seen(word, runs, alone):
    """What ranks must sum changes the result; what has nothing to sum stays as it is."""
    sums, weights = runs[0][word]["seams left open"]
    if sums:
        assert distance(weights, alone[word]) > 1e-3 * moved(alone[word])
    else:
        assert equal(weights, runs[0][word]["weights"]["zero2"])


@pytest.mark.parametrize("word", METHODS)
def test_a_resumed_run_is_the_run_itself(word, runs):
    for placement, weights in runs[0][word]["resumed"].items():
        assert equal(weights, runs[0][word]["weights"][placement]), placement


@pytest.mark.parametrize("word", METHODS)
def test_a_rank_holds_the_state_that_is_planned(word, runs):
    for rank in range(RANKS):
        for placement, (held, planned) in runs[rank][word]["states"].items():
            assert held == planned, (placement, rank)


@pytest.mark.parametrize("word", METHODS)
def test_state_by_name_goes_from_two_ranks_to_one(word, runs, alone):
    """One more step in one process, from what two ranks handed out."""
    *_, batch = batches(STEPS + 1)
    expected = train_alone(word, steps=STEPS + 1)
    for placement in ("zero0", "zero2", "zero3"):
        model = llama()
        model.load_state_dict(runs[0][word]["weights"][placement])
        optimizer = METHODS[word].from_model(model, groups(model), **hyper_of(word))
        parts = [StatePart(*part) for run in runs for part in run[word]["named"][placement]]
        optimizer.load_named_state(parts, runs[0][word]["progress"][placement])
        plain_step(optimizer, model, batch, RANKS)
        assert distance(full_parameters(model), expected) < tolerance(word) * moved(alone[word]), placement


@pytest.mark.parametrize("word", METHODS)
def test_the_state_of_another_method_is_refused(word, runs):
    model = llama()
    optimizer = METHODS[word].from_model(model, groups(model), **hyper_of(word))
    for other in METHODS.keys() - {word}:
        parts = [StatePart(*part) for run in runs for part in run[other]["named"]["zero2"]]
        with pytest.raises(ValueError, match=f"state is of {other}.*needs {word}"):
            optimizer.load_named_state(parts, runs[0][other]["progress"]["zero2"])


@pytest.mark.parametrize("word", METHODS)
def test_a_wrong_hyper_parameter_is_named(word):
    with pytest.raises(ValueError, match=f"'learning_rate' is no hyper-parameter of {word}"):
        METHODS[word].from_model(llama(), learning_rate=1e-3)
    for name in METHODS[word].hyper_parameters().of_groups():
        with pytest.raises(ValueError, match=f"^{name}=.* is out of range: it must be "):
            METHODS[word].from_model(llama(), **{name: math.nan})


@pytest.mark.parametrize("word", METHODS)
def test_support_is_stated(word):
    assert word in SUPPORT, f"ds_memopt/support.py has no row for {word}"
    assert set(SUPPORT[word]) == set(FEATURES)


@pytest.mark.parametrize("word", METHODS)
def test_there_are_configs(word):
    for stage in (2, 3):
        name = f"zero{stage}_{file_name(word)}"
        assert name in configs_of(word), f"ds_configs/{name}.json, of type {word}, is missing"


@pytest.mark.parametrize("word", METHODS)
def test_there_is_a_page_with_all_hyper_parameters(word):
    found = re.search(rf"^## {word}\b.*?(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{PAGE.relative_to(ROOT)} has no section '## {word}'"
    assert METHODS[word].hyper_parameters.table() in found[0], f"ds-memopt methods {word} --markdown prints it"
    assert "arXiv" in found[0], f"the section of {word} names no source"


@pytest.mark.parametrize("word", METHODS)
def test_its_formula_has_tests(word):
    assert (ROOT / f"tests/test_{file_name(word)}.py").exists(), f"tests/test_{file_name(word)}.py is missing"
