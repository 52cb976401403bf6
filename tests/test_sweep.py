"""The sweep over optimizers, stages and micro-batches: real runs on one CPU rank, and what comes of those that fail."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import time
from pathlib import Path

import pytest
from spawn import ROOT, TIME_LIMIT, run_script

from ds_memopt.results.record import read_metrics
from ds_memopt.train import sweep as sweep_module
from ds_memopt.train.sweep import Case, Sweep, describe, ds_config, largest_that_fits, summary


@pytest.mark.parametrize("smallest", [1, 2])
def test_search_finds_the_largest_of_all_limits(smallest):
    for limit in range(70):
        tried = []

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        expected = min(limit, 64) if limit >= smallest else None
        assert largest_that_fits(fits, smallest, 64) == expected
        assert len(tried) == len(set(tried)) <= 12 and max(tried) <= 64


def _sizes(folder: Path) -> list[str]:
    sizes = ["--gpus", "1", "--seq_length", "512", "--warm_up", "1", "--measure", "2", "--memory_limit_gib", "0.55"]
    return ["--output_dir", str(folder), *sizes, "--timeout", str(TIME_LIMIT)]


def _throughput(arguments: list[str], monkeypatch):
    """launch/throughput.py's main with these arguments, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # main's would stay in this process
    return runpy.run_path(str(ROOT / "launch/throughput.py"))["main"]


def _execute_without_launcher(command: list[str], log: Path, timeout: float) -> tuple[str, str | None]:
    """What the launcher in a case's command would start, in a forked process."""
    done = run_script(*command[command.index(str(ROOT / "launch/pretrain.py")) :], ranks=1)
    log.write_text(done.stdout + done.stderr)
    return ("ok", None) if done.returncode == 0 else sweep_module._why(sweep_module._lines(log), done.returncode)


def _rows(folder: Path) -> dict[str, dict]:
    return {row["case"]: row for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, str]:
    """Cases that are ok, beyond the memory limit, and one whose optimizer refuses its options; and what was printed.
    The first is started as all are outside this test."""
    folder = tmp_path_factory.mktemp("sweep")
    wrong = json.loads((ROOT / "ds_configs/zero3_gwt.json").read_text())
    wrong["optimizer"]["params"]["level"] = 9
    (folder / "wrong.json").write_text(json.dumps(wrong))
    optimizers = ["--optimizer", "AdamMini", str(folder / "wrong.json"), "--stage", "3"]
    arguments = [*_sizes(folder / "out"), *optimizers, "--micro_batch", "auto", "--largest_micro_batch", "8"]
    execute = sweep_module._execute

    def execute_first(*case):
        patch.setattr(sweep_module, "_execute", _execute_without_launcher)
        return execute(*case)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sweep_module, "_execute", execute_first)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert _throughput(arguments, patch)() == 0
    return folder, printed.getvalue()


def test_sweep_keeps_a_line_for_every_case(swept):
    folder, printed = swept
    rows = _rows(folder / "out")
    by_status = {status: [row for row in rows.values() if row["status"] == status] for status in ("ok", "failed")}
    fitting = [row["micro_batch"] for row in by_status["ok"]]
    too_large = [row["micro_batch"] for row in rows.values() if row["status"] == "out of memory"]
    assert 1 in fitting and min(too_large) == max(fitting) + 1
    for row in by_status["ok"]:
        run = folder / "out" / row["folder"]
        measured = [one["tokens_per_s"] for one in read_metrics(run)[1:]]
        assert row["tokens_per_s_range"] == [min(measured), max(measured)]
        assert min(measured) <= row["tokens_per_s"] <= max(measured)
        assert row["optimizer_state_bytes_per_parameter"] == pytest.approx(4.01, abs=0.01)
    for row in rows.values():
        assert row["command"][1:3] == ["--num_gpus", "1"] and row["seconds"] > 0.1
        if row["status"] == "out of memory":
            assert "can't allocate memory" in row["reason"]
    assert [row["case"] for row in by_status["failed"]] == ["wrong-zero3-batch1"]  # it ends the search
    assert "level=9 is out of range" in by_status["failed"][0]["reason"]
    assert "AdamMini at ZeRO-3: " in printed and "ds-memopt report" in printed


def test_resumed_sweep_runs_only_what_failed(swept, monkeypatch):
    folder, _ = swept
    before = _rows(folder / "out")
    started = []

    def start(command, log, timeout):
        started.append(command)
        return "failed", "again"

    monkeypatch.setattr(sweep_module, "_execute", start)
    optimizers = ["--optimizer", "AdamMini", str(folder / "wrong.json"), "--stage", "3"]
    arguments = [*_sizes(folder / "out"), *optimizers, "--resume", "--largest_micro_batch", "8"]
    assert _throughput(arguments, monkeypatch)() == 0
    after = _rows(folder / "out")
    assert {name for name in after if after[name] != before.get(name)} == {"wrong-zero3-batch1"}
    ((*words,),) = started
    assert str(folder / "out/wrong-zero3-batch1/ds_config.json") in words
    assert after["wrong-zero3-batch1"]["reason"] == "again"


