"""What makes a step faster or smaller changes its result by rounding alone."""

from __future__ import annotations

import pytest
import torch
from spawn import with_torchao
from tiny import GLOBAL_BATCH, LENGTH, batches, equal, llama
from torch.utils.flop_counter import FlopCounterMode

from ds_memopt.blocks import assign_blocks
from ds_memopt.train import model_speed
from ds_memopt.train.float8 import check_float8, use_float8
from ds_memopt.train.model_speed import check_speed, make_ready
from ds_memopt.train.options import PretrainOptions


def prepared(model, **options):
    make_ready(model, PretrainOptions(deepspeed_config="", **options))
    return model.train()


def loss_and_gradients(model, labels: torch.Tensor | None = None, **other) -> dict[str, torch.Tensor]:
    (batch,) = batches(1)
    loss = model(input_ids=batch, labels=batch if labels is None else labels, **other).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].double(), theirs[name].double()) for name in theirs]
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_in_chunks_are_those_of_whole_logits(tied):
    some = next(batches(1)).clone()
    some[:, :9] = -100
    for other in ({}, {"labels": some}, {"num_items_in_batch": torch.tensor(70)}):
        whole = loss_and_gradients(llama(tie_word_embeddings=tied), **other)
        for chunks in (2, 7):
            ours = loss_and_gradients(prepared(llama(tie_word_embeddings=tied), loss_chunks=chunks), **other)
            print(apart(ours, whole))
            assert apart(ours, whole) < 1e-6


def test_logits_that_are_changed_after_the_head_are_refused():
    """The loss that the head has computed would lack it."""
    model = prepared(llama(), loss_chunks=2)
    model.lm_head.register_forward_hook(lambda head, inputs, logits: 30 * torch.tanh(logits / 30))  # as Gemma 2 does
    with pytest.raises(ValueError, match="--loss_chunks 2: this model changes its head's logits before the loss"):
        loss_and_gradients(model)


def test_checkpointing_changes_no_bit_and_selective_repeats_no_product():
    made, products = {}, {}
    for kind in ("none", "selective", "full"):
        model = prepared(llama(attn_implementation="sdpa"), gradient_checkpointing=kind)
        with FlopCounterMode(display=False) as counter:
            made[kind] = loss_and_gradients(model)
        products[kind] = counter.get_total_flops()
    assert equal(made["none"], made["selective"]) and equal(made["none"], made["full"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(input_ids=next(batches(1)))
    last = 2 * LENGTH * GLOBAL_BATCH * model.model.layers[0].mlp.down_proj.weight.numel()  # of a layer: nobody needs it
    again = counter.get_total_flops() - len(model.model.layers) * last
    assert products["selective"] == products["none"] == products["full"] - again


def test_plain_attention_is_pytorchs():
    ours = loss_and_gradients(prepared(llama(attn_implementation="eager"), attention="sdpa"))
    error = apart(ours, loss_and_gradients(llama(attn_implementation="eager")))
    print(error)
    assert 0 < error < 2e-6


def test_what_flash_attention_needs_is_told(monkeypatch):
    options, gpu = PretrainOptions(deepspeed_config="", attention="flash_attention_2"), torch.device("cuda")
    for there, dtype, message in ((False, "bf16", "needs the package flash-attn"), (True, "fp32", "add --dtype bf16")):
        monkeypatch.setattr(model_speed, "is_flash_attn_2_available", lambda there=there: there)
        with pytest.raises(ValueError, match=message):
            check_speed(options, "AdamW", gpu, dtype)
    assert check_speed(options, "AdamW", gpu, "bf16")["attention"] == "flash_attention_2"


def test_losses_at_perturbed_weights_need_whole_logits():
    with pytest.raises(ValueError, match="--loss_chunks 4: MeZO compares losses of forwards .* lower --micro_batch"):
        check_speed(PretrainOptions(deepspeed_config="", loss_chunks=4), "MeZO", torch.device("cpu"), "fp32")


def test_layers_in_float8_keep_their_blocks():
    """Where a swapped layer's own configuration was taken for the model's, queries lost their heads. Gradients of the
    three recipes differ from bf16's by 0.12, 0.09 and 0.08 of their norm: float8 has 3 bits after the first."""
    with with_torchao():
        pytest.importorskip("torchao", reason="torchao is not installed: bash tests/run.sh does it")
        sizes = dict(hidden_size=48, intermediate_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
        sizes["attn_implementation"] = "sdpa"
        model = llama(**sizes).bfloat16()
        before, whole = assign_blocks(model), loss_and_gradients(model)
        for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
            model = llama(**sizes).bfloat16()
            assert "14 of 14 linear layers" in use_float8(model, recipe, torch.device("cpu"))
            assert assign_blocks(model) == before and type(model.lm_head) is torch.nn.Linear
            error = apart(loss_and_gradients(model), whole)
            print(recipe, error)
            assert 1e-2 < error < 0.2


def test_what_float8_needs_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--float8 rowwise needs the package torchao"):
        check_float8("rowwise", "AdamMini", torch.device("cpu"), "bf16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    for method, device, dtype, message in (
        ("AdamMini", "cpu", "fp32", "add --dtype bf16"),
        ("MeZO", "cpu", "bf16", "MeZO compares losses"),
        ("GWT", "cuda", "bf16", "capability 8.9 or more, which NVIDIA A100-SXM4-80GB has not"),
    ):
        with pytest.raises(ValueError, match=message):
            check_float8("tensorwise", method, torch.device(device), dtype)
