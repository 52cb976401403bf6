"""The command line of the jobs is made from their options, and answers without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ds_memopt.train.options import FinetuneOptions, PretrainOptions

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "numpy", "deepspeed", "transformers"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
script, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def parse(monkeypatch, options: type, *words: str):
    monkeypatch.syspath_prepend(str(LAUNCH))
    from arguments import parse_options

    monkeypatch.setattr(sys, "argv", ["job", *words])
    return parse_options(options, "a job", "zero2_adamw.json")


def test_nothing_given_is_every_default(monkeypatch):
    config = str(LAUNCH.parent / "ds_configs" / "zero2_adamw.json")
    assert parse(monkeypatch, PretrainOptions) == PretrainOptions(deepspeed_config=config)


def test_each_type_is_read(monkeypatch):
    words = "--betas 0.8 0.9 --dtype bf16 --gradient_checkpointing --steps 7 --lr 1e-3 --local_rank 1 --deepspeed"
    options = parse(monkeypatch, PretrainOptions, *words.split(), "--resume")
    assert tuple(options.betas) == (0.8, 0.9) and options.dtype == "bf16" and options.gradient_checkpointing == "full"
    assert (options.steps, options.lr, options.resume) == (7, 1e-3, True)
    assert parse(monkeypatch, PretrainOptions, "--resume", "4").resume == 4
    words = "--gradient_checkpointing selective --compile --profile 5"
    options = parse(monkeypatch, PretrainOptions, *words.split())
    assert (options.gradient_checkpointing, options.compile, options.profile) == ("selective", "inductor", 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model m", "the following arguments are required: --data"),
        ("--model m --data d --dtype fp16", "argument --dtype: invalid choice: 'fp16'"),
        ("--model m --data d --steps x", "argument --steps: invalid int value: 'x'"),
    ],
)
def test_what_cannot_be_read(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit):
        parse(monkeypatch, FinetuneOptions, *words.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["pretrain", "pretrain_fsdp2", "finetune", "throughput"])
def test_help_needs_no_torch(script):
    command = [sys.executable, "-c", WITHOUT_TORCH, LAUNCH, LAUNCH / f"{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = {"finetune": FinetuneOptions, "throughput": None}.get(script, PretrainOptions)
    missing = [field.name for field in fields(options) if f"  --{field.name}" not in done.stdout] if options else []
    assert missing == [] and "usage: " in done.stdout


def test_defaults_follow_the_length_of_the_run():
    options = PretrainOptions(deepspeed_config="")
    intervals = ("logging_interval", "validation_interval", "save_interval", "warmup_steps")
    assert [options.defaults(8000, 0.01, True)[name] for name in intervals] == [10, 800, 8000, 80]
    assert [options.defaults(60, 0.01, True)[name] for name in intervals] == [2, 6, 60, 1]
    assert [options.defaults(3, 0.0, False)[name] for name in ("logging_interval", "validation_interval", "dtype")] == [
        1, 1, "bf16"
    ]  # fmt: skip
    assert PretrainOptions(deepspeed_config="", data="synthetic").defaults(60, 0.01, True)["save_interval"] == 0
