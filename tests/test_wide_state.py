"""A state of several numbers per block: exact under any placement, and sliced anew for another number of ranks."""

from __future__ import annotations

import pytest
from spawn import run_ranks
from tiny import batches, distance, full_parameters, llama, train_plain
from wide_state_ranks import AFTER, BEFORE, FAST, RowMoments, on_ranks


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_ranks, 2)


@pytest.fixture(scope="module")
def alone():
    model = llama()
    train_plain(model, RowMoments.from_model(model, model.parameters(), **FAST), batches(BEFORE + AFTER))
    return full_parameters(model)


def worst_row(ours: dict, alone: dict) -> float:
    """The largest distance of a row, in the distance that it moved. A rank border cuts few rows: of all, it is lost."""
    start, errors = full_parameters(llama()), []
    for name, whole in alone.items():
        moved = (whole - start[name]).view(-1, whole.shape[-1]).norm(dim=1)
        errors.append(((ours[name] - whole).view(-1, whole.shape[-1]).norm(dim=1) / moved.clamp(min=1e-3)).max())
    return float(max(errors))


def test_two_ranks_do_as_one_process(ranks, alone):
    """Limit 1e-4 of the distance that a row moved; measured 1.3e-5, and 2.8e-2 with the seams left open."""
    error = {placement: worst_row(result[1], alone) for placement, result in ranks[0].items()}
    print(error)
    assert ranks[0]["zero2"][4] > 0
    assert max(error["zero2"], error["fsdp2"]) <= 1e-4
    assert error["zero2, seams left open"] > 1e-2


@pytest.mark.parametrize("placement", ["zero2", "fsdp2"])
def test_one_process_goes_on_with_the_state_of_two_ranks(ranks, alone, placement):
    """Limit 1e-5 of the distance moved; measured 2e-6, 0.44 without the state."""
    weights, _, _, progress, _ = ranks[0][placement]
    parts = [part for rank in ranks for part in rank[placement][2]]
    assert max(part.stop for part in parts if part.name == "lm_head.weight" and part.key == "sums") == 3 * 101
    moved = distance(alone, full_parameters(llama()))
    errors = []
    for keep_state in (True, False):
        model = llama()
        model.load_state_dict(weights)
        optimizer = RowMoments.from_model(model, model.parameters(), **FAST)
        if keep_state:
            optimizer.load_named_state(parts, progress)
        train_plain(model, optimizer, list(batches(BEFORE + AFTER))[BEFORE:])
        errors.append(distance(full_parameters(model), alone) / moved)
    print(errors)
    assert errors[0] <= 1e-5 and errors[1] > 1e-1
    with pytest.raises(ValueError, match="optimizer state is of GWT"):
        optimizer.load_named_state(parts, progress | {"ds_memopt_state": "GWT, level 2"})
