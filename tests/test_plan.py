"""The planner: that a run holds and sends what it says, to the byte, on every rank."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_live
from plan_ranks import FEW, METHODS, PLACEMENTS, SIZES, everything, param_groups, replicas_of, type_of
from spawn import run_ranks
from tiny import llama
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

import ds_memopt.plan
from ds_memopt.cli import main
from ds_memopt.plan import Prediction, activations, predict, table
from ds_memopt.plan.activations import measure_activations
from ds_memopt.plan.bytes_moved import BytesMoved
from ds_memopt.train.config import load_config
from ds_memopt.train.presets import find_model

FLAGS = 256
"""Bytes of losses, norms and flags, which are not predicted; at most 99 were measured."""


def predicted(case: tuple, ranks: int, rank: int, **other) -> Prediction:
    method, placement, dtype = case
    zero = dict(PLACEMENTS[placement])
    arguments = {"stage": zero.pop("stage"), "ranks": ranks, "rank": rank, "dtype": dtype, "zero": zero}
    arguments |= {"reduce_once": method.endswith("once"), "replicas": replicas_of(method)}
    model = llama(**SIZES)
    return predict(model, type_of(method), METHODS[method], params=param_groups(model), **arguments | other)


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def runs(request) -> list[dict]:
    """For each rank by case: what was measured and what is predicted."""
    ranks = request.param
    measured = run_ranks(everything, ranks, ranks)
    return [
        {case: (real, predicted(case, ranks, rank, block=real["block"])) for case, real in results.items()}
        for rank, results in enumerate(measured)
    ]


@pytest.fixture(autouse=True, scope="module")
def measured_once():
    """Most plans here are of one model and one length: a second or two of each."""
    known = {}

    def measure(config, *arguments, **options):
        key = config.to_json_string(), arguments, tuple(sorted(options.items()))
        if key not in known:
            known[key] = measure_activations(config, *arguments, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "measure_activations", measure)
        yield


def held(real: dict, plan: Prediction) -> list[str]:
    """The kinds of bytes that a rank holds otherwise than predicted."""
    return [kind for kind in ("weights", "masters", "gradients", "states") if getattr(plan, kind) != real[kind]]


def unexpected(real: dict, plan: Prediction, allowed: float = FLAGS) -> list[str]:
    """The collectives in which a rank sends more bytes than allowed above or below what is predicted."""
    return [
        name
        for name in real["sent"].keys() | plan.sent.keys()
        if abs(real["sent"].get(name, 0) - plan.sent.get(name, 0)) > allowed
    ]


def test_a_rank_holds_what_is_predicted(runs):
    wrong = {
        (case, rank): kinds for rank, by_case in enumerate(runs) for case in by_case if (kinds := held(*by_case[case]))
    }
    assert wrong == {}


def test_a_rank_sends_what_is_predicted(runs):
    wrong = {}
    for rank, by_case in enumerate(runs):
        for case, (real, plan) in by_case.items():
            # With this reuse distance DeepSpeed gathers the embedding once more for Addax than its rule tells.
            embedding = max(real["sent"].values()) * 0.04 if case[:2] == ("Addax", "zero3, a layer") else 0
            if names := unexpected(real, plan, FLAGS + embedding):
                wrong[case, rank] = {name: (real["sent"].get(name), plan.sent.get(name)) for name in names}
    assert wrong == {}


@pytest.mark.parametrize("method", ["AdamMini", "GWT"])
def test_released_gradients_are_those_of_a_layer_at_most(runs, method):
    """Measured in backward, whenever a gradient is complete, to the byte; all of them without release."""
    for rank, by_case in enumerate(runs):
        (kept, held), (freed, released) = (by_case[name, "fsdp2", "bf16"] for name in (method, f"{method}, release"))
        assert kept["most"] == kept["gradients"] == held.gradients, rank
        assert freed["gradients"] == released.gradients == 0, rank
        assert freed["most"] == released.backward - held.backward < 0.4 * held.gradients, rank


def test_the_comparison_tells_wrong_predictions_apart(runs):
    """One block of state, one padded element of a rank, or one matrix that is sent once more."""
    by_case = runs[0]
    real, plan = by_case["AdamMini", "zero1", "bf16"]
    blocks = plan.states["block_exp_avg_sq"]
    assert held(real, replace(plan, states=plan.states | {"block_exp_avg_sq": blocks + 4})) == ["states"]
    assert held(real, replace(plan, masters=plan.masters + 4)) == ["masters"]
    assert held(real, replace(plan, gradients=plan.gradients - 2)) == ["gradients"]
    matrix = 2 * 180 * 45 // 2
    assert unexpected(real, replace(plan, sent=plan.sent | {"all_gather": plan.sent["all_gather"] + matrix}))
    other_stage, _ = by_case["AdamMini", "zero3, a layer", "bf16"]
    assert set(held(other_stage, plan)) >= {"weights", "gradients", "states"}
    assert set(unexpected(other_stage, plan)) == {"all_gather", "all_reduce", "reduce_scatter"}


@pytest.mark.parametrize("method", ["AdamMini", "GWT", "IPSGD"])
@pytest.mark.parametrize("placement", FEW)
def test_ranks_hold_as_much_together_as_one_alone(method, placement):
    """But for padding, "step" and blocks that ranks share."""
    case, ranks = (method, placement, "bf16"), 7
    alone, parts = predicted(case, 1, 0), [predicted(case, ranks, rank) for rank in range(ranks)]
    for key in alone.states.keys() - {"step", "block_exp_avg_sq", "update_norm"}:
        together = sum(part.states[key] for part in parts)
        assert 0 <= together - alone.states[key] <= 0.02 * alone.states[key], key
    assert alone.sent == {}


def test_the_model_stays_as_it_is():
    model = llama()
    before = {name: (p.device, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    for method in ("BAdam", "MeZO", "IPSGD"):
        predict(model, method, stage=3, ranks=2)
    assert {name: (p.device, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_badam_predicts_any_block():
    model = llama(num_hidden_layers=3)
    options = {"include_embedding": True, "include_lm_head": True}
    zero = {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 100}
    sizes = {
        block: predict(model, "BAdam", options, stage=3, ranks=2, block=block, zero=zero)
        for block in ("embedding", "model.layers.0", "model.layers.2", "lm_head")
    }
    largest = predict(model, "BAdam", options, stage=3, ranks=2, zero=zero)
    assert largest == sizes["model.layers.0"]
    # The embedding has no vector: the param group of vectors is lent a norm, which has masters but no state.
    head, embedding = sizes["lm_head"], sizes["embedding"]
    assert head.masters == embedding.masters < largest.masters
    assert head.states["exp_avg"] - embedding.states["exp_avg"] == model.model.norm.weight.numel() * 4 // 2
    gathered = [size.sent["all_gather"] for size in sizes.values()]
    assert gathered == sorted(gathered, reverse=True) and len(set(gathered)) == 4


def test_badam_keeps_residuals_of_all_blocks():
    model = llama()
    plan = predict(model, "BAdam", {"keep_residual": True}, stage=2, ranks=2)
    in_layers = sum(p.numel() for p in model.model.layers.parameters())
    assert plan.states["residuals"] == in_layers  # 2 bytes, on 2 ranks
    assert "residuals" not in predict(model, "BAdam", {"keep_residual": True}, stage=2, ranks=2, dtype="fp32").states


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "Adam"}, "method='Adam' is out of range: it must be one of AdamW, AdamMini"),
        ({"stage": 4}, "stage=4 is out of range"),
        ({"stage": "FSDP2", "method": "BAdam"}, "stage='FSDP2' is out of range: it must be one of 0, 1, 2, 3"),
        ({"stage": "FSDP2", "zero": {"overlap_comm": True}}, "it must be left out with FSDP2"),
        ({"reduce_once": True}, "reduce_once is FSDP2's, and stage=2: leave it out"),
        ({"replicas": 2}, "replicas=2 is FSDP2's, and stage=2: leave it out"),
        ({"replicas": 3, "stage": "FSDP2"}, "replicas=3 is out of range: it must be a divisor of ranks="),
        ({"reduce_once": True, "stage": "FSDP2", "options": {"release_gradients": True}}, "give one of them"),
        ({"options": {"release_gradients": True}}, "Set release_gradients to false, or use FSDP2"),
        ({"ranks": 0}, "ranks=0 is out of range"),
        ({"rank": 2}, "rank=2 is out of range: it must be from 0 to 1"),
        ({"dtype": "int8"}, "dtype='int8' is out of range"),
        ({"options": {"levle": 2}}, "'levle' is no hyper-parameter of GWT. Did you mean 'level'"),
        ({"block": "model.layers.0"}, "but GWT trains all blocks at once"),
        ({"method": "BAdam", "block": "layers.9"}, "block='layers.9' is out of range: it must be one of 'model.lay"),
        ({"zero": {"offload_optimizer": {"device": "cpu"}}}, "offload is not predicted"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    given = {"method": "GWT", "stage": 2, "ranks": 2} | arguments
    with pytest.raises(ValueError) as error:
        predict(llama(), **given)
    assert message in str(error.value)


LENGTH = 256
"""Tokens: in shorter sequences the gradient of a weight outweighs activations here, unlike in a model of usual size."""


CHUNKED = {"checkpointing": "selective", "loss_chunks": 3}
LLAMA, GPT2 = llama().config, GPT2Config(n_embd=48, n_head=4, vocab_size=101)


@pytest.mark.parametrize(
    ("config", "options"),
    [(LLAMA, {}), (LLAMA, {"checkpointing": "full"}), (LLAMA, CHUNKED), (LLAMA, {"backward": False}), (GPT2, CHUNKED)],
    ids=lambda value: str(getattr(value, "model_type", value)),
)
def test_activations_of_two_layers_tell_those_of_four(config, options):
    deep = copy.deepcopy(config)
    deep.num_hidden_layers = 4
    told, made = measure_activations(deep, LENGTH, torch.bfloat16, **options), dict(options)
    backward = made.pop("backward", True)
    prepare = partial(activations._prepare, **{"checkpointing": "none", "loss_chunks": 1, "eager": False} | made)
    seen = activations._peak(deep, 4, 3, LENGTH, torch.bfloat16, prepare, backward)
    assert told.of(3) == pytest.approx(seen, rel=0.01)


def test_the_micro_batch_is_the_largest_that_fits():
    memory, length = 400_000_000, 128
    rows = table.compare_methods("tiny", 4, memory, length, ["AdamW", "BAdam"]).rows
    needs = measure_activations(find_model("tiny")[0], length, torch.bfloat16)
    assert [(row.method, row.stage) for row in rows] == [(m, stage) for m in ("AdamW", "BAdam") for stage in range(4)]
    for row in (row for row in rows if row.micro_batch):
        assert (
            row.prediction.peak(needs.of(row.micro_batch))
            <= memory
            < row.prediction.peak(needs.of(row.micro_batch + 1))
        )
        assert row.checkpointed > row.micro_batch
    assert {row.stage for row in rows if row.micro_batch} == {0, 1, 2, 3}
    # A bucket for more elements than the model has would be 1 GB for nothing.
    assert all(row.zero["reduce_bucket_size"] == 4_852_992 for row in rows)


def test_gains_are_those_of_the_formula():
    """ZeRO-2 sends (2 + 1) / 2 of the gradients' bytes on two ranks, MeZO half of the weights', at the same speed."""
    compared = table.compare_methods("tiny", 2, 300_000_000, 128, ["AdamW", "AdamMini", "BAdam", "MeZO"])
    forward = measure_activations(find_model("tiny")[0], 128, torch.bfloat16, backward=False).further
    assert compared.plain > 1.5 * compared.selective > 3 * compared.checkpointed > 3 * forward > 0
    assert compared.logits == 128 * 256 * 4
    rows = {(row.method, row.stage): row for row in compared.rows}
    adamw, mini, mezo = rows["AdamW", 2], rows["AdamMini", 2], rows["MeZO", 2]
    assert adamw.flops == 128 * (6 * 4_787_456 + 12 * 6 * 8 * 32 * 128)
    assert adamw.sent_for_a_sequence == adamw.sent / adamw.checkpointed > mini.sent_for_a_sequence
    assert rows["BAdam", 2].seconds(1, 1e9) is None  # its passes depend on the block
    assert adamw.micro_batch < adamw.selective < adamw.checkpointed
    plain = adamw.flops / 1e12 + adamw.sent / adamw.selective / 1e9  # no product is made again
    again = adamw.flops / 1e12 * 4 / 3 + adamw.sent / adamw.checkpointed / 1e9
    assert adamw.seconds(1, 1e9) == min(plain, again)
    assert mezo.seconds(1, 1e9) == pytest.approx(mezo.flops / 1e12 * 2 / 3 + mezo.sent / mezo.checkpointed / 1e9)
    least = min(row.sent_for_a_sequence for row in compared.rows if row.method == "AdamW")
    text = table.as_text(compared.rows, 1, 10**9).splitlines()
    assert text[0].split()[-2:] == ["gain", "faster"]
    for line, row in zip(text[1:], compared.rows, strict=True):
        gain, faster = line.split()[-2:]
        assert gain == (f"{least / row.sent_for_a_sequence:.2f}" if row.sent else "inf")
        assert (faster == "-") == (row.method == "BAdam")
    kinds = table.details([mini]).splitlines()
    assert kinds[0] == "AdamMini at ZeRO-2, bytes of a rank"
    told = {name.strip(): int(size.replace(",", "")) for name, size in (line.rsplit(None, 1) for line in kinds[1:])}
    assert told["state exp_avg"] == told["masters"] == mini.prediction.masters
    assert told["of that for shared blocks"] == mini.prediction.seams


def test_a_config_that_releases_gradients_is_planned_under_fsdp2(tmp_path, capsys):
    file, best = tmp_path / "released.json", tmp_path / "best.json"
    file.write_text(
        json.dumps({"optimizer": {"type": "AdamMini", "params": {"lr": "auto", "release_gradients": True}}})
    )
    arguments = ["plan", "--model", "tiny", "--gpus", "2", "--gpu_memory", "16GB", "--seq_length", "128"]
    assert main([*arguments, "--optimizer", str(file), "--output", str(best), "--by_kind"]) == 0
    printed = capsys.readouterr().out
    assert "Recommended: released at FSDP2" in printed and "released at FSDP2, bytes of a rank" in printed
    plan = predict(built_tiny(), "AdamMini", {"release_gradients": True}, stage="FSDP2", ranks=2)
    assert f"{'besides, forward and backward':>32} {plan.backward:>18,}" in printed
    config = load_config(str(best))
    assert config["gradient_accumulation_steps"] == 1 and config["gradient_clipping"] == 0.0
    assert config["optimizer"]["params"]["release_gradients"] and "zero_optimization" not in config


def test_fsdp2_is_planned_if_it_is_asked_for(capsys):
    """With whole gradients of the model's 4,852,992 weights."""
    arguments = ["plan", "--model", "tiny", "--gpus", "2", "--gpu_memory", "16GB", "--seq_length", "128", "--fsdp2"]
    assert main([*arguments, "--reduce_once", "--by_kind"]) == 0
    printed = capsys.readouterr().out
    assert "Recommended: AdamW at FSDP2" in printed and "ZeRO-" not in printed
    assert printed.count(f"gradients {4 * 4_852_992:>18,}") == printed.count(" at FSDP2, bytes of a rank") == 4
    assert main(arguments[:-1] + ["--reduce_once"]) == 2
    assert "--reduce_once is FSDP2's: add --fsdp2" in capsys.readouterr().err
    assert main([*arguments[:-1], "--replicas", "2"]) == 2
    assert "--replicas 2 is FSDP2's: add --fsdp2" in capsys.readouterr().err


