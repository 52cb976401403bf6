"""The main job with `--replicas`: four ranks that hold the model twice, each copy sharded over two of them (HSDP)."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from spawn import run_ranks
from tiny import distance

from ds_memopt.checkpoint import Index
from ds_memopt.results.record import read_metrics
from ds_memopt.train.fsdp2_job import pretrain_fsdp2
from ds_memopt.train.loop import pretrain
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.presets import build_model, find_model

LLAMA = dict(hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2, vocab_size=256)
SIZE = dict(
    steps=3, seq_length=16, micro_batch=1, accumulation=2, validation_interval=0, logging_interval=1, save_interval=2
)
COPIES = {
    "apart again": "AdamMini 2", "together": "BAdam 1", "engine again": "engine", "engine apart": "engine",
}  # fmt: skip
METHODS = {"AdamMini": {}, "GWT": {"level": 2}, "BAdam": {"switch_every": 1}, "MeZO": {"compiled": False}}


def run_all(place: Path, jobs: dict[str, dict], copies: dict[str, str]) -> dict[str, str]:
    """Runs in folders of their names; copies: which begin as a copy of which, at its step 2. Returns what was printed,
    or the error."""
    told = {}
    for name, options in jobs.items():
        if name in copies and torch.distributed.get_rank() == 0:
            shutil.copytree(place / copies[name], place / name)
            (place / name / "checkpoints/latest").write_text("step2")
        torch.distributed.barrier()
        method, printed = options.pop("method"), io.StringIO()
        engine = pretrain if options.pop("deepspeed", False) else pretrain_fsdp2
        with contextlib.redirect_stdout(printed):
            try:
                engine(PretrainOptions(
                    deepspeed_config=str(place / f"{method}.json"), output_dir=str(place / name), lr=1e-3,
                    model=str(place / "config"), data="synthetic", resume=name in copies, **SIZE, **options,
                ))  # fmt: skip
                told[name] = printed.getvalue()
            except ValueError as error:
                told[name] = str(error)
    return told


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    place = tmp_path_factory.mktemp("replicas")
    transformers.LlamaConfig(**LLAMA, max_position_embeddings=16).save_pretrained(place / "config")
    for method, params in METHODS.items():
        (place / f"{method}.json").write_text(json.dumps({"optimizer": {"type": method, "params": params}}))
    jobs = {f"{method} {replicas}": dict(method=method, replicas=replicas) for method in METHODS for replicas in (1, 2)}
    jobs["apart again"] = dict(method="AdamMini")
    jobs["together"] = dict(method="BAdam", replicas=2)
    jobs["thrice"] = dict(method="AdamMini", replicas=3)
    jobs["ZeRO"] = dict(method="AdamMini", replicas=2, deepspeed=True)
    for name in ("engine", "engine again", "engine apart"):
        replicas = 1 if name == "engine apart" else 2
        jobs[name] = dict(method="AdamMini", replicas=replicas, checkpoint_format="engine")
    return place, run_ranks(run_all, 4, place, jobs, COPIES)[0]


@pytest.mark.parametrize("method", METHODS)
def test_two_copies_are_trained_as_one(runs, method):
    """Relative to the distance moved. Measured: 3e-6 and less; without the sum over copies, 1.0."""
    place, told = runs
    assert "FSDP2 in 2 replicas" in told[f"{method} 2"] and "FSDP2, 4 x cpu" in told[f"{method} 1"]
    one, two = (load_file(place / f"{method} {replicas}/model/model.safetensors") for replicas in (1, 2))
    start = build_model(str(place / "config"), find_model(str(place / "config"))[0], 0, torch.device("cpu"), False)
    moved = distance(one, start.state_dict())
    assert distance(one, two) < 5e-6 * moved
    losses = [[row["loss"] for row in read_metrics(place / f"{method} {replicas}")] for replicas in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)
    sent = [read_metrics(place / f"{method} {replicas}")[-1]["sent_by_group"] for replicas in (1, 2)]
    assert sent[0].keys() == {"0-3"} and "0-1" in sent[1]
    if method == "AdamMini":
        padded = 22_440  # numbers, with the rows that pad
        assert sent[1]["0,2"] == 2 * 4 * padded // 2  # of each of two micro-batches, in fp32


def test_a_copy_is_saved_once_and_goes_on_elsewhere(runs):
    place, told = runs
    once, twice = (Index.read(place / f"AdamMini {replicas}/checkpoints/step2") for replicas in (1, 2))
    assert sum(entry.length for entry in once.entries) == sum(entry.length for entry in twice.entries)
    for name in ("apart again", "together", "engine again"):
        whole = COPIES[name]
        ours, theirs = ([row["loss"] for row in read_metrics(place / one)] for one in (name, whole))
        assert len(ours) == 3 and ours == pytest.approx(theirs, rel=2e-6), name


def test_what_cannot_be_is_refused(runs):
    told = runs[1]
    assert told["thrice"] == "--replicas 3 does not divide the 4 ranks: each copy of the model has as many of them"
    assert "zero_stage was FSDP2 in 2 replicas, is FSDP2" in told["engine apart"]
    assert told["ZeRO"] == "--replicas 2 is FSDP2's (launch/pretrain_fsdp2.py): leave it out"
