"""One process: Adam-mini against its PyPI package, against a reference written from the formula, and user errors."""

from __future__ import annotations

import copy
import re

import adam_mini
import pytest
import torch
from tiny import FIRST_ORDER, batches, distance, full_parameters, llama, train_plain
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ds_memopt import GWT, AdamMini

STEPS = 20
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def test_equals_the_official_package_on_a_multi_head_llama():
    """Limit 1e-6 of the distance moved; measured 4.6e-7. One scalar per MLP matrix would be off by 0.11, q and k by
    row by 0.05."""
    model = llama(num_attention_heads=4, num_key_value_heads=4, head_dim=10)
    twin, start = copy.deepcopy(model), full_parameters(model)
    config = model.config
    official = adam_mini.Adam_mini(
        twin.named_parameters(), lr=1e-3, betas=BETAS, eps=EPS, weight_decay=DECAY, dim=config.hidden_size,
        n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads, verbose=False,
    )  # fmt: skip
    train_plain(twin, official, batches(STEPS))
    train_plain(model, AdamMini.from_model(model, lr=1e-3, betas=BETAS, eps=EPS, weight_decay=DECAY), batches(STEPS))
    expected = full_parameters(twin)
    assert distance(full_parameters(model), expected) <= 1e-6 * distance(expected, start)


def reference(model, data, block_ids: dict[str, torch.Tensor], lr=1e-2) -> None:
    """Adam-mini in fp64 from the formula, with one block id per element and no knowledge of intervals."""
    state = {}
    for t, batch in enumerate(data, 1):
        model(input_ids=batch, labels=batch).loss.backward()
        for name, p in model.named_parameters():
            g, ids = p.grad.flatten(), block_ids[name]
            m, v = state.setdefault(name, [torch.zeros_like(g), torch.zeros(int(ids.max()) + 1, dtype=g.dtype)])
            sizes = torch.bincount(ids)
            mean = torch.bincount(ids, weights=g * g) / sizes
            m.copy_(BETAS[0] * m + (1 - BETAS[0]) * g)
            v.copy_(BETAS[1] * v + (1 - BETAS[1]) * mean)
            decay = DECAY if p.ndim > 1 else 0.0
            root = (v / (1 - BETAS[1] ** t)).sqrt()[ids] + EPS
            with torch.no_grad():
                p.copy_((p.flatten() * (1 - lr * decay) - lr * m / (1 - BETAS[0] ** t) / root).view_as(p))
            p.grad = None