def built_tiny():
    return LlamaForCausalLM(find_model("tiny")[0])


def test_the_command_writes_a_config_that_trains(tmp_path, capsys):
    file = tmp_path / "ds_config.json"
    arguments = ["plan", "--model", "tiny", "--gpus", "2", "--gpu_memory", "16GB", "--seq_length", "128"]
    level_3 = tmp_path / "level_3.json"
    level_3.write_text(json.dumps({"optimizer": {"type": "GWT", "params": {"lr": "auto", "level": 3}}}))
    assert main([*arguments, "--optimizer", f"{level_3},MeZO", "--output", str(file), "--by_kind"]) == 0
    printed = capsys.readouterr().out
    assert "Recommended: level_3 at ZeRO-0" in printed and printed.count("MeZO") == 8
    assert "level_3 at ZeRO-2, bytes of a rank" in printed
    expected = predict(built_tiny(), "GWT", {"level": 3}, stage=1, ranks=2, zero={"reduce_bucket_size": 4_852_992})
    assert f"state exp_avg {expected.states['exp_avg']:>18,}" in printed
    config = load_config(str(file))
    assert config["zero_optimization"]["reduce_bucket_size"] == 4_852_992
    assert config["optimizer"]["type"] == "GWT" and config["train_micro_batch_size_per_gpu"] > 100
    assert config["optimizer"]["params"]["level"] == 3 and config["optimizer"]["params"]["lr"] == "auto"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "model 'nowhere' is neither a preset nor a local folder"),
        ({"--gpus": "0"}, "gpus=0 is out of range"),
        ({"--gpu_memory": "80"}, "'80' is no amount of memory. Write a number and GB or GiB"),
        ({"--seq_length": "-1"}, "seq_length=-1 is out of range"),
        ({"--gpu": "H1000"}, "--gpu H1000 is not known: choose one of A100-40GB, A100-80GB, "),
        ({"--tflops": "100"}, "tflops and bandwidth tell together how fast a step is. Give both or none."),
        ({"--tflops": "0", "--bandwidth": "1GB"}, "tflops=0.0 is out of range: it must be a number > 0"),
        (
            {"--optimizer": "AdamMini,Lion"},
            "optimizer='Lion' is out of range: it must be all, ds_configs, or some of",
        ),
        ({"--optimizer": "nowhere.json"}, "cannot read the DeepSpeed config nowhere.json"),
        ({"--gpu_memory": "1MB", "--output": "never.json"}, "nothing fits, so never.json is not written"),
    ],
)
def test_the_command_refuses_what_is_wrong(change, message, capsys):
    given = {"--model": "tiny", "--gpus": "2", "--gpu_memory": "80GB", "--seq_length": "128", "--optimizer": "AdamW"}
    assert main(["plan", *chain.from_iterable((given | change).items())]) == 2
    assert message in capsys.readouterr().err


