"""The main job's model under FSDP2: no rank but the first holds a whole one, and that in CPU memory."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from spawn import ROOT, run_ranks
from tiny import equal, full_parameters

from ds_memopt.engines.fsdp2_engine import fill, shard
from ds_memopt.train import fsdp2_job, presets
from ds_memopt.train.options import PretrainOptions

CPU = torch.device("cpu")
SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=53)
LLAMA = SIZES | dict(intermediate_size=37, num_key_value_heads=1, max_position_embeddings=32)
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, pad_token_id=5),
    "gpt2": transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=53, n_positions=32),
    "experts": transformers.MixtralConfig(**LLAMA, num_local_experts=3),
}


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return full_parameters(model) | {name: buffer.clone() for name, buffer in model.named_buffers()}


def built_on_two_ranks() -> dict[str, tuple[bool, bool]]:
    """For each family whether all matrices are cut, and whether weights and buffers are those of a whole model, whose
    files may hold buffers too."""
    results = {}
    for family, config in CONFIGS.items():
        whole = presets.build_model("", config, 3, CPU, partitioned=False)
        whole.register_buffer("counted", torch.full((3,), 7.0))
        expected = whole_weights(whole)
        whole = whole if dist.get_rank() == 0 else None
        model = presets.build_without_weights(config)
        model.register_buffer("counted", torch.zeros(3))
        assert all(p.is_meta for p in model.parameters())
        shard(model)
        fill(model, whole, CPU)
        cut = all(0 < p.to_local().numel() < p.numel() for p in model.parameters() if p.dim() > 1)
        results[family] = cut, equal(whole_weights(model), expected)
    return results


def test_a_model_that_is_filled_when_sharded_is_a_whole_one():
    assert run_ranks(built_on_two_ranks, 2) == [dict.fromkeys(CONFIGS, (True, True))] * 2


def trained_further(source: Path, faulty: list[Path], output: Path) -> tuple[int, list[str]]:
    """One step at a learning rate of 0 from a folder with weights. Returns how often this rank built a whole model, and
    what is said of faulty folders."""
    options = dict(
        deepspeed_config=str(ROOT / "ds_configs/zero3_adam_mini.json"), data="synthetic", steps=1, lr=0.0,
        seq_length=16, micro_batch=1, accumulation=1, schedule="constant", validation_interval=0, save_interval=1,
    )  # fmt: skip
    build = mock.Mock(side_effect=fsdp2_job.build_model)
    with mock.patch.object(fsdp2_job, "build_model", build), contextlib.redirect_stdout(io.StringIO()):
        fsdp2_job.pretrain_fsdp2(PretrainOptions(model=str(source), output_dir=str(output), **options))
        calls, said = build.call_count, []
        for folder in faulty:
            try:
                fsdp2_job.pretrain_fsdp2(PretrainOptions(model=str(folder), output_dir=f"{output} 2", **options))
            except ValueError as error:
                said.append(str(error))
    return calls, said


def test_training_goes_on_from_a_folder_with_weights(tmp_path):
    source, lacking, apart = (tmp_path / name for name in ("source", "lacking", "apart"))
    model = transformers.LlamaForCausalLM(CONFIGS["llama"])
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    for folder in (source, lacking, apart):
        model.save_pretrained(folder)
    weights = load_file(lacking / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    config = json.loads((apart / "config.json").read_text())
    (apart / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    first, second = run_ranks(trained_further, 2, source, [lacking, apart], tmp_path / "run")
    assert (first[0], second[0]) == (1, 0) and first[1] == second[1]
    assert "lack 1 weights of LlamaForCausalLM, such as model.norm.weight" in first[1][0]
    assert "apart holds a lm_head.weight of its own, which its config.json ties to another weight: set" in first[1][1]
    saved = tmp_path / "run/model"
    assert equal(load_file(saved / "model.safetensors"), load_file(source / "model.safetensors"))
    assert json.loads((saved / "generation_config.json").read_text())["temperature"] == 0.3


def test_another_device_draws_the_numbers_of_a_tensor():
    """The CPU those of tensors on the meta device: as many, in the same order, as for a model that it holds."""
    presets.build_model("", CONFIGS["gpt2"], 3, CPU, partitioned=False)
    expected = torch.get_rng_state()
    for drawing, same in ((presets._DrawOn(CPU), True), (contextlib.nullcontext(), False)):
        model = presets.build_without_weights(CONFIGS["gpt2"])
        torch.manual_seed(3)
        with drawing:
            model.init_weights()
        assert torch.equal(torch.get_rng_state(), expected) == same
    before = torch.get_rng_state()
    with presets._DrawOn(CPU):  # fills nothing that was there
        assert torch.bernoulli(torch.ones(3, device="meta")).is_meta
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_weights_into_cpu_memory():
    def drawn(device: str) -> dict[str, torch.Tensor]:
        return whole_weights(presets.build_model("", CONFIGS["llama"], 3, torch.device(device), partitioned=False))

    with torch.device("cuda"):
        torch.manual_seed(3)
        first = torch.empty(53, 24).normal_(std=0.02)
    ours = drawn("cuda")
    assert {p.device.type for p in ours.values()} == {"cpu"}
    assert torch.equal(ours["model.embed_tokens.weight"], first.cpu()) and not equal(ours, drawn("cpu"))
