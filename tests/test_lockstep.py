"""MeZO at ZeRO-3 gathers each layer once for both signs, and a trajectory is the run."""

from __future__ import annotations

import pytest
import torch
from lockstep_ranks import WITH_ADDAX, everything, models, trajectories
from spawn import run_ranks
from tiny import distance, full_parameters

from ds_memopt.cli import main

FAMILIES = list(models())


@pytest.fixture(scope="module")
def results():
    return run_ranks(everything, 2)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_lockstep_moves_the_weights_bit_for_bit_as_two_passes_do(results, family):
    for probes in (1, 2) if family == "Llama" else (1,):
        together, apart = results[family, probes, True], results[family, probes, False]
        assert together["lockstep"] and not apart["lockstep"]
        assert distance(together["weights"], apart["weights"]) == 0
        assert together["losses"] == apart["losses"]
        torch.manual_seed(0)
        assert distance(together["weights"], full_parameters(models()[family]())) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_lockstep_gathers_the_weights_once(results, family):
    """Measured: 0.50 of two passes, and a third of AdamW's gathers for forward and backward and its reduce-scatter."""
    together, apart = results[family, 1, True]["sent"], results[family, 1, False]["sent"]
    adamw = results[family, "AdamW"]["sent"]
    print(family, together / apart, together / adamw)
    assert together <= 0.55 * apart and together <= 0.36 * adamw


@pytest.mark.parametrize("family", WITH_ADDAX)
def test_both_halves_of_addax_run_through_a_layer_in_turn(results, family):
    """With the bits of one half after the other, dropout included. Measured: 0.95 to 0.98 of what an AdamW step sends,
    and 0.60 to 0.63 of what halves and signs one after the other do."""
    together, apart = results[family, "Addax", True], results[family, "Addax", False]
    adamw = results[family, "AdamW"]["sent"]
    print(family, together["sent"] / apart["sent"], together["sent"] / adamw)
    assert together["lockstep"] and not apart["lockstep"]
    assert distance(together["weights"], apart["weights"]) == 0
    assert together["sent"] <= adamw + 1024 and apart["sent"] > 1.5 * adamw


def test_the_callers_autocast_holds_in_both_halves(results):
    together, apart = (results["autocast", lockstep]["weights"] for lockstep in (True, False))
    assert distance(together, apart) == 0
    assert distance(apart, results["Llama", "Addax", False]["weights"]) > 1e-4


def test_an_exception_in_either_half_ends_both_and_changes_nothing(results):
    interrupted = results["Llama", "Addax", "interrupted"]
    assert interrupted["raised"] == [True, False]
    assert distance(interrupted["weights"], results["Llama", "Addax", True]["weights"]) == 0


def test_a_model_that_mixes_rows_falls_back_to_two_passes(results):
    together, apart = results["mixed", 1, True], results["mixed", 1, False]
    assert not together["lockstep"]
    assert distance(together["weights"], apart["weights"]) == 0


def test_replay_rebuilds_the_weights_of_any_stage(tmp_path, capsys):
    """Two ranks in bf16, with schedule, decay and a resume; the command on one process gives the same bits."""
    (ends, refusals), (_, on_the_second_rank) = run_ranks(trajectories, 2, tmp_path)
    for stage, weights in ends.items():
        paths = [str(tmp_path / f"{name}{stage}") for name in ("base", "steps", "rebuilt")]
        paths[0] += ".bin"
        assert main(["replay", *paths]) == 0 and "4 steps applied" in capsys.readouterr().out
        rebuilt = torch.load(tmp_path / f"rebuilt{stage}", weights_only=True)
        assert all(torch.equal(rebuilt[name].float(), weight) for name, weight in weights.items()), stage

    def refused(base, steps) -> str:
        out = tmp_path / "none"
        assert main(["replay", str(base), str(steps), str(out)]) == 2
        assert not out.exists() and not list(tmp_path.glob(".none*"))
        return capsys.readouterr().err

    assert "is not what the run began with" in refused(tmp_path / "rebuilt2", tmp_path / "steps2")
    cut = tmp_path / "cut"
    cut.write_bytes((tmp_path / "steps2").read_bytes()[:-5])
    assert "is cut: after 3 whole records" in refused(tmp_path / "base2.bin", cut)
    assert "is no trajectory" in refused(tmp_path / "base2.bin", tmp_path / "base2.bin")

    # What only the first rank finds out ends all ranks, with the same words.
    assert refusals == on_the_second_rank
    existing = f"at the first step: {tmp_path / 'steps2'} exists. To continue its run pass resume_after"
    assert refusals["steps2"].startswith(existing)
    lost = f"while it is built: trajectory='{tmp_path / 'nowhere/steps'}' cannot be written: No such file or directory."
    assert refusals["nowhere/steps"].startswith(lost)