def test_estimators_have_deepspeeds_names_and_first_arguments(capsys):
    for stage in (1, 2, 3):
        ours = getattr(ds_memopt.plan, f"estimate_zero{stage}_model_states_mem_needs_all_live")
        predictions = ours(llama(), 4, 2, options={"GWT": {"level": 3}})
        assert predictions["GWT"] == predict(llama(), "GWT", {"level": 3}, stage=stage, ranks=8)
    assert capsys.readouterr().out.count("ZeRO-") == 3
    theirs = inspect.signature(estimate_zero2_model_states_mem_needs_all_live)
    assert list(inspect.signature(ours).parameters)[:3] == list(theirs.parameters)[:3]


@pytest.mark.parametrize(
    ("method", "options", "least", "most"),
    [
        ("AdamMini", {"masters": "remainder16"}, 7, 7.05),
        ("AdamMini", {"masters": "remainder8"}, 6, 6.05),
        ("GWT", {"masters": "remainder8", "level": 2, "base": "adam_mini"}, 5.25, 5.4),
    ],
)
def test_bytes_of_a_parameter_without_fp32_masters(method, options, least, most):
    """Of a Llama's layers: weights 2, gradients 2, remainders 2 or 1, codes 1, or 1/4 of them, and scales, 4 / 128 of
    codes. GWT codes the moments of approximations alone. On 8 ranks what is divided is an eighth, to 1 %; a rank of
    ZeRO-1 and 2 has besides the gradients of parameters that a border cuts."""
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, vocab_size=128)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    count = sum(p.numel() for p in model.parameters())
    given = (model, method, options | {"state_dtype": "int8"})
    alone = {stage: predict(*given, stage=stage, ranks=1) for stage in (1, 2, 3, "FSDP2")}
    for stage, plan in alone.items():
        print(stage, plan.held / count)
        assert least <= plan.held / count <= most and plan.masters == 0
    states = sum(alone[2].states.values()) / 8
    for stage in (1, 2, 3):
        plan = predict(*given, stage=stage, ranks=8)
        weights = count * 2 if stage < 3 else count * 2 / 8
        assert plan.held - plan.gradients == pytest.approx(weights + states, rel=0.01)
        cut = 0 if stage == 3 else 2 * 1024 * 2816 * 2
        assert count * 2 / 8 <= plan.gradients * 1.0001 <= 1.001 * count * 2 / 8 + cut