def test_a_sweep_varies_options(tmp_path, monkeypatch):
    commands = {}

    def start(command, log, timeout):
        commands[log.parent.name] = " ".join(command)
        return "failed", "not begun"

    monkeypatch.setattr(sweep_module, "_execute", start)
    arguments = ["--output_dir", str(tmp_path / "out"), "--optimizer", "AdamW", "--micro_batch", "4"]
    varied = ["--vary", "attention=sdpa,eager", "compile=,inductor"]
    assert _throughput([*arguments, *varied, "--loss_chunks", "8"], monkeypatch)() == 1
    assert list(commands) == [
        "AdamW-zero2-batch4-attention-sdpa", "AdamW-zero2-batch4-attention-sdpa-compile-inductor",
        "AdamW-zero2-batch4-attention-eager", "AdamW-zero2-batch4-attention-eager-compile-inductor",
    ]  # fmt: skip
    ends = [command.partition("--loss_chunks 8 ")[2] for command in commands.values()]
    assert [end.partition("--attention")[2] for end in ends] == [
        " sdpa", " sdpa --compile inductor", " eager", " eager --compile inductor"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "AdamMini", "Adamini"], "optimizer type 'Adamini' is unknown; known are AdamMini, "),
        (["--optimizer", "GWT", "a/GWT.json"], "--optimizer names GWT twice, and cases are named after it"),
        (["--micro_batch", "2", "auto"], '--micro_batch auto is neither a size of at least 1 nor, alone, "auto"'),
        (["--micro_batch", "0"], "--micro_batch 0 is neither a size of at least 1"),
        (["--warm_up", "0"], "--warm_up 0 is out of range: it must be more than 0"),
        (["--gpus", "0"], "--gpus 0 is out of range: it must be more than 0"),
        (["--memory_limit_gib", "-1"], "--memory_limit_gib -1.0 is out of range: it must be more than 0"),
        (["--model", "llama-8b"], "model 'llama-8b' is neither a preset nor a local folder"),
        (["--vary", "atention=eager"], "--vary atention=eager is none of attention, gradient_checkpointing, "),
        (["--vary", "attention=eager,flash"], "--vary attention=eager,flash: argument --attention: invalid choice"),
        (["--optimizer", "nowhere.json"], "cannot read the DeepSpeed config nowhere.json: No such file"),
    ],
)
def test_user_errors_come_before_any_case(arguments, message, tmp_path, monkeypatch):
    main = _throughput(["--output_dir", str(tmp_path / "out"), *arguments], monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert message in str(stopped.value) and not (tmp_path / "out").exists()


def test_a_sweep_is_continued_with_its_own_settings_only(tmp_path):
    def again(settings: dict, resume: bool) -> Sweep:
        return Sweep(tmp_path / "out", settings, lambda *_: [], 1, resume, print)

    again({"gpus": 1, "seq_length": 64}, False)
    with pytest.raises(ValueError, match="out already holds a sweep: continue it with --resume"):
        again({"gpus": 1, "seq_length": 64}, False)
    with pytest.raises(ValueError, match="--resume needs the settings of the sweep in .*out: seq_length was 64, is 65"):
        again({"gpus": 1, "seq_length": 65}, True)
    again({"gpus": 1, "seq_length": 64}, True)


def test_a_case_that_hangs_is_killed_with_all_its_processes(tmp_path):
    sleep = "import time; time.sleep(1234.5)"
    hang = f"print('begun', flush=True); import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    sweep = Sweep(tmp_path / "out", {"gpus": 1}, lambda *_: [sys.executable, "-c", hang], 2, False, lambda line: None)
    row = sweep.run(Case("AdamW", 0, 1))
    assert (row["status"], row["reason"]) == ("timeout", "not finished after 2 s; its last line: begun")
    time.sleep(0.2)
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"1234.5" in command for command in running)
    assert describe(row) == f"AdamW-zero0-batch1: timeout after {row['seconds']:.0f} s: {row['reason']}"


WHOLE = {"case": "a", "status": "ok", "optimizer": "AdamW", "zero_stage": 2, "micro_batch": 1}


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "sweep.json").write_text('{"gpus": 1}')
    (tmp_path / "results.jsonl").write_text(json.dumps(WHOLE) + '\n{"case"')
    with pytest.raises(ValueError, match=r"results.jsonl, line 2, is damaged: .*; remove the line"):
        Sweep(tmp_path, {"gpus": 1}, lambda *_: [], 1, True, print)


def test_config_of_a_case_has_the_optimizer_at_the_stage():
    config = ds_config("Addax", 3, ROOT / "ds_configs")
    assert config["zero_optimization"]["stage"] == 3
    assert config["optimizer"] == {
        "type": "Addax",
        "params": {"lr": "auto", "weight_decay": "auto", "length_threshold": None},
    }
    config = ds_config(str(ROOT / "ds_configs/zero2_gwt_level3.json"), 1, ROOT / "ds_configs")
    assert config["optimizer"]["params"]["level"] == 3 and config["zero_optimization"]["stage"] == 1


def test_summary_compares_with_the_fastest_adamw():
    rows = [("AdamW", 2, 1, 100.0), ("AdamW", 3, 2, 120.0), ("AdamMini", 2, 1, 110.0), ("AdamMini", 2, 4, 180.0)]
    keys = ("optimizer", "zero_stage", "micro_batch", "tokens_per_s")
    results = {str(row): dict(zip(keys, row, strict=True), status="ok") for row in rows}
    results["oom"] = {"optimizer": "AdamW", "zero_stage": 2, "micro_batch": 2, "status": "out of memory"}
    results["compiled"] = results[str(rows[2])] | {"options": "--compile inductor", "tokens_per_s": 130.0}
    assert summary(results).splitlines() == [
        "AdamW at ZeRO-2: 100 tokens/s with micro-batches of 1, 0.83 x the fastest AdamW",
        "AdamW at ZeRO-3: 120 tokens/s with micro-batches of 2, 1.00 x the fastest AdamW",
        "AdamMini at ZeRO-2: 180 tokens/s with micro-batches of 4, 1.50 x the fastest AdamW",
        "AdamMini --compile inductor at ZeRO-2: 130 tokens/s with micro-batches of 1, 1.08 x the fastest AdamW",
    ]
