"""The library behind launch/pretrain.py, on one process."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from deepspeed.runtime.config import DeepSpeedConfig

from ds_memopt.train import compare, config, data, presets
from ds_memopt.train.options import Options
from ds_memopt.train.plan import make_plan
from ds_memopt.train.ranks import Ranks
from ds_memopt.train.record import MetricsFile, read_metrics

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
ARGUMENTS = dict(micro_batch=2, accumulation=3, world_size=4, lr=5e-4)
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
    resolved = config.resolve_config(raw, **ARGUMENTS, dtype="bf16", hidden_size=64, steps=100, warmup_steps=7)
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
    assert config.resolve_config({}, **ARGUMENTS, gradient_clipping=0.5) == {
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
            r"train_batch_size is 23 .* this run has 24 \(2 sequences x 3 accumulated x 4 ranks",
        ),
        ({"gradient_clipping": 2.0}, "gradient_clipping is 2.0 .* this run has 1.0"),
    ],
)
def test_resolve_refuses(raw, message):
    with pytest.raises(ValueError, match=message):
        config.resolve_config(raw, **ARGUMENTS)


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match='dtype \'fp8\' is unknown: choose "fp32" or "bf16"'):
        config.resolve_config({}, **ARGUMENTS, dtype="fp8")


def test_choose_lets_config_and_command_line_disagree_loudly():
    raw = {"optimizer": {"params": {"lr": 1e-4, "eps": "auto"}}}
    assert config.choose(raw, "optimizer.params.lr", None, 1.0) == 1e-4
    assert config.choose(raw, "optimizer.params.lr", 1e-4, 1.0) == 1e-4
    assert config.choose(raw, "optimizer.params.eps", 1e-6, 1e-8) == 1e-6
    assert config.choose(raw, "optimizer.params.betas", None, "default") == "default"
    with pytest.raises(
        ValueError, match="optimizer.params.lr is 0.0001 in the DeepSpeed config but 0.5 on the command"
    ):
        config.choose(raw, "optimizer.params.lr", 0.5, 1.0)


def test_override_optimizer_keeps_only_what_both_know():
    raw = {"optimizer": {"type": "AdamMini", "params": {"lr": 1e-3, "weight_decay": 0.2}}, "x": 1}
    assert config.override_optimizer(raw, "AdamW") == {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.2}},
        "x": 1,
    }
    raw["optimizer"]["params"]["value_blocks"] = "rows"
    with pytest.raises(
        ValueError, match="--optimizer AdamW cannot replace AdamMini .* value_blocks belong to it alone"
    ):
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_accepted_by_deepspeed_and_trainer(path, tmp_path):
    raw = config.load_config(path)
    stage, offload, method = (
        path.stem[4],
        "offload" in path.stem,
        path.stem.split("_", 2 if "offload" in path.stem else 1)[-1],
    )
    assert raw["optimizer"]["type"] == {"adam_mini": "AdamMini", "adamw": "AdamW"}[method]
    assert raw["gradient_clipping"] == 1.0

    resolved = config.resolve_config(raw, **{**ARGUMENTS, "world_size": 1}, hidden_size=64)
    assert "auto" not in json.dumps(resolved)
    parsed = DeepSpeedConfig(resolved)
    assert parsed.zero_optimization_stage == int(stage)
    assert (parsed.zero_config.offload_optimizer is not None) == offload
    assert (parsed.train_batch_size, parsed.gradient_clipping) == (6, 1.0)

    trainer = transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig(raw)
    arguments = transformers.TrainingArguments(
        tmp_path, use_cpu=True, adam_beta2=0.95, weight_decay=0.1, learning_rate=1e-4
    )
    trainer.trainer_config_process(arguments)
    trainer.trainer_config_finalize(
        arguments, transformers.LlamaForCausalLM(_small_llama()), 10
    )  # raises on a mismatch
    assert "auto" not in json.dumps(trainer.config)
    assert trainer.config["optimizer"]["params"]["lr"] == 1e-4


def test_shipped_configs_come_in_pairs_that_differ_in_the_type_alone():
    assert len(CONFIGS) == 12
    for path in CONFIGS:
        if path.stem.endswith("_adam_mini"):
            twin = config.load_config(path.with_name(path.name.replace("_adam_mini", "_adamw")))
            ours = config.load_config(path)
            ours["optimizer"]["type"] = "AdamW"
            assert ours == twin


# --- data ---


def test_stdlib_is_split_by_file():
    root = Path(sysconfig.get_path("stdlib"))
    names = data.stdlib_files(root)
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not any({"test", "site-packages", "tests"} & set(name.split("/")[:-1]) for name in names)
    held_out = [name for name in names if data.is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.08

    corpus = data.load_corpus("stdlib", None, 64, vocab_size=256)
    texts = [
        torch.cat([part[i] for i in range(len(part))]).to(torch.uint8).numpy().tobytes()
        for part in (corpus.train, corpus.validation)
    ]
    for name in held_out[:5] + ["argparse.py"]:
        marker = (root / name).read_bytes()[200:1500]
        if marker:
            assert [marker in text for text in texts] == [not data.is_held_out(name), data.is_held_out(name)]
    assert abs(sum(map(len, texts)) - sum((root / name).stat().st_size + 1 for name in names)) < 2 * 64


def _indices(length, micro, accumulation, world, steps, seed=3):
    """Per step, the indices that all ranks together consume."""
    per_rank = [
        list(data.StepBatches(range(length), micro, accumulation, rank, world, seed, steps)) for rank in range(world)
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
    with pytest.raises(
        ValueError, match=r"7 sequences, less than one global batch of 8 \(2 x 2 accumulated x 2 ranks\)"
    ):
        data.StepBatches(range(7), 2, 2, 0, 2, 0, range(1))


def test_validation_covers_the_same_sequences_on_any_number_of_ranks():
    held_out = data.SyntheticSequences(23, 8, 50, seed=1)

    def rows(world):
        batches = [data.validation_batches(held_out, 10, 3, rank, world) for rank in range(world)]
        assert len({len(one) for one in batches}) == 1  # ZeRO-3 gathers on all ranks or hangs
        valid = [row for one in batches for _, labels in one for row in labels.tolist() if row[0] != data.IGNORED_LABEL]
        return sorted(valid)

    assert len(rows(1)) == 10
    assert rows(1) == rows(2) == rows(4) == sorted(held_out[i * 23 // 10].tolist() for i in range(10))
    assert len(rows(1)) == 10 and len(data.validation_batches(held_out, 1000, 3, 0, 1)) == 8  # no more than there are


@pytest.fixture
def tokenizer(tmp_path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({"<eos>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(60)}}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def _documents(count=60):
    return [" ".join(f"w{i}" for _ in range(9)) for i in range(count)]  # document i repeats word i: 9 tokens and <eos>


@pytest.mark.parametrize("kind", ["jsonl", "files", "paragraphs"])
def test_text_is_split_by_document(tmp_path, tokenizer, kind):
    source = tmp_path / "text"
    source.mkdir()
    if kind == "jsonl":
        (source / "a.jsonl").write_text("".join(json.dumps({"text": d, "id": 1}) + "\n" for d in _documents()))
    elif kind == "files":
        for index, document in enumerate(_documents()):
            (source / f"{index}.txt").write_text(document)
    else:
        (source / "a.txt").write_text("\n\n".join(_documents()))
    corpus = data.load_corpus(str(source), tokenizer, 10, vocab_size=62)
    words = [
        {int(i) for row in range(len(part)) for i in part[row]} - {0} for part in (corpus.train, corpus.validation)
    ]
    assert not words[0] & words[1]
    assert len(words[0] | words[1]) == 60 and len(words[1]) == 3
    assert corpus.train[0].tolist()[-1] == 0 and len(set(corpus.train[0].tolist())) == 2
    assert corpus.train[0].dtype == torch.int64 and corpus.train[0].shape == (10,)


def test_bad_data_is_refused(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"body": "w1"}\n' * 3)
    (tmp_path / "one.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "short.jsonl").write_text('{"text": "w1"}\n' * 3)
    (tmp_path / "empty").mkdir()
    cases = [
        ("nowhere", tokenizer, "--data .*nowhere: no such file or folder"),
        ("empty", tokenizer, "no .txt, .md, .py, .jsonl or .json file"),
        ("rows.jsonl", tokenizer, "rows need a field 'text', they have body"),
        ("one.jsonl", tokenizer, "holds 1 documents; 2 are needed"),
        ("short.jsonl", tokenizer, "documents give no sequence of 10 tokens"),
        ("rows.jsonl", None, "needs --tokenizer FOLDER"),
        ("rows.jsonl", str(tmp_path / "no"), "needs --tokenizer FOLDER .* got .*no"),
    ]
    for name, folder, message in cases:
        with pytest.raises(ValueError, match=message):
            data.load_corpus(str(tmp_path / name), folder, 10, vocab_size=62)
    with pytest.raises(ValueError, match="--tokenizer .* does not apply to --data stdlib"):
        data.load_corpus("stdlib", tokenizer, 10, vocab_size=256)
    with pytest.raises(ValueError, match="stdlib need 256 ids but the model embeds 100"):
        data.load_corpus("stdlib", None, 10, vocab_size=100)


# --- models ---


def _small_llama() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )


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


# --- the plan ---


def _options(tmp_path, **changes) -> Options:
    settings = {
        "deepspeed_config": str(ROOT / "ds_configs/zero2_adamw.json"),
        "output_dir": str(tmp_path / "run"),
        **changes,
    }
    return Options(**settings)


def _file(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_plan_takes_the_recipe_and_the_command_line(tmp_path):
    plan = make_plan(_options(tmp_path, lr=3e-4, steps=50, seq_length=32), ALONE)
    assert plan.config["optimizer"]["params"] == {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert (plan.config["train_batch_size"], plan.config["bf16"]) == (16, {"enabled": False})
    assert (plan.steps, plan.seq_length, plan.facts["dtype"], plan.facts["schedule"]) == (50, 32, "fp32", ["linear", 3])


def test_command_line_fills_what_a_config_leaves_out(tmp_path):
    """DeepSpeed would take AdamW's own lr of 1e-3 and no bf16."""
    bare = _file(tmp_path / "c.json", '{"optimizer": {"type": "AdamW"}}')
    plan = make_plan(_options(tmp_path, deepspeed_config=bare, eps=1e-6, dtype="bf16"), ALONE)
    assert plan.config["optimizer"]["params"] == {"lr": presets.PRESETS["tiny"][1].lr, "eps": 1e-6}
    assert plan.config["bf16"] == {"enabled": True} and plan.facts["dtype"] == "bf16"
    assert plan.config["gradient_clipping"] == 1.0 and plan.config["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama-7m"}, "model 'llama-7m' is neither a preset nor a local folder .*; presets: tiny, llama-39m"),
        ({"steps": 0}, "--steps 0 is out of range: it must be at least 1"),
        ({"validation_interval": -1}, "--validation_interval -1 is out of range: it must be at least 0"),
        ({"optimizer": "AdamMinus"}, "optimizer type 'AdamMinus' is unknown"),
        ({"schedule": "zigzag"}, "--schedule zigzag"),
        ({"weight_decay": 0.3}, "weight_decay is 0.1 in the DeepSpeed config but 0.3 on the command line"),
        ({"deepspeed_config": "missing.json"}, "cannot read the DeepSpeed config missing.json"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(_options(tmp_path, **changes), ALONE)


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
        make_plan(_options(tmp_path, deepspeed_config=path, **changes), ALONE)


def test_a_finished_run_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match="already holds a run .* continue it with --resume, or choose another --output_dir"
    ):
        make_plan(_options(tmp_path), ALONE)


def test_the_script_says_what_is_wrong_and_fails(tmp_path):
    """`python launch/pretrain.py` alone, without a launcher."""
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--output_dir", str(tmp_path), "--data", "nowhere.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "ValueError: --data nowhere.txt: no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


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
         "optimizer_state_bytes_per_parameter": state}
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
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in compare.table(runs).splitlines()]
    by_name = {row[0]: row[1:] for row in cells[2:]}
    assert cells[0] == ["a", "b"] or cells[0][-2:] == ["a", "b"]
    assert by_name["optimizer"] == ["AdamW", "AdamMini"]
    assert by_name["final validation loss"] == ["2.5000", "2.0000"]
    assert by_name["tokens/s"] == ["103", "103"]  # median without the first interval
    assert by_name["peak memory of a rank, GiB (resident set)"] == ["1.000", "1.000"]
    assert by_name["optimizer-state bytes/parameter"] == ["8.000", "4.013"]
    assert by_name["sent per rank and step, MiB"] == ["3.00", "3.00"]
    compare.plot(runs, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_comparison_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run: no metrics.jsonl"):
        compare.table([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has not logged|logged no step yet"):
        compare.table([tmp_path])