def fp32_bytes(method: str, options: dict | None = None) -> float:
    """Of a step, per parameter that trains at once, of the layers' matrices alone: no norm, no embedding."""
    config = copy.deepcopy(find_model("tiny")[0])
    config.num_hidden_layers = 2  # BAdam needs several
    model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    plan = predict(model, method, options, stage=1, ranks=1, params=[{"params": matrices}])
    return plan.step_bytes / (plan.masters / 4)


@pytest.mark.parametrize(
    ("method", "options", "fused"),
    [
        ("AdamW", None, 28),
        ("AdamMini", None, 20),
        ("AdamMini", {"state_dtype": "bf16"}, 16),
        ("AdamMini", {"state_dtype": "int8"}, 12 + 2 * (1 + 4 / 128)),
        ("AdamW", {"state_dtype": "int8"}, 12 + 4 * (1 + 4 / 128)),
        ("GWT", {"limiter": None}, 16),
        ("GWT", None, 22),
        ("GWT", {"state_dtype": "bf16"}, 16 + 3 * 4 / 4),
        ("GWT", {"level": 1, "limiter": None}, 12 + 16 / 2),
        ("GWT", {"base": "adam_mini", "limiter": None}, 12 + 8 / 4 + 4),
        ("BAdam", {"base": "gwt"}, 22),
    ],
)
def test_a_fused_step_moves_the_bytes_of_its_formula(method, options, fused, monkeypatch):
    """Numbers per row, head or matrix, and the even length of a flat buffer, are at most 0.1 byte per parameter."""
    monkeypatch.delenv("DS_MEMOPT_KERNELS", raising=False)
    assert 0 <= fp32_bytes(method, options) - fused < 0.1


