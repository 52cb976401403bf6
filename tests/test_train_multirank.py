"""The main job on two ranks: the real launcher, resume after a kill in the middle of a save, errors on all ranks."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spawn import TIME_LIMIT, free_port, run_ranks
from tiny import equal_tensors

from ds_memopt.results.record import read_metrics
from ds_memopt.train.loop import pretrain
from ds_memopt.train.options import PretrainOptions

ROOT = Path(__file__).parent.parent
# Nothing but the sizes differs from the defaults.
SIZE = dict(steps=4, seq_length=16, micro_batch=4, accumulation=2, validation_batches=1)
EVERY = dict(logging_interval=1, validation_interval=2, save_interval=2, checkpoint_format="engine")
SPLIT = ("forward_ms", "backward_ms", "optimizer_ms", "communication_ms", "other_ms")
COMPARED = ("step", "tokens", "loss", "validation_loss", "lr", "grad_norm")


def _options(folder: Path, stage: int, **changes) -> PretrainOptions:
    config = str(ROOT / f"ds_configs/zero{stage}_adam_mini.json")
    return PretrainOptions(**{"deepspeed_config": config, "output_dir": str(folder), **SIZE, **EVERY, **changes})


def _launch(folder: Path) -> subprocess.CompletedProcess:
    sizes = [word for name, value in {**SIZE, **EVERY}.items() for word in (f"--{name}", str(value))]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return subprocess.run(
        [*launcher, str(ROOT / "launch/pretrain.py"), "--output_dir", str(folder), *sizes],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )


def _pretrain_quietly(options: PretrainOptions) -> str | None:
    """The message if the run is refused."""
    try:
        pretrain(options)
    except ValueError as error:
        return str(error)
    return None


def _pretrain_all(runs: list[PretrainOptions]) -> list[str | None]:
    torch.set_num_threads(1)
    return [_pretrain_quietly(options) for options in runs]


def _die_in_save_of_step_4(options: PretrainOptions) -> None:
    """Rank 1 leaves half of its optimizer file of step 4 behind."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    save = TorchCheckpointEngine.save

    def save_half(engine, state_dict, path):
        save(engine, state_dict, path)
        if "step4" in path and "zero_pp_rank_1" in path and "optim" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            os._exit(9)

    TorchCheckpointEngine.save = save_half
    pretrain(options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def launched(folders) -> Path:
    """ZeRO-2 by the launcher with default arguments but for the sizes."""
    done = _launch(folders / "launched")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "step 4/4: loss" in done.stdout
    return folders / "launched"


@pytest.fixture(scope="module")
def whole(folders, launched) -> dict[int | str, Path]:
    """Uninterrupted runs under ZeRO-2, that of the launcher, and under ZeRO-3 and others in one process pair."""
    runs = {
        3: _options(folders / "whole3", 3),
        "recomputed": _options(folders / "recomputed", 3, gradient_checkpointing="full", profile=1, save_interval=0),
        "bf16": _options(folders / "bf16", 2, dtype="bf16", data="synthetic", accumulation=1, steps=2, save_interval=0),
    }
    config = json.loads((ROOT / "ds_configs/zero3_mezo.json").read_text())
    config["csv_monitor"] = {"enabled": True, "output_path": str(folders / "monitor"), "job_name": "mezo"}
    (folders / "monitored.json").write_text(json.dumps(config))
    monitored = {"deepspeed_config": str(folders / "monitored.json"), "save_interval": 0}
    runs["MeZO"] = _options(folders / "mezo", 3, accumulation=1, **monitored)
    for refused in run_ranks(_pretrain_all, 2, list(runs.values())):
        assert refused == [None] * len(runs)
    return {2: launched} | {name: Path(options.output_dir) for name, options in runs.items()}


def test_launcher_run_leaves_its_records(launched):
    rows = read_metrics(launched)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == {
        "step", "tokens", "loss", "validation_loss", "lr", "grad_norm", "step_ms", "tokens_per_s",
        "tokens_per_s_per_gpu", "peak_rss_gib", "bytes_sent_per_step", "optimizer_state_bytes_per_parameter", *SPLIT,
        "mfu", "save_stall_s", "held_gib", "sent_by_collective", "sent_by_group",
    }  # fmt: skip
    assert [row["validation_loss"] is None for row in rows] == [True, False, True, False]
    assert rows[0]["loss"] == pytest.approx(5.55, abs=0.1)  # ln 256: every byte equally likely
    assert rows[-1]["validation_loss"] < 5.3
    assert rows[-1]["tokens"] == 4 * 16 * 16
    resolved = json.loads((launched / "resolved_config.json").read_text())
    assert resolved["deepspeed"]["train_batch_size"] == resolved["global_batch"] == 16
    assert resolved["deepspeed"]["optimizer"]["type"] == "AdamMini" and "auto" not in json.dumps(resolved)
    environment = json.loads((launched / "environment.json").read_text())
    assert environment["world_size"] == 2 and "pretrain.py" in environment["command"][1]
    assert 0.1 < environment["process_gib"] < rows[0]["peak_rss_gib"]


def test_every_run_says_where_time_bytes_and_memory_go(launched, whole):
    weights = 4 * 4_852_992 / 1024**3
    for folder in (launched, whole[3], whole["MeZO"]):
        for row in read_metrics(folder):
            assert sum(row[name] for name in SPLIT) == pytest.approx(row["step_ms"])
            assert min(row[name] for name in SPLIT) >= 0 and row["communication_ms"] > 0
            assert row["forward_ms"] > 5 and row["forward_ms"] + row["backward_ms"] > 20
            for parts in (row["sent_by_collective"], row["sent_by_group"]):
                assert sum(parts.values()) == pytest.approx(row["bytes_sent_per_step"], abs=5)  # each is rounded
            assert list(row["sent_by_group"]) == ["0-1"] and row["mfu"] is None
    held = read_metrics(launched)[-1]["held_gib"]
    assert held["weights"] == pytest.approx(weights, rel=0.01)  # and the rotary buffer
    for kind in ("masters", "gradients", "exp_avg"):  # halves, and padding
        assert held[kind] == pytest.approx(weights / 2, rel=0.01), kind
    held = read_metrics(whole["MeZO"])[-1]["held_gib"]
    assert held["weights"] == pytest.approx(weights / 2, rel=0.01) and held["masters"] == held["gradients"] == 0
    for folder, passes in ((launched, "1"), (whole["MeZO"], "0.667")):
        formula = json.loads((folder / "resolved_config.json").read_text())["mfu"]
        assert formula.startswith(
            f"MFU = tokens/s of a GPU x {passes} x (6 N + 12 L H Q T) / peak; N = 4,787,456, L = 6"
        )
        assert formula.endswith("peak of the device: unknown, so MFU is null")


def test_mezo_spends_its_time_in_forward_passes_also_in_backward(whole):
    for row in read_metrics(whole["MeZO"]):
        assert row["forward_ms"] > 4 * row["backward_ms"]


def test_figures_reach_deepspeeds_monitor(folders, whole):
    """A CSV file for each figure: the samples seen, and what metrics.jsonl has."""
    rows = read_metrics(whole["MeZO"])
    for name, values in {
        "step_ms": [row["step_ms"] for row in rows],
        "held_gib_weights": [row["held_gib"]["weights"] for row in rows],
        "validation_loss": [row["validation_loss"] for row in rows if row["validation_loss"] is not None],
    }.items():
        path = folders / "monitor" / "mezo" / f"ds_memopt_{name}.csv"
        written = [line.split(",") for line in path.read_text().splitlines()[1:]]
        assert [float(value) for _, value in written] == pytest.approx(values), name
    assert [int(samples) for samples, _ in written] == [2 * 8, 4 * 8]
    assert not list((folders / "monitor" / "mezo").glob("*mfu*"))  # it is null here


def test_state_and_traffic_are_what_the_formula_says(launched, whole):
    """tiny has 4,852,992 parameters of 4 bytes, a step has two micro-batches, and a ring of 2 sends half of a gather.

    ZeRO-2 all_reduces the gradients of each micro-batch on CPU and gathers the weights once. ZeRO-3 gathers the weights
    and reduce-scatters the gradients in each micro-batch; they fit stage3_max_live_parameters, so backward reuses them.
    """
    weights = 4 * 4_852_992
    zero_2, zero_3 = read_metrics(launched)[-1], read_metrics(whole[3])[-1]
    assert zero_2["bytes_sent_per_step"] == pytest.approx((2 * 1 + 0.5) * weights, rel=0.01)
    assert zero_3["bytes_sent_per_step"] == pytest.approx(2 * (0.5 + 0.5) * weights, rel=0.01)
    for row in (zero_2, zero_3):
        assert 4.0 <= row["optimizer_state_bytes_per_parameter"] < 4.02


@pytest.mark.parametrize("run", [3, "recomputed"])
def test_zero_3_repeats_zero_2(whole, run):
    """The same weights, data order and updates: the losses differ by rounding alone (another seed: by 1e-2)."""
    for two, three in zip(read_metrics(whole[2]), read_metrics(whole[run]), strict=True):
        assert three["loss"] == pytest.approx(two["loss"], abs=2e-5)


def test_a_trace_has_the_step_that_was_asked_for(whole):
    with gzip.open(whole["recomputed"] / "trace.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"] if "name" in event}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#3"}  # counted from 0
    assert {"aten::mm", "c10d::_allgather_base_"} & names


