"""MFU against figures worked out by hand, and the limit on memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny import llama
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from ds_memopt import IPSGD, Addax, BAdam, MeZO
from ds_memopt.measure import ModelFlops, limit_memory, peak_flops
from ds_memopt.train.flops import model_flops


def test_palm_formula():
    """Llama-2-7B without its input embedding, 4,096 tokens: 39.6 + 6.4 GFLOP a token. On an A800, by the Adam-mini
    paper's 5572.19 tokens/s of two GPUs, that is 41 % of 312 TFLOP/s."""
    flops = ModelFlops(6_607_343_616, layers=32, heads=32, head_dim=128, seq_length=4096)
    assert flops.per_token == 6 * 6_607_343_616 + 12 * 32 * 4096 * 4096 == 46_086_512_640
    assert flops.utilisation(5572.19 / 2, 312e12) == pytest.approx(0.41155, abs=1e-5)
    assert flops.utilisation(5572.19 / 2, None) is None
    assert flops.formula(312e12) == (
        "MFU = tokens/s of a GPU x 1 x (6 N + 12 L H Q T) / peak; N = 6,607,343,616, L = 32, H = 32, Q = 128, "
        "T = 4096: 46.09 GFLOP a token; peak of the device: 312.0 TFLOP/s"
    )


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA A800-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("NVIDIA B200", "bf16", 36e15 / 8 / 2),
        ("NVIDIA GB300", "bf16", 360e15 / 72 / 2),
        ("NVIDIA B200 MIG 1g.23gb", "bf16", None),
        # Compute units, FLOP of one in a cycle, cycles a second; of the RTX 4090 128 SMs at 2.52 GHz.
        ("AMD Instinct MI300X", "bf16", pytest.approx(304 * 2048 * 2.1e9, rel=1e-4)),
        ("AMD Instinct MI355X", "bf16", pytest.approx(256 * 4096 * 2.4e9, rel=1e-4)),
        ("NVIDIA GeForce RTX 4090", "fp16", pytest.approx(128 * 512 * 2.52e9, rel=1e-3)),
        ("NVIDIA GeForce RTX 3090", "bf16", None),
    ],
)
def test_peak_of_known_devices_only(monkeypatch, device, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert peak_flops(torch.device("cuda"), dtype) == peak
    assert peak_flops(torch.device("cpu"), dtype) is None


def test_parameters_that_multiply():
    """Untied, the input embedding is a table; tied, it is the output's matrix as well."""
    untied = llama()
    config = untied.config
    flops = model_flops(untied, None, 10)
    table = config.vocab_size * config.hidden_size
    assert flops.parameters == sum(p.numel() for p in untied.parameters()) - table
    assert (flops.layers, flops.heads) == (config.num_hidden_layers, config.num_attention_heads)
    assert (flops.head_dim, flops.seq_length) == (config.head_dim, 10)

    tied = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=2, n_head=3, vocab_size=40, n_positions=16))
    assert model_flops(tied, None, 16).parameters == sum(p.numel() for p in tied.parameters())


def test_each_method_counts_its_own_passes():
    model = llama()
    for method, passes in (
        (torch.optim.AdamW(model.parameters()), 1.0),
        (MeZO.from_model(model), 2 / 3),
        (MeZO.from_model(model, probes=3), 6 / 3),
        (MeZO.from_model(model, probes=3, estimator="one_sided"), 4 / 3),
        (IPSGD.from_model(model, clip="two_pass"), 1.0),  # the second is recomputation
        (Addax.from_model(model, length_threshold=None, zo_batch=6, fo_batch=3), (6 * 2 / 3 + 3) / 9),
        (Addax.from_model(model, length_threshold=None, zo_batch=6, fo_batch=3, alpha=0.0), 3 / 9),
        (Addax.from_model(model, length_threshold=None, zo_batch=6, fo_batch=3, alpha=1.0), 4 / 9),
    ):
        assert model_flops(model, method, 16).passes == pytest.approx(passes)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda model: BAdam.from_model(model, switch_every=1), "the passes of BAdam are not the same"),
        (lambda model: Addax.from_model(model, length_threshold=9), "the passes of Addax are not the same"),
    ],
)
def test_what_the_formula_does_not_count_is_null(method, message):
    model = llama()
    assert message in model_flops(model, method(model), 16)


def test_experts_and_sequences_of_different_lengths_are_null():
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    assert "some of the experts only" in model_flops(experts, None, 16)
    assert "differ in length" in model_flops(llama(), None, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_limit_on_a_gpu():
    device = torch.device("cuda")
    try:
        limit_memory(device, 0.5)
        held = torch.empty(400 * 2**20, dtype=torch.int8, device=device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(200 * 2**20, dtype=torch.int8, device=device)
        del held
        with pytest.raises(ValueError, match="a memory limit of 1000000 GiB is more than the .* GiB of this device"):
            limit_memory(device, 1_000_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


LIMITED = """
import torch
from ds_memopt.measure import limit_memory
limit_memory(torch.device("cpu"), 0.5)
held = torch.ones(400 * 2**20 // 4)
print("fits", flush=True)
torch.ones(200 * 2**20 // 4)
"""


def test_memory_limit_on_cpu():
    """In a process of its own: 400 of 512 MiB fit, 200 more do not."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "fits\n"
    assert "can't allocate memory: you tried to allocate 209715200 bytes" in done.stderr