def test_a_step_of_plain_pytorch_moves_more(monkeypatch):
    """1.4 of a fused one, the least of all methods."""
    monkeypatch.setenv("DS_MEMOPT_KERNELS", "plain")
    assert fp32_bytes("AdamMini") > 1.3 * 20
    assert fp32_bytes("AdamMini", {"state_dtype": "bf16"}) > fp32_bytes("AdamMini")  # it is unpacked, and rounded


def test_what_operators_move_is_counted():
    with BytesMoved() as counted:
        a = torch.empty(100, device="meta")
        a.fill_(1.0)  # 400 written
        b = a.view(10, 10).t() + 1  # 400 read, 400 written
        b.mul_(a[:10])  # 400 and 40 read, 400 written
        torch.lerp(b, b, 0.5, out=torch.empty_like(b))  # 800 read, 400 written
    assert counted.total == 400 + 800 + 840 + 1200


def test_a_step_made_by_operators_alone_is_counted(monkeypatch):
    monkeypatch.delenv("DS_MEMOPT_KERNELS", raising=False)
    assert fp32_bytes("CAME") > 100
    assert fp32_bytes("GWT", {"variant": "paper"}) > 50


def test_methods_in_place_move_weights_and_what_is_kept(monkeypatch):
    """bf16 weights and their residual read and written, 8 bytes; a gradient read, 2; two perturbed copies, 8."""
    monkeypatch.delenv("DS_MEMOPT_KERNELS", raising=False)
    model = llama()
    count = sum(p.numel() for p in model.parameters())
    expected = {"MeZO": 16, "IPSGD": 10, "Addax": 18}
    assert {m: predict(model, m, stage=0, ranks=1).step_bytes / count for m in expected} == expected
    assert predict(model, "IPSGD", {"rule": "adalomo"}, stage=0, ranks=1).step_bytes is None


def test_a_gpu_adds_the_time_of_the_step(capsys):
    arguments = ["plan", "--model", "tiny", "--gpus", "1", "--gpu_memory", "80GB", "--seq_length", "128"]
    assert (
        main([*arguments, "--optimizer", "AdamW,AdamMini", "--gpu", "H100", "--tflops", "1", "--bandwidth", "1GB"]) == 0
    )
    printed = capsys.readouterr().out
    assert "at 3,350 GB/s, the H100's as its maker states it" in printed
    rows = table.compare_methods("tiny", 1, 80 * 10**9, 128, ["AdamW"]).rows
    adamw = rows[1]
    milliseconds = 28 * 4_852_992 / 3.35e12 * 1e3
    line = next(line for line in printed.splitlines() if line.split()[:2] == ["AdamW", "1"])
    assert line.split()[-1] == f"{milliseconds:.2f}" == f"{1e3 * adamw.step_seconds(3.35e12):.2f}"
    again = adamw.flops / 1e12 * 4 / 3 + 28 * 4_852_992 / adamw.checkpointed
    assert adamw.seconds(1, 1e9, 1.0) == pytest.approx(again)
