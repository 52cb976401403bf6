"""What makes a step faster or smaller changes its result by rounding alone."""

from __future__ import annotations

import pytest
import torch
from tiny import GLOBAL_BATCH, LENGTH, batches, equal, llama
from torch.utils.flop_counter import FlopCounterMode

from ds_memopt.train import model_speed
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
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


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
    print(apart(ours, loss_and_gradients(llama(attn_implementation="eager"))))
    assert 0 < apart(ours, loss_and_gradients(llama(attn_implementation="eager"))) < 2e-6


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
