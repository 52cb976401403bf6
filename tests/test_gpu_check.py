"""launch/gpu_check.sh, on a CPU: its model is transformers' Llama, its report is whole, and a wrong step fails it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spawn import TIME_LIMIT
from transformers import LlamaConfig, LlamaForCausalLM

from ds_memopt.blocks import assign_blocks
from ds_memopt.kernels import back_ends
from ds_memopt.optimizers import METHODS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch/benchmarks"))
import gpu_check  # noqa: E402
import gpu_memory  # noqa: E402
from plain_llama import Shape, build  # noqa: E402

CPU = torch.device("cpu")
SHAPE = Shape(40, 2, 4, 53, 67)


def settings(**changes) -> gpu_check.Settings:
    small = gpu_check.Settings(CPU, {"small": SHAPE}, SHAPE, 1, 2, 16, 24.0, True)
    return small._replace(**changes)


def twin() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=53, vocab_size=67,
            rms_norm_eps=1e-5, use_cache=False,
        )
    )  # fmt: skip


def test_its_model_is_the_llama_of_transformers():
    """By names, roles, blocks and loss: measured 2e-7 apart."""
    ours, theirs = build(SHAPE, torch.float32, CPU), twin()
    ours.load_state_dict(theirs.state_dict())
    assert assign_blocks(ours) == assign_blocks(theirs)
    tokens = torch.randint(67, (2, 16))
    expected = theirs(input_ids=tokens, labels=tokens).loss
    assert ours(tokens).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[int, dict, str]:
    """What the command returns and writes, on tiny sizes, where neither DeepSpeed nor transformers are installed."""
    folder, absent = tmp_path_factory.mktemp("gpu_check"), tmp_path_factory.mktemp("absent")
    for package in ("deepspeed", "transformers"):
        (absent / f"{package}.py").write_text("raise ImportError")
    command = ["bash", str(ROOT / "launch/gpu_check.sh"), "--device", "cpu", "--small", "--output_dir", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != back_ends.VARIABLE}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(absent), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, env=environment, timeout=TIME_LIMIT, stdout=subprocess.DEVNULL).returncode
    return code, json.loads((folder / "gpu_check.json").read_text()), (folder / "gpu_check.md").read_text()


def test_the_report_is_whole(written):
    code, report, text = written
    assert (code, report["failures"]) == (0, [])
    parts = {name: entry["result"] for name, entry in report["parts"].items()}
    assert report["compared"] == "cpp" and report["device"] in text
    compared = {row["method"] for row in parts["correctness"]}
    assert compared == {*gpu_check.VARIANTS, *gpu_check.PACKED} >= set(METHODS)
    assert any(row["difference"] > 0 for row in parts["correctness"])  # not plain PyTorch beside itself
    assert {row["method"] for row in parts["training"]} == {"AdamW, torch's fused", *METHODS}
    assert all(row["tokens_per_s"] > 0 and row["predicted_gib"] > 0 for row in parts["training"])
    per_parameter = {row["method"]: row["bytes_per_parameter"] for row in parts["steps"]["rows"]}
    assert per_parameter["AdamMini"] == pytest.approx(20, abs=0.5)
    packed = {row["method"]: row["bytes_per_parameter"] for row in parts["packed"]}
    assert packed["AdamMini, int8, remainder8"] == pytest.approx(10, abs=0.3)
    assert len(report["goals"]) == 6 and all(goal["met"] is None for goal in report["goals"])
    assert "not judged" in text and all(f"| {name} |" in text for name in METHODS)


def test_a_goal_that_is_missed_is_told(written):
    _, report, _ = written
    parts = json.loads(json.dumps(report["parts"]))
    for row in parts["steps"]["result"]["rows"]:
        row |= {"ratio": 0.81, "of_copy_bandwidth": 0.9}
    parts["probe"] = {"error": "it raised"}
    judged = gpu_check.goals(parts, small=False)
    assert [goal["met"] for goal in judged] == [False, False, True, True, True, None]
    text = gpu_check.as_markdown(report | {"goals": judged})
    assert text.count("MISSED") == 2


def test_a_wrong_step_and_a_part_that_raises_fail_the_check(monkeypatch):
    """A step that is 1 % too long is 1,000 times what is allowed in fp32; the other parts run all the same."""
    right = METHODS["AdamMini"].update

    def wrong(self, call):
        longer = {number: group | {"lr": group["lr"] * 1.01} for number, group in call.groups.items()}
        right(self, call if back_ends.chosen_kernels() == "plain" else type(call)(**vars(call) | {"groups": longer}))

    def broken(_):
        raise ValueError("no memory")

    monkeypatch.delenv(back_ends.VARIABLE, raising=False)
    monkeypatch.setattr(METHODS["AdamMini"], "update", wrong)
    monkeypatch.setattr(gpu_check, "VARIANTS", {"AdamMini": ("AdamMini", {})})
    packed = "AdamMini, int8, remainder8"
    monkeypatch.setattr(gpu_check, "PACKED", {packed: gpu_check.PACKED[packed]})
    broken_parts, empty = dict.fromkeys(("steps", "probe"), broken), dict.fromkeys(("packed", "training"), lambda _: [])
    parts = {"correctness": gpu_check.check_correctness} | broken_parts | empty
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    report = gpu_check.run(settings())
    found = report["parts"]["correctness"]["result"]
    rows = {row["dtype"]: row for row in found if row["method"] == "AdamMini"}
    assert not rows["float32"]["ok"] and rows["float32"]["difference"] == pytest.approx(0.01, rel=0.2)
    (of_packed,) = (row for row in found if row["method"] == packed)
    assert not of_packed["ok"] and of_packed["difference"] == pytest.approx(0.01, rel=0.2)
    told = "\n".join(report["failures"])
    assert "steps: ValueError: no memory" in told and "method AdamMini, shape small, dtype float32" in told


def test_plain_pytorch_beside_itself_is_no_check(monkeypatch):
    monkeypatch.setenv(back_ends.VARIABLE, "plain")
    monkeypatch.setattr(gpu_check, "PARTS", {name: lambda _: [] for name in gpu_check.PARTS} | {
        "steps": lambda _: {}, "probe": lambda _: {},
    })  # fmt: skip
    assert "plain PyTorch was compared with itself" in gpu_check.run(settings())["failures"][0]


def test_what_training_holds_is_counted():
    """Weights, gradients, AdamW's states and activations in fp32; in place, weights and residuals in bf16."""
    count = sum(p.numel() for p in twin().parameters())
    adamw, mini, mezo, ipsgd = (
        gpu_memory.predicted_peak(SHAPE, method, 2, 16, CPU) for method in (None, "AdamMini", "MeZO", "IPSGD")
    )
    assert 16 * count < mini + 4 * count < adamw + 0.1 * count
    assert 4 * count < mezo < ipsgd < adamw / 2
    more = gpu_memory.predicted_peak(SHAPE, None, 4, 16, CPU)
    assert more > adamw


@pytest.mark.parametrize("most", [0, 1, 5, 8, 300])
def test_the_largest_micro_batch_is_found(most, monkeypatch):
    monkeypatch.setattr(gpu_memory, "limit_memory", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_memory.gc, "collect", lambda: None)

    def train(sequences: int) -> None:
        if sequences > most:
            raise torch.OutOfMemoryError

    assert gpu_memory.largest_micro_batch(train, 24, torch.device("cuda")) == min(most, gpu_memory.LARGEST)
    assert gpu_memory.largest_micro_batch(train, 24, CPU) is None
