"""The library behind launch/pretrain.py, on one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from deepspeed.runtime.config import DeepSpeedConfig
from spawn import TIME_LIMIT, run_script

from ds_memopt.optimizers import METHODS, method_of
from ds_memopt.results import comparison
from ds_memopt.results.record import MetricsFile, read_metrics
from ds_memopt.train import config, presets, reshard, settings
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.ranks import Ranks
from ds_memopt.train.settings import make_settings

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
BATCH = dict(micro_batch=2, accumulation=3, world_size=4)
ADAM = dict(lr=5e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
ARGUMENTS = {**BATCH, **ADAM, "gradient_clipping": 1.0, "dtype": "fp32"}
ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


# --- the DeepSpeed config ---


def test_resolve_fills_every_auto_and_leaves_its_input_alone():
    raw = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamMini", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
    }
    before = json.dumps(raw)
    resolved = config.resolve_config(raw, **ARGUMENTS | {"dtype": "bf16"}, hidden_size=64, steps=100, warmup_steps=7)
    assert json.dumps(raw) == before
    assert resolved == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamMini",
            "params": {"lr": 5e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100, "warmup_num_steps": 7}},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 4096, "stage3_param_persistence_threshold": 640},
    }


def test_resolve_makes_batch_sizes_and_clipping_explicit():
    """DeepSpeed's own defaults are a micro-batch of 1 and, since 0.19.3, clipping at 1.0."""
    assert config.resolve_config({}, **ARGUMENTS | {"gradient_clipping": 0.5}) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
    }


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"zero_optimization": {"stage": "auto"}}, '"auto" at zero_optimization.stage .* has no value'),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, '"auto" at zero_optimization.reduce_bucket_size'),
        ({"x": [{"y": "auto"}]}, '"auto" at x.0.y'),
        (
            {"train_batch_size": 23},
            r"train_batch_size is 23 .* this run has 24 \(2 sequences x 3 accumulated x 4",
        ),
        ({"gradient_clipping": 2.0}, "gradient_clipping is 2.0 .* this run has 1.0"),
    ],
)
def test_resolve_refuses(raw, message):
    with pytest.raises(ValueError, match=message):
        config.resolve_config(raw, **ARGUMENTS)


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match='dtype \'fp8\' is unknown: choose "fp32" or "bf16"'):
        config.resolve_config({}, **ARGUMENTS | {"dtype": "fp8"})


def test_choose_lets_config_and_command_line_disagree_loudly():
    raw = {"optimizer": {"params": {"lr": 1e-4, "eps": "auto"}}}
    assert config.choose(raw, "optimizer.params.lr", None, 1.0) == 1e-4
    assert config.choose(raw, "optimizer.params.lr", 1e-4, 1.0) == 1e-4
    assert config.choose(raw, "optimizer.params.eps", 1e-6, 1e-8) == 1e-6
    assert config.choose(raw, "optimizer.params.betas", None, "default") == "default"
    with pytest.raises(ValueError, match="lr is 0.0001 in the DeepSpeed config but 0.5 on the command line"):
        config.choose(raw, "optimizer.params.lr", 0.5, 1.0)


def test_override_optimizer_keeps_only_what_both_know():
    raw = {"optimizer": {"type": "AdamMini", "params": {"lr": 1e-3, "weight_decay": 0.2}}, "x": 1}
    assert config.override_optimizer(raw, "AdamW") == {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.2}},
        "x": 1,
    }
    raw["optimizer"]["params"]["value_blocks"] = "rows"
    with pytest.raises(ValueError, match="cannot replace AdamMini .* value_blocks belong to it alone"):
        config.override_optimizer(raw, "AdamW")
    assert config.override_optimizer(raw, "AdamMini") == raw


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the DeepSpeed config .*c.json: No such file"), ("{,}", "c.json is not valid JSON: .* line 1"),
     ("[1]", "c.json holds a list; it must be a JSON object")],
)  # fmt: skip
def test_bad_config_files(tmp_path, content, message):
    path = tmp_path / "c.json"
    if content:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        config.load_config(path)