def test_bf16_on_synthetic_data(whole):
    """Random tokens teach nothing: the loss stays near ln 256."""
    resolved = json.loads((whole["bf16"] / "resolved_config.json").read_text())
    assert resolved["dtype"] == "bf16" and resolved["global_batch"] == 8
    assert resolved["deepspeed"]["bf16"] == {"enabled": True}
    for row in read_metrics(whole["bf16"]):
        assert row["loss"] == pytest.approx(5.6, abs=0.2)


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_in_a_save_and_resumed_equals_uninterrupted(folders, whole, stage):
    folder = folders / f"killed{stage}"
    with pytest.raises(RuntimeError, match="rank"):
        run_ranks(_die_in_save_of_step_4, 2, _options(folder, stage))
    assert (folder / "checkpoints/.step4").is_dir()  # it did start to save
    assert (folder / "checkpoints/latest").read_text() == "step2"
    assert read_metrics(folder)[-1]["step"] == 4  # also of a step whose save failed

    assert run_ranks(_pretrain_all, 2, [_options(folder, stage, resume=True)]) == [[None]] * 2
    resumed, uninterrupted = (
        [[row[key] for key in COMPARED] for row in read_metrics(path)] for path in (folder, whole[stage])
    )
    assert resumed == uninterrupted
    files = sorted(path.name for path in (whole[stage] / "checkpoints/step4").glob("*.pt"))
    assert len(files) >= 3
    for name in files:
        ours, theirs = (
            torch.load(path / "checkpoints/step4" / name, weights_only=False) for path in (folder, whole[stage])
        )
        assert equal_tensors(ours, theirs) > 0


