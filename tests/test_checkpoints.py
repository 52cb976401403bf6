"""Checkpoints of the main job: none is written that is bad, none is loaded that is damaged or runs code."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from checkpoints_ranks import CASES, FULL_DISK, OPTIMIZER_FILE, STEP, Outcome, make_model, run_cases
from spawn import run_ranks

from ds_memopt.results.record import read_metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("checkpoints")
    make_model(place)
    return place


@pytest.fixture(scope="module")
def outcomes(place) -> dict[str, Outcome]:
    """Of all runs, in one process pair; ranks agree on the message, the first prints."""
    first, second = run_ranks(run_cases, 2, place, list(CASES))
    assert {name: one.message for name, one in first.items()} == {name: one.message for name, one in second.items()}
    return first


def latest(folder: Path) -> str:
    return (folder / "checkpoints/latest").read_text()


def final_weights(folder: Path) -> bytes:
    return (folder / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("run", ["zero0", "fsdp2", "master", "state"])
def test_what_is_not_finite_is_not_saved(outcomes, place, run):
    """The loss, which is looked at before the update, is fine. (ZeRO-1 to 3 skip a step whose gradients are not.)"""
    folder, message = place / f"nan {run}", outcomes[f"nan {run}"].message
    assert read_metrics(folder)[-1]["step"] == 4
    named = {"master": "an fp32 master on rank 1", "state": "exp_avg on rank 1"}.get(run, "model.")
    assert message.startswith(f"SharedError: {named}"), message
    assert "holds infinities or NaNs after step 4: no checkpoint is saved" in message
    assert f"the last good one is {folder}/checkpoints/step2" in message
    assert latest(folder) == "step2" and not (folder / "model").exists()
    assert {path.name for path in (folder / "checkpoints").glob("*step*")} == {"step2"}


def test_a_run_goes_on_from_the_last_good_step(outcomes, place):
    assert outcomes["nan zero0 again"].message is None
    assert latest(place / "nan zero0 again") == "step6"


def test_ipsgd_ends_with_the_message_of_the_loss(outcomes, place):
    assert outcomes["nan ipsgd"].message.startswith("RuntimeError: the loss is nan")
    assert read_metrics(place / "nan ipsgd")[-1]["update_kept"] is None


@pytest.mark.parametrize(
    ("run", "whole", "file", "fault"),
    [("mixed", "zero2", OPTIMIZER_FILE, "is damaged: its SHA-256 is not the one in run.json"),
     ("metadata", "fsdp2", ".metadata", "is damaged: its SHA-256 is not the one in run.json"),
     ("gone", "zero2", "", "is damaged: run.json is missing or has no checksums"),
     ("added", "zero2", "mp_rank_01_model_states.pt", "is not listed in run.json")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(outcomes, place, run, whole, file, fault):
    outcome, folder = outcomes[run], place / run
    assert outcome.message is None
    assert f"WARNING: checkpoint {'file ' * bool(file)}{folder / STEP.format(6) / file} {fault}" in outcome.printed
    assert f"resuming from {folder / STEP.format(4)}\n" in outcome.printed
    assert latest(folder) == "step6" and final_weights(folder) == final_weights(place / whole)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_without_a_whole_checkpoint_every_fault_is_told(outcomes, place):
    message = outcomes["all"].message
    assert "step6/mp_rank_00_model_states.pt is damaged: its SHA-256" in message
    assert f"step4/{OPTIMIZER_FILE} is missing or damaged (No such file or directory)" in message
    assert "step2 is damaged: run.json is missing" in message and message.endswith("; no other is left")


def test_resume_takes_a_step(outcomes, place):
    assert f"resuming from {place / 'step 2' / STEP.format(2)}\n" in outcomes["step 2"].printed
    assert final_weights(place / "step 2") == final_weights(place / "zero2")
    assert "--resume 3 found no checkpoint of that step in" in outcomes["step 3"].message
    assert outcomes["step 3"].message.endswith("it has [2, 4, 6]")
    assert outcomes["step 6"].message.endswith("; --resume without a number takes the newest whole one")


def test_a_run_goes_on_among_what_a_killed_one_left(outcomes, place):
    folder, outcome = place / "leftovers", outcomes["leftovers"]
    assert outcome.message is None
    assert f"resuming from {folder / STEP.format(6)}\n" in outcome.printed and latest(folder) == "step6"
    assert f"WARNING: {folder}/metrics.jsonl ends in a torn line of 16 bytes, which is cut" in outcome.printed
    assert read_metrics(folder) == read_metrics(place / "zero2")
    assert {path.name for path in folder.rglob(".*")} == {".notes", ".lock"}


@pytest.mark.parametrize(
    ("run", "file"), [("file", OPTIMIZER_FILE), ("metadata", ".metadata"), ("entry", "__1_0.distcp")]
)
def test_files_that_run_code_are_refused(outcomes, place, run, file):
    folder = place / f"evil {run}"
    message = outcomes[f"evil {run}"].message
    assert message.split(" may run code")[0].endswith(f"{folder / STEP.format(6) / file}")
    assert "it names" in message and ".open. If you trust whoever wrote it, add --trust_checkpoint" in message
    assert not (folder / "created").exists()
    assert latest(folder) == "step6"


def test_a_trusted_file_runs_its_code(outcomes, place):
    assert outcomes["evil file, trusted"].message is None
    assert (place / "evil file, trusted" / "created").exists()


@pytest.fixture(scope="module")
def small_disk(place):
    """File systems with room for one checkpoint, and for all if nothing else takes it."""
    disks = [place / name for name in FULL_DISK]
    if os.geteuid():
        pytest.skip("to mount a small file system needs root")
    mounted = []
    try:
        for disk in disks:
            disk.mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={600 if disk.name == 'small' else 2000}k", "none", disk],
                check=True,
            )
            mounted.append(disk)
        yield
    finally:
        for disk in mounted:
            subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(small_disk, place):
    first, second = run_ranks(run_cases, 2, place, list(FULL_DISK))
    for name in FULL_DISK:
        message, folder = first[name].message, place / name
        assert message == second[name].message
        assert message.startswith(f"SharedError: no space left in {folder}/checkpoints: needs 0.0"), message
        assert latest(folder) == "step2" and not list((folder / "checkpoints").glob(".*"))
    # What is told as needed; measured 0.93 to 0.95 of the files, 1.24 if each rank counted the weights that one writes.
    needs = float(re.search(r"needs (\S+) GiB", first["small"].message)[1]) * 2**30
    written = sum(path.stat().st_size for path in (place / "small" / STEP.format(2)).iterdir())
    print(needs / written)
    assert 0.85 * written < needs <= written