def _small_llama() -> transformers.LlamaConfig:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    return transformers.LlamaConfig(**sizes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_accepted_by_deepspeed_and_trainer(path, tmp_path):
    raw = config.load_config(path)
    stage, offload = path.stem[4], "offload" in path.stem
    files = {method.__module__.rpartition(".")[2]: word for word, method in METHODS.items()} | {"adamw": "AdamW"}
    name = re.sub(r"^zero\d_(offload_)?", "", path.stem)
    kind = next(word for file, word in files.items() if name.startswith(file))
    batch = {} if method_of(kind).accumulates else {"micro_batch": 6, "accumulation": 1}

    assert raw["optimizer"]["type"] == kind
    assert raw["gradient_clipping"] == 1.0

    resolved = config.resolve_config(raw, **ARGUMENTS | batch | {"world_size": 1}, hidden_size=64)
    assert "auto" not in json.dumps(resolved)
    parsed = DeepSpeedConfig(resolved)
    assert parsed.zero_optimization_stage == int(stage)
    assert (parsed.zero_config.offload_optimizer is not None) == offload
    assert (parsed.train_batch_size, parsed.gradient_clipping) == (6, 1.0)

    trainer = transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig(raw)
    bf16 = raw.get("bf16", {}).get("enabled") is True  # Trainer must be told so, too
    arguments = transformers.TrainingArguments(tmp_path, use_cpu=True, learning_rate=1e-4, adam_beta2=0.95, bf16=bf16)
    trainer.trainer_config_process(arguments)
    trainer.trainer_config_finalize(arguments, transformers.LlamaForCausalLM(_small_llama()), 10)
    assert "auto" not in json.dumps(trainer.config)
    assert trainer.config["optimizer"]["params"]["lr"] == 1e-4
    assert trainer.config["optimizer"]["params"].get("betas", [0.9, 0.95]) == [0.9, 0.95]  # some have none


def test_shipped_configs_have_twins_that_differ_in_the_optimizer_alone():
    for name in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
        twin = config.load_config(ROOT / "ds_configs" / f"{name}_adamw.json")
        mini = config.load_config(ROOT / "ds_configs" / f"{name}_adam_mini.json")
        assert mini["optimizer"] == {"type": "AdamMini", "params": twin["optimizer"]["params"]}
        gwt = config.load_config(ROOT / "ds_configs" / f"{name}_gwt.json")
        badam = config.load_config(ROOT / "ds_configs" / f"{name}_badam.json")
        del twin["optimizer"], mini["optimizer"], gwt["optimizer"], badam["optimizer"]
        assert mini == twin == gwt == badam


# --- the settings ---


def _options(tmp_path, **changes) -> PretrainOptions:
    settings = {"deepspeed_config": str(ROOT / "ds_configs/zero2_adamw.json"), "output_dir": str(tmp_path / "run")}
    return PretrainOptions(**settings | changes)


def _file(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


DECAY = {"schedule": "warmup_stable_decay", "steps": 10, "warmup_steps": 2}


def test_plan_takes_the_recipe_and_the_command_line(tmp_path):
    settled = make_settings(_options(tmp_path, lr=3e-4, steps=50, seq_length=32), ALONE)
    assert settled.config["optimizer"]["params"] == {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert (settled.config["train_batch_size"], settled.config["bf16"]) == (4, {"enabled": False})
    assert (settled.steps, settled.seq_length, settled.facts["dtype"], settled.facts["schedule"]) == (
        50,
        32,
        "fp32",
        ["linear", 3],
    )


def test_command_line_fills_what_a_config_leaves_out(tmp_path):
    """DeepSpeed would take AdamW's own lr of 1e-3 and no bf16."""
    bare = _file(tmp_path / "c.json", '{"optimizer": {"type": "AdamW"}}')
    settled = make_settings(_options(tmp_path, deepspeed_config=bare, eps=1e-6, dtype="bf16"), ALONE)
    assert settled.config["optimizer"]["params"] == {"lr": presets.PRESETS["tiny"][1].lr, "eps": 1e-6}
    assert settled.config["bf16"] == {"enabled": True} and settled.facts["dtype"] == "bf16"
    assert settled.config["gradient_clipping"] == 1.0 and settled.config["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_a_warm_up_may_be_longer_than_the_run(tmp_path, schedule):
    settled = make_settings(_options(tmp_path, schedule=schedule, warmup_steps=100, steps=50), ALONE)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert settled.lr_schedule(optimizer).lr_lambdas[0](50) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("schedule", "given"),
    [(["linear", 3], 3), (["constant", 0], 0), (["constant", 3], None), (["polynomial", 1, "power=2"], 1)],
)
def test_a_run_that_is_resharded_keeps_its_schedule(tmp_path, schedule, given):
    facts = {
        "deepspeed": {},
        "model": "tiny",
        "data": "stdlib",
        "steps": 4,
        "seq_length": 8,
        "seed": 0,
        "world_size": 1,
    }
    facts |= {"zero_stage": 2, "schedule": schedule}
    (tmp_path / "resolved_config.json").write_text(json.dumps(facts))
    options = reshard._options(tmp_path, tmp_path / "c.json", None, None)
    assert (options.schedule, options.warmup_steps, list(options.schedule_kwargs)) == (schedule[0], given, schedule[2:])


def test_without_nvcc_a_gpu_runs_torch_adamw(tmp_path, monkeypatch, capsys):
    """FusedAdam could not be compiled; with offload DeepSpeed compiles its CPU operator, which needs no nvcc."""
    gpu = replace(ALONE, device=torch.device("cuda"))

    def params(device, cuda_home, config):
        monkeypatch.setattr(settings, "CUDA_HOME", cuda_home)
        path = str(ROOT / f"ds_configs/{config}.json")
        return make_settings(_options(tmp_path, deepspeed_config=path), device).config["optimizer"]["params"]

    assert params(gpu, None, "zero2_adamw")["torch_adam"] is True
    assert "AdamW runs as torch.optim.AdamW" in capsys.readouterr().out
    for case in [(gpu, "/cuda", "zero2_adamw"), (ALONE, None, "zero2_adamw"), (gpu, None, "zero2_adam_mini"),
                 (gpu, None, "zero2_offload_adamw")]:  # fmt: skip
        assert "torch_adam" not in params(*case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama-7m"}, "model 'llama-7m' is neither a preset nor a local folder .*; presets: tiny, llama-39m"),
        ({"steps": 0}, "--steps 0 is out of range: it must be at least 1"),
        ({"validation_interval": -1}, "--validation_interval -1 is out of range: it must be at least 0"),
        ({"optimizer": "AdamMinus"}, "optimizer type 'AdamMinus' is unknown"),
        ({"schedule": "zigzag"}, "--schedule zigzag is unknown: choose one of linear, cosine, .*"),
        ({"schedule": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau follows the loss, which no engine hands to it"),
        ({"schedule": "constant", "warmup_steps": 2}, "--warmup_steps 2 has no effect with --schedule constant"),
        ({"schedule": "constant", "schedule_kwargs": ("power=2",)}, "--schedule_kwargs power: constant takes none"),
        ({"schedule_kwargs": ("num_cycles=1", "num_cycles=2"), "schedule": "cosine"}, "num_cycles is there twice"),
        (DECAY | {"schedule_kwargs": ("num_decay_steps=true",)}, "num_decay_steps=True: it must be an integer"),
        (DECAY | {"schedule_kwargs": ("num_decay_steps=0", "min_lr_ratio=a")}, "min_lr_ratio=a with --lr"),
        ({"schedule": "cosine_with_min_lr"}, "min_lr_rate should be set .* --schedule_kwargs sets num_cycles, min_lr"),
        ({"schedule_kwargs": ("min_lr",)}, "--schedule_kwargs min_lr is not NAME=VALUE, as in num_decay_steps=1000"),
        ({"schedule": "warmup_stable_decay"}, "needs num_decay_steps: add --schedule_kwargs num_decay_steps=..."),
        (DECAY | {"schedule_kwargs": ("num_decay_steps=9",)}, "from 0 to 8, what 2 steps of warm-up leave of 10"),
        (DECAY | {"schedule_kwargs": ("num_decay_steps=0.2",)}, "num_decay_steps=0.2: it must be an integer from 0 to"),
        (DECAY | {"schedule_kwargs": ("num_decay_steps=2", "min_lr_ratio=NaN")}, "min_lr_ratio=NaN with --lr"),
        (DECAY | {"schedule_kwargs": ("num_decay_steps=2", "decay_type=sine")}, "Unknown decay type: sine, expected"),
        (
            {"schedule": "cosine_with_min_lr", "schedule_kwargs": ("min_lr=0.01",), "lr": 1e-3},
            "min_lr=0.01 with --lr 0.001: step .* has .* x --lr, which must stay between 0 and 1 x",
        ),
        ({"steps": 4, "profile": 2}, "--profile 2 traces .* this run has 4: give at least --steps 5"),
        ({"attention": "flash_attention_2"}, "flash_attention_2 needs a GPU, and this run is on a cpu; or take sdpa"),
        ({"compile": "inducto"}, "--compile inducto is no backend of torch.compile: choose one of .*inductor"),
        ({"loss_chunks": 0}, "--loss_chunks 0 is out of range: it must be at least 1"),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 1.0 in the DeepSpeed config but 0.3 on the command line"),
        ({"deepspeed_config": "missing.json"}, "cannot read the DeepSpeed config missing.json"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_settings(_options(tmp_path, **changes), ALONE)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ({}, {}, "has no optimizer.type"),
        ({"bf16": {"enabled": True}}, {"dtype": "fp32", "optimizer": "AdamW"}, "--dtype fp32 contradicts bf16 or fp16"),
        ({"fp16": {"enabled": True}}, {"dtype": "bf16", "optimizer": "AdamW"}, "--dtype bf16 contradicts bf16 or fp16"),
        ({"scheduler": {"type": "WarmupLR"}}, {"schedule": "linear", "optimizer": "AdamW"}, "no effect beside"),
    ],
)
def test_config_and_command_line_that_contradict(tmp_path, content, changes, message):
    path = _file(tmp_path / "c.json", json.dumps(content))
    with pytest.raises(ValueError, match=message):
        make_settings(_options(tmp_path, deepspeed_config=path, **changes), ALONE)


def test_a_finished_run_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="already holds a run .* with --resume, or choose another --output_dir"):
        make_settings(_options(tmp_path), ALONE)


def test_the_script_says_what_is_wrong_and_fails(tmp_path):
    """`python launch/pretrain.py` alone, without a launcher."""
    done = run_script("launch/pretrain.py", "--output_dir", tmp_path, "--data", "nowhere.txt")
    assert done.returncode == 1
    assert "ValueError: --data nowhere.txt: no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PYTHON": "no-python"}, "setup: no Python 3.11, 3.12 or 3.13 found (tried: no-python)"),
        ({"CXX": "no-compiler"}, "setup: no C++ compiler (no-compiler)"),
    ],
)
def test_set_up_says_what_the_machine_lacks(variables, message):
    command = ["bash", "-euc", ". launch/setup.sh none"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables}, timeout=TIME_LIMIT
    )
    assert done.returncode == 1 and message in done.stderr and done.stdout == ""