def test_bad_checkpoints_are_refused_on_all_ranks(folders, whole):
    """Damage that only one rank would meet must not leave the other waiting in a collective."""
    damaged = {}
    for name in ("truncated", "flipped", "missing", "none", "other"):
        folder = damaged[name] = folders / name
        (folder / "checkpoints/step4").mkdir(parents=True)
        shutil.copy(whole[2] / "checkpoints/latest", folder / "checkpoints")
        for path in (whole[2] / "checkpoints/step4").iterdir():
            shutil.copy(path, folder / "checkpoints/step4")
    file = "checkpoints/step4/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    os.truncate(damaged["truncated"] / file, 1000)
    with (damaged["flipped"] / file).open("r+b") as stream:
        stream.seek(os.path.getsize(damaged["flipped"] / file) // 2)
        stream.write(bytes(8))
    (damaged["missing"] / file).unlink()
    shutil.rmtree(damaged["none"] / "checkpoints/step4")
    (damaged["none"] / "checkpoints/latest").unlink()

    runs = {name: _options(folder, 2, resume=True) for name, folder in damaged.items() if name != "other"}
    runs["other"] = _options(damaged["other"], 2, resume=True, seed=1, lr=2e-3)
    runs["exists"] = _options(whole[2], 2)
    seen = run_ranks(_pretrain_all, 2, list(runs.values()))
    assert seen[0] == seen[1]
    messages = dict(zip(runs, seen[0], strict=True))
    assert f"{file} is missing or damaged (No such file" in messages["missing"]
    for name in ("truncated", "flipped"):
        assert f"{file} is damaged: its SHA-256" in messages[name] and "no other is left" in messages[name]
    assert f"--resume found no run in {damaged['none']}, which has no resolved_config.json" in messages["none"]
    assert "seed was 0, is 1" in messages["other"] and "'lr': 0.002" in messages["other"]
    assert "already holds a run" in messages["exists"] and "--resume" in messages["exists"]