def gpt2_block_ids(model) -> dict[str, torch.Tensor]:
    """GPT-2 stores [in, out]: an output neuron is a column, and c_attn's columns are q heads, k heads, v neurons."""
    hidden, heads = model.config.n_embd, model.config.n_head
    ids = {}
    for name, p in model.named_parameters():
        count = p.numel()
        if name.endswith("bias"):
            ids[name] = torch.arange(count)
        elif "ln_" in name:
            ids[name] = torch.zeros(count, dtype=torch.long)
        elif "wte" in name or "wpe" in name:
            ids[name] = torch.arange(count) // p.shape[1]
        else:
            column = torch.arange(count) % p.shape[1]
            if "c_attn" in name:
                head = hidden // heads
                column = torch.where(column < 2 * hidden, column // head, 2 * heads + column - 2 * hidden)
            ids[name] = column
    return ids


def test_columns_biases_and_ties_follow_the_formula():
    """All in fp64. Limit 1e-10 of the distance moved; measured 3e-14. Other blocks are off by 0.05 or more."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=12, n_head=3, n_layer=2, vocab_size=101, n_positions=16, attn_implementation="eager",
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    twin, start = copy.deepcopy(model), full_parameters(model)
    reference(twin, batches(STEPS), gpt2_block_ids(twin))
    optimizer = AdamMini.from_model(model, lr=1e-2, betas=BETAS, eps=EPS, weight_decay=DECAY)
    train_plain(model, optimizer, batches(STEPS))
    expected = full_parameters(twin)
    assert distance(full_parameters(model), expected) <= 1e-10 * distance(expected, start)


def state_bytes(optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return sum(value.numel() * value.element_size() for value in tensors)


def test_state_of_a_llama_takes_four_bytes_per_parameter():
    """The 39M recipe, 4.010 bytes; with m in bf16, 2.010."""
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, vocab_size=32000,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    for state_dtype, limit in (("fp32", 4.02), ("bf16", 2.02)):
        optimizer = AdamMini.from_model(model, lr=1e-3, state_dtype=state_dtype)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert limit - 0.02 < state_bytes(optimizer) / parameters <= limit, state_dtype


def test_bf16_weights_keep_v_in_fp32_through_a_checkpoint():
    """torch casts states to the parameters' dtype on load; v in bf16 would stall at beta2 = 0.999."""
    model = llama().bfloat16()
    optimizer = AdamMini.from_model(model, lr=1e-3)
    train_plain(model, optimizer, batches(3))
    resumed = AdamMini.from_model(model, lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert resumed.state[p][key].dtype == (torch.int16 if key == "master_remainder" else torch.float32)
            assert torch.equal(resumed.state[p][key], value), key
    twin = copy.deepcopy(model)
    again = AdamMini.from_model(twin, lr=1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    data = list(batches(2, seed=5))
    train_plain(model, optimizer, data)
    train_plain(twin, again, data)
    assert distance(full_parameters(model), full_parameters(twin)) == 0


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_bf16_weights_move_like_fp32_ones(method):
    """One large step, so that the rounding of the weights (2^-9) is small beside it; measured 0.2 % apart."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = llama()
        gradients = {
            name: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for name, p in params(model)
        }
        model.to(dtype)
        before = full_parameters(model)
        optimizer = FIRST_ORDER[method].from_model(model, lr=1.0)
        for name, p in params(model):
            p.grad = gradients[name].to(dtype)
        optimizer.step()
        kept = [item for state in optimizer.state.values() for item in state.items()]
        assert all(value.dtype == torch.float32 for key, value in kept if key != "master_remainder")
        moved[dtype] = {name: value - before[name] for name, value in full_parameters(model).items()}
    whole = distance(moved[torch.float32], {name: torch.zeros(()) for name in moved[torch.float32]})
    apart = distance(moved[torch.bfloat16], moved[torch.float32]) / whole
    print(method, apart)
    assert apart < 0.01


def params(model):
    return list(model.named_parameters())


def test_bf16_momentum_stays_close_to_fp32():
    """m rounded to 8 bits: 2e-3 of the distance moved, measured."""
    results = {}
    for state_dtype in ("fp32", "bf16"):
        model = llama()
        train_plain(model, AdamMini.from_model(model, lr=1e-3, state_dtype=state_dtype), batches(STEPS))
        results[state_dtype] = full_parameters(model)
    apart = distance(results["bf16"], results["fp32"]) / distance(results["fp32"], full_parameters(llama()))
    assert 0 < apart < 2e-2


def test_named_parameters_alone_give_the_same_optimizer():
    model = llama()
    twin = copy.deepcopy(model)
    train_plain(model, AdamMini.from_model(model, model.parameters(), lr=1e-3), batches(5))
    train_plain(twin, AdamMini(twin.named_parameters(), lr=1e-3, head_dim=12), batches(5))
    assert distance(full_parameters(model), full_parameters(twin)) == 0


def test_lr_and_betas_are_read_from_the_group_at_every_step():
    model = llama()
    twin = copy.deepcopy(model)
    late = AdamMini.from_model(model, lr=1.0, betas=(0.5, 0.5))
    for group in late.param_groups:
        group["lr"], group["betas"] = 1e-3, (0.9, 0.95)
    train_plain(model, late, batches(3))
    train_plain(twin, AdamMini.from_model(twin, lr=1e-3, betas=(0.9, 0.95)), batches(3))
    assert distance(full_parameters(model), full_parameters(twin)) == 0


def test_frozen_and_unused_parameters_stay_untouched():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    before = full_parameters(model)
    optimizer = AdamMini.from_model(model, lr=1e-3, weight_decay=0.1)
    train_plain(model, optimizer, batches(2))
    after = full_parameters(model)
    untouched = {"unused", "model.embed_tokens.weight"}
    assert {name for name in before if torch.equal(before[name], after[name])} == untouched


def test_a_closure_is_evaluated_with_gradients():
    model = nn.Linear(3, 2)
    optimizer = AdamMini.from_model(model, lr=0.1)

    def closure():
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    before = model.weight.detach().clone()
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before, model.weight)


def raises(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_user_errors_name_the_value_the_limit_and_the_remedy():
    model = llama()
    with raises("'bets' is no hyper-parameter of AdamMini. Did you mean 'betas'? It takes lr, betas, eps"):
        AdamMini.from_model(model, bets=(0.9, 0.95))
    with raises("betas=(0.9, 1.5) is out of range: it must be two numbers in [0, 1). Try (0.9, 0.95)."):
        AdamMini.from_model(model, betas=(0.9, 1.5))
    with raises("betas=0.9 is out of range"):
        AdamMini.from_model(model, betas=0.9)
    with raises("eps=0 is out of range: it must be a number in [1e-30, 1). 1e-8 is usual."):
        AdamMini.from_model(model, eps=0)
    with raises("lr=-1 is out of range: it must be a number in [0, 1e6]."):
        AdamMini.from_model(model, lr=-1)
    with raises("lr='auto' is out of range"):
        AdamMini.from_model(model, lr="auto")
    with raises("weight_decay=-0.1 is out of range"):
        AdamMini.from_model(model, weight_decay=-0.1)
    with raises("state_dtype='fp8' is out of range: it must be 'fp32', 'bf16' or 'int8'."):
        AdamMini.from_model(model, state_dtype="fp8")
    with raises("value_blocks='row' is out of range: it must be 'rows' or 'whole'."):
        AdamMini.from_model(model, value_blocks="row")
    with raises("AdamMini needs the parameters' names. Pass model.named_parameters(), or build it with"):
        AdamMini(model.parameters())
    with raises("'head.weight' is no parameter of the model, which has 'model.embed_tokens.weight' and others"):
        AdamMini([("head.weight", nn.Parameter(torch.ones(2, 2)))], model=model)
    with raises("head_dim"):
        AdamMini(model.named_parameters())


def test_parameters_that_were_replaced_are_an_error_before_the_first_step():
    model = llama()
    optimizer = AdamMini.from_model(model, lr=1e-3)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with raises("lm_head.weight in the optimizer is no longer the model's parameter"):
        train_plain(model, optimizer, batches(1))
    with raises("is not among the model's: its parameters were replaced after they were listed"):
        AdamMini.from_model(model, llama().parameters())
    model = llama()
    optimizer = AdamMini.from_model(model, lr=1e-3)
    flat = nn.Parameter(torch.zeros(10))
    flat.grad = torch.ones(10)
    optimizer.param_groups[0]["params"] = [flat] * len(optimizer.param_groups[0]["params"])
    with raises("has shape (10,), the parameter had (101, 40): an engine replaced it. Call ds_memopt.register()"):
        optimizer.step()


def test_unsuitable_tensors_are_named():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    optimizer = AdamMini.from_model(model, lr=0.1)
    model(torch.tensor([1])).sum().backward()
    with raises("0.weight has a sparse gradient"):
        optimizer.step()
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = AdamMini.from_model(model, lr=0.1)
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    with raises("is not contiguous, but steps go row by row"):
        optimizer.step()


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        (lambda m: AdamMini.from_model(m), lambda m: AdamMini.from_model(m, value_blocks="whole")),
        (lambda m: GWT.from_model(m), lambda m: GWT.from_model(m, variant="paper")),
        (lambda m: GWT.from_model(m), lambda m: GWT.from_model(m, exclude=["layers.0.mlp.up_proj"])),
        (lambda m: torch.optim.AdamW(m.parameters()), lambda m: AdamMini.from_model(m, m.parameters())),
    ],
)
def test_state_of_another_meaning_is_refused(saver, loader):
    model = llama()
    optimizer, other = saver(model), loader(model)
    train_plain(model, optimizer, batches(1))
    with pytest.raises(ValueError, match="state is of .*, but this optimizer needs (AdamMini|GWT), (paper|blocks)"):
        other.load_state_dict(optimizer.state_dict())


def test_state_takes_the_dtype_that_it_is_asked_to_have():
    model = llama()
    optimizer = AdamMini.from_model(model)
    train_plain(model, optimizer, batches(1))
    half = AdamMini.from_model(model, state_dtype="bf16")
    half.load_state_dict(optimizer.state_dict())
    kept = {key: value.dtype for key, value in half.state[model.lm_head.weight].items()}
    assert kept == {"step": torch.float32, "exp_avg": torch.bfloat16, "block_exp_avg_sq": torch.float32}


def test_no_parameter_at_all_is_an_error():
    with raises("There is no parameter to train."):
        AdamMini.from_model(llama(), [])