# --- what a run leaves behind ---


def test_metrics_file_drops_what_the_checkpoint_does_not_know(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in (2, 4, 5)))
    metrics = MetricsFile(tmp_path, after_step=4)
    metrics.append({"step": 6})
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 6]
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.append({"loss": float("nan")})


def _run_folder(path: Path, optimizer: str, state: float, losses: list[float]) -> Path:
    path.mkdir()
    rows = [
        {"step": 10 * i, "tokens": 1000 * i, "loss": loss, "validation_loss": loss + 0.5 if i % 2 == 0 else None,
         "tokens_per_s": 10.0 if i == 1 else 100.0 + i, "peak_rss_gib": 0.25 * i, "bytes_sent_per_step": 3 * 1024**2,
         "optimizer_state_bytes_per_parameter": state if i < 4 else 0.0,
         "held_gib": {"weights": 0.5, "masters": 1.0, "gradients": 0.25} | ({"step": 0.5, "m": 1.5} if i < 4 else {})}
        for i, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "resolved_config.json").write_text(json.dumps({"optimizer": {"type": optimizer}, "zero_stage": 2}))
    return path


def test_comparison_table_and_plot(tmp_path):
    runs = [
        _run_folder(tmp_path / "a", "AdamW", 8.0, [5.0, 4.0, 3.0, 2.0]),
        _run_folder(tmp_path / "b", "AdamMini", 4.013, [5.0, 3.5, 2.5, 1.5]),
    ]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in comparison.table(runs).splitlines()]
    by_name = {row[0]: row[1:] for row in cells[2:]}
    assert cells[0][-2:] == ["a", "b"]
    assert by_name["optimizer"] == ["AdamW", "AdamMini"]
    assert by_name["final validation loss"] == ["2.5000", "2.0000"]
    assert by_name["tokens/s"] == ["103", "103"]  # median without the first interval
    assert by_name["peak memory of a rank, GiB (resident set)"] == ["1.000", "1.000"]
    assert by_name["optimizer-state bytes/parameter"] == ["8.000", "4.013"]
    assert by_name["sent per rank and step, MiB"] == ["3.00", "3.00"]
    # Not of the last row, in which there was no state, as after a change of blocks.
    kinds = {kind: by_name[f"{kind} of rank 0, MiB"][0] for kind in ("weights", "masters", "gradients", "states")}
    assert kinds == {"weights": "512.00", "masters": "1024.00", "gradients": "256.00", "states": "2048.00"}
    comparison.plot(runs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_comparison_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run: cannot read metrics.jsonl"):
        comparison.table([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has logged no step yet"):
        comparison.table([tmp_path])
