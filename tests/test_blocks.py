"""How parameters are cut into blocks: each family is checked against its own attention code, not against names."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from adam_mini import Adam_mini
from tiny import llama
from torch import nn

from ds_memopt.blocks import Columns, Contiguous, assign_blocks, assign_blocks_by_name, format_assignment

C, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 24, 4, 2, 10, 40, 101
WIDTH = C // HEADS  # head size of the families that have no head_dim of their own
MHA = dict(vocab_size=VOCAB, hidden_size=C, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS)
MHA |= dict(max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
GQA = MHA | dict(num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM)
MOE = dict(num_local_experts=3, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
FALCON = MHA | dict(alibi=False, bias=False)
MLA = dict(num_key_value_heads=HEADS, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=7)
MLA |= MHA | dict(n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=8, first_k_dense_replace=1)
CLIP = MHA | dict(image_size=8, patch_size=4, num_attention_heads=3, model_type="clip_vision_model")
FAMILIES = {
    "llama": ("LlamaForCausalLM", GQA),
    "qwen2": ("Qwen2ForCausalLM", MHA | dict(num_key_value_heads=KV_HEADS)),
    "qwen3": ("Qwen3ForCausalLM", GQA),
    "mistral": ("MistralForCausalLM", GQA),
    "phi3": ("Phi3ForCausalLM", MHA | dict(num_key_value_heads=KV_HEADS)),
    "gpt2": ("GPT2LMHeadModel", MHA | dict(n_inner=FFN)),
    "gpt_neox": ("GPTNeoXForCausalLM", MHA),
    "bloom": ("BloomForCausalLM", MHA),
    "opt": ("OPTForCausalLM", MHA | dict(word_embed_proj_dim=C)),
    "bigcode_mqa": ("GPTBigCodeForCausalLM", MHA | dict(multi_query=True)),
    "bigcode_mha": ("GPTBigCodeForCausalLM", MHA | dict(multi_query=False)),
    "codegen": ("CodeGenForCausalLM", MHA | dict(hidden_size=48, num_attention_heads=8, rotary_dim=2)),
    "falcon_mqa": ("FalconForCausalLM", FALCON | dict(multi_query=True)),
    "falcon_mha": ("FalconForCausalLM", FALCON | dict(multi_query=False)),
    "falcon_gqa": ("FalconForCausalLM", FALCON | dict(new_decoder_architecture=True, num_kv_heads=KV_HEADS)),
    "mixtral": ("MixtralForCausalLM", GQA | MOE),
    "gpt_oss": ("GptOssForCausalLM", GQA | MOE | dict(intermediate_size=C)),
    "llama4": ("Llama4ForCausalLM", GQA | MOE | dict(intermediate_size_mlp=FFN, interleave_moe_layer_step=1)),
    "deepseek": ("DeepseekV3ForCausalLM", MLA | dict(q_lora_rank=12)),
    "deepseek_lite": ("DeepseekV3ForCausalLM", MLA | dict(q_lora_rank=None)),
    "qwen3_next": ("Qwen3NextForCausalLM", GQA | MOE | dict(layer_types=["linear_attention", "full_attention"])),
    "t5": ("T5ForConditionalGeneration", MHA | dict(d_kv=5)),
    "vit": ("ViTModel", MHA | dict(image_size=8, patch_size=4)),
    "llava": ("LlavaForConditionalGeneration", dict(text_config=GQA | {"model_type": "llama"}, vision_config=CLIP)),
    "torch": lambda: nn.TransformerEncoderLayer(C, HEADS, FFN, batch_first=True, dropout=0.0),
    "torch_kdim": lambda: nn.MultiheadAttention(C, HEADS, kdim=7, vdim=9, add_bias_kv=True),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv1d(8, 4, 5), nn.ConvTranspose2d(4, 6, 3)
    ),
    "mlp": lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 1)),
}


def build(family, **more):
    """A tiny model; weights of unit size and no biases, so that a zeroed block shows as zeros."""
    torch.manual_seed(0)
    if callable(FAMILIES[family]):
        model = FAMILIES[family]()
    else:
        model_class = getattr(tf, FAMILIES[family][0])
        model = model_class(model_class.config_class(**FAMILIES[family][1] | more)).eval()
    for name, p in model.named_parameters():
        nn.init.zeros_(p) if "bias" in name else nn.init.normal_(p, std=0.5)
    return model


def build_with_lora():
    """The layout of peft: the frozen layer under base_layer, the factors in dictionaries by adapter."""
    model = build("llama")
    for layer in model.model.layers:
        wrapped, base = nn.Module(), layer.self_attn.q_proj
        wrapped.base_layer = base
        wrapped.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 3, bias=False)})
        wrapped.lora_B = nn.ModuleDict({"default": nn.Linear(3, base.out_features, bias=False)})
        layer.self_attn.q_proj = wrapped
    return model


def block_ids(blocks):
    """The block of each element, in the parameter's own shape, written out one element after another."""
    ids, first = [], 0
    for section in blocks.sections:
        if isinstance(section, Contiguous):
            ids += [first + i // section.length for i in range(section.length * section.count)]
        else:
            widths = [width for width, count in section.runs for _ in range(count)]
            ids += [first + block for block, width in enumerate(widths) for _ in range(width)] * section.rows
        first += section.num_blocks
    return torch.tensor(ids, dtype=torch.int64).reshape(blocks.shape)


def zero_one_block_at_a_time(weight, blocks):
    ids = block_ids(blocks)
    for block in range(blocks.num_blocks):
        kept = weight.detach().clone()
        weight.data[ids == block] = 0
        yield block
        weight.data.copy_(kept)


@pytest.mark.parametrize("family", [*FAMILIES, "lora"])
def test_every_element_belongs_to_exactly_one_block(family):
    model = build_with_lora() if family == "lora" else build(family)
    assignment = assign_blocks(model)
    assert list(assignment) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        ids = block_ids(assignment[name])
        assert ids.shape == p.shape, name
        assert torch.equal(ids.unique(), torch.arange(assignment[name].num_blocks)), name
        if p.ndim > 1 and p.shape[0] > 1:
            assert assignment[name].num_blocks > 1, f"one block for the whole matrix {name} {tuple(p.shape)}"


class Captured(Exception):
    """Ends a forward pass once its first attention call has been seen."""


# The functions that receive (or, marked, return) queries, keys and values where a family has its own.
SPLITS = {"BloomAttention": "_reshape", "FalconAttention": "_split_heads", "CodeGenAttention": "_attn"}


def watch_attention(monkeypatch, model, attention, inputs, repeated=1):
    """A function that runs `model` and returns, by unit, what its first attention call reads: the queries of each
    query head, the keys of each key head, each value channel. repeated: how often the code lists a key head."""
    family = type(attention).__name__
    if family in SPLITS:
        owner, function = type(attention), SPLITS[family]
    elif family == "MultiheadAttention":
        owner, function = nn.functional, "scaled_dot_product_attention"
    else:
        owner, function = sys.modules[type(attention).__module__], "eager_attention_forward"
    original, seen = getattr(owner, function), []

    def spy(*args, **kwargs):
        tensors = original(*args, **kwargs) if function in ("_reshape", "_split_heads") else args
        heads_last = function == "_split_heads"
        seen[:] = [(t.transpose(1, 2) if heads_last else t) for t in tensors if isinstance(t, torch.Tensor)][:3]
        raise Captured

    monkeypatch.setattr(owner, function, spy)

    def units():
        with pytest.raises(Captured):
            model(**inputs)
        queries, keys, values = (t.detach().clone() for t in seen)
        found = {("q", head): queries[:, head] for head in range(queries.shape[1])}
        for head, position in enumerate(range(0, keys.shape[1], repeated)):
            found["k", head] = keys[:, position]
            found |= {("v", head, c): values[:, position, :, c] for c in range(values.shape[-1])}
        return found

    return units


def units_zeroed_by_blocks(units, weight, blocks):
    """For each block, the units that vanish when its weights are zero; checks that nothing else moves."""
    before, zeroed = units(), []
    assert all(values.any() for values in before.values())
    for _ in zero_one_block_at_a_time(weight, blocks):
        after = units()
        zeroed.append([unit for unit, values in after.items() if not values.any()])
        assert all(torch.equal(after[unit], before[unit]) for unit in after.keys() - set(zeroed[-1]))
    return zeroed


TOKENS = {"input_ids": torch.tensor([[5, 17, 3, 60]])}
SPLIT = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
ATTENTION = {  # where the attention module is, and its query, key and value weights
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "mixtral", "gpt_oss"], ("model.layers.0.self_attn", SPLIT)),
    "opt": ("model.decoder.layers.0.self_attn", SPLIT),
    "vit": ("layers.0.attention", SPLIT),
    "t5": ("encoder.block.0.layer.0.SelfAttention", ["q.weight", "k.weight", "v.weight"]),
    "phi3": ("model.layers.0.self_attn", ["qkv_proj.weight"]),
    **dict.fromkeys(["gpt2", "bigcode_mqa", "bigcode_mha"], ("transformer.h.0.attn", ["c_attn.weight"])),
    "codegen": ("transformer.h.0.attn", ["qkv_proj.weight"]),
    "gpt_neox": ("gpt_neox.layers.0.attention", ["query_key_value.weight"]),
    **dict.fromkeys(
        ["bloom", "falcon_mqa", "falcon_mha", "falcon_gqa"],
        ("transformer.h.0.self_attention", ["query_key_value.weight"]),
    ),
    "torch": ("self_attn", ["in_proj_weight"]),
}


@pytest.mark.parametrize("family", ATTENTION)
def test_a_block_is_one_query_head_one_key_head_or_one_value_channel(family, monkeypatch):
    """Over all blocks, each head and each value channel vanishes exactly once, and alone."""
    model, (path, weights) = build(family), ATTENTION[family]
    special = {"vit": {"pixel_values": torch.randn(1, 3, 8, 8)}, "torch": {"src": torch.randn(1, 4, C)}}
    repeated = HEADS // KV_HEADS if family == "falcon_gqa" else 1
    units = watch_attention(monkeypatch, model, model.get_submodule(path), special.get(family, TOKENS), repeated)
    assignment, zeroed = assign_blocks(model), []
    for name in (f"{path}.{weight}" for weight in weights):
        zeroed += units_zeroed_by_blocks(units, model.get_parameter(name), assignment[name])
    assert all(len(vanished) == 1 for vanished in zeroed), zeroed
    assert sorted(vanished[0] for vanished in zeroed) == sorted(units())


def test_latent_attention_and_gated_queries(monkeypatch):
    """DeepSeek's q_b_proj makes the query heads; Qwen3-Next's q_proj holds, head by head, a query and its gate."""
    model, path = build("deepseek"), "model.layers.0.self_attn"
    units = watch_attention(monkeypatch, model, model.get_submodule(path), TOKENS)
    weight, blocks = model.get_parameter(f"{path}.q_b_proj.weight"), assign_blocks(model)[f"{path}.q_b_proj.weight"]
    assert units_zeroed_by_blocks(units, weight, blocks) == [[("q", head)] for head in range(HEADS)]
    assert assign_blocks(build("deepseek_lite"))[f"{path}.q_proj.weight"].sections == (Contiguous((5 + 4) * C, HEADS),)
    model, path = build("qwen3_next"), "model.layers.1.self_attn"
    units = watch_attention(monkeypatch, model, model.get_submodule(path), TOKENS)
    weight, blocks = model.get_parameter(f"{path}.q_proj.weight"), assign_blocks(model)[f"{path}.q_proj.weight"]
    one_head = [[("q", 0)]] + [[]] * HEAD_DIM  # a head, then its gate row by row
    assert units_zeroed_by_blocks(units, weight, blocks)[: 1 + HEAD_DIM] == one_head
    assert blocks.num_blocks == HEADS * (1 + HEAD_DIM)


def channels_zeroed_by_blocks(run, weight, blocks, dim=-1):
    zeroed = []
    for _ in zero_one_block_at_a_time(weight, blocks):
        zeroed.append([c for c, values in enumerate(run().movedim(dim, 0)) if not values.any()])
    return zeroed


@pytest.mark.parametrize(
    ("family", "path", "inputs", "dim"),
    [
        ("gpt2", "transformer.h.0.mlp.c_fc", (3, C), -1),
        ("gpt2", "transformer.h.0.mlp.c_proj", (3, FFN), -1),
        ("llama", "model.layers.0.mlp.gate_proj", (3, C), -1),
        ("llama", "model.layers.0.self_attn.o_proj", (3, HEADS * HEAD_DIM), -1),
        ("conv", "0", (2, 3, 5, 5), 1),
        ("conv", "2", (2, 8, 6), 1),
    ],
)
def test_a_block_of_any_other_layer_is_one_output_neuron(family, path, inputs, dim):
    model, x = build(family), torch.randn(inputs)
    layer, blocks = model.get_submodule(path), assign_blocks(model)[f"{path}.weight"]
    zeroed = channels_zeroed_by_blocks(lambda: layer(x), layer.weight, blocks, dim)
    assert zeroed == [[channel] for channel in range(layer(x).shape[dim])]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_a_block_of_stacked_experts_is_one_output_neuron_of_one_expert(family):
    model, x = build(family), torch.randn(5, C)
    name, experts = next((n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Experts"))
    assignment = assign_blocks(model)

    def run():
        """What each expert makes of x, side by side: [5, 3 * C]."""
        if family == "llama4":  # takes the tokens of each expert in turn
            return torch.cat(experts(x.repeat(3, 1)).chunk(3), dim=1)
        return torch.cat([experts(x, torch.full((5, 1), e), torch.ones(5, 1)) for e in range(3)], dim=1)

    zeroed = channels_zeroed_by_blocks(run, experts.down_proj, assignment[f"{name}.down_proj"])
    assert zeroed == [[neuron] for neuron in range(3 * C)]
    inner = C if family == "gpt_oss" else FFN  # where down_proj is square, sizes alone would not tell how it is stored
    rows, columns = (Contiguous(C, 3 * 2 * inner),), (Columns(C, ((1, 2 * inner),)),) * 3
    assert assignment[f"{name}.gate_up_proj"].sections == (rows if family == "mixtral" else columns)


def test_exact_counts():
    def counts(model, *names):
        assignment = assign_blocks(model)
        return [assignment[name].num_blocks for name in names]

    layer, attn = "model.layers.1.", "model.layers.1.self_attn."
    llama = {
        "model.embed_tokens.weight": ("embedding", (Contiguous(C, VOCAB),)),
        attn + "q_proj.weight": ("query", (Contiguous(HEAD_DIM * C, HEADS),)),
        attn + "q_proj.bias": ("bias", (Contiguous(1, HEADS * HEAD_DIM),)),
        attn + "k_proj.weight": ("key", (Contiguous(HEAD_DIM * C, KV_HEADS),)),
        attn + "v_proj.weight": ("value", (Contiguous(C, KV_HEADS * HEAD_DIM),)),
        attn + "o_proj.weight": ("attention output", (Contiguous(HEADS * HEAD_DIM, C),)),
        layer + "mlp.down_proj.weight": ("mlp", (Contiguous(FFN, C),)),
        layer + "input_layernorm.weight": ("norm", (Contiguous(C, 1),)),
        "lm_head.weight": ("lm_head", (Contiguous(C, VOCAB),)),
    }
    assignment = assign_blocks(build("llama", attention_bias=True))
    assert {name: (assignment[name].role, assignment[name].sections) for name in llama} == llama
    assert "lm_head.weight" not in assign_blocks(build("llama", tie_word_embeddings=True))
    assert counts(build("qwen3"), attn + "q_norm.weight", attn + "k_norm.weight") == [1, 1]
    assert counts(build("qwen2"), attn + "q_proj.bias", attn + "k_proj.bias") == [24, 12]
    assert counts(build("phi3"), layer + "mlp.gate_up_proj.weight") == [2 * FFN]
    assert counts(build("mixtral"), layer + "mlp.gate.weight") == [3]
    assert counts(build("gpt2"), "transformer.wpe.weight", "transformer.ln_f.weight") == [32, 1]
    assert counts(build("deepseek"), attn + "q_a_proj.weight", attn + "kv_b_proj.weight") == [12, HEADS * (5 + 7)]
    lora = [attn + f"q_proj.{part}.weight" for part in ("base_layer", "lora_A.default", "lora_B.default")]
    assert counts(build_with_lora(), *lora) == [HEADS, 3, HEADS * HEAD_DIM]
    assert [assign_blocks(build_with_lora())[name].role for name in lora] == ["query", "lora", "lora"]
    assert counts(build("conv"), "0.weight", "1.weight", "1.bias", "2.weight", "3.weight") == [8, 1, 8, 4, 4]
    assert assign_blocks(build("conv"))["3.weight"].rule == "per input channel"
    assert counts(build("torch_kdim"), "q_proj_weight", "k_proj_weight", "v_proj_weight") == [4, 4, 24]
    assert counts(build("mlp"), "0.weight", "0.bias", "2.weight") == [5, 5, 1]
    cross = assign_blocks(build("gpt2", add_cross_attention=True))  # queries apart, keys and values together
    runs = [cross[f"transformer.h.0.crossattention.{name}.weight"].sections[0].runs for name in ("q_attn", "c_attn")]
    assert runs == [((WIDTH, HEADS),), ((WIDTH, HEADS), (1, C))]
    assert counts(build("vit"), "embeddings.cls_token", "embeddings.position_embeddings") == [C, 5]
    text, vision = "model.language_model.layers.1.self_attn.", "model.vision_tower.encoder.layers.1.self_attn."
    assert counts(build("llava"), text + "q_proj.weight", text + "k_proj.weight") == [HEADS, KV_HEADS]
    assert counts(build("llava"), vision + "q_proj.weight", vision + "k_proj.weight") == [3, 3]


class PerLayerConfig:
    """Like a transformers configuration whose layers differ: reading such a size from the whole is an error."""

    num_attention_heads = 4

    @property
    def head_dim(self):
        raise RuntimeError("'head_dim' is a per-layer attribute")


@pytest.mark.parametrize(
    ("stated", "rule", "counts"),
    [
        ({}, "per row (no head size found)", [40, 20]),
        ({"head_dim": 7}, "per row (shape does not divide into heads of 7)", [40, 20]),
        ({"num_heads": 4}, "per head (10x24)", [4, 2]),  # the key matrix takes its head size from the query's
        ({"num_heads": 4, "config": SimpleNamespace(head_dim=5)}, "per head (10x24)", [4, 2]),  # the nearest counts
        (
            {"head_dim": 4, "qk_head_dim": 20},
            "per head (20x24)",
            [2, 1],
        ),  # latent attention: head_dim is its rotary part
        ({"head_dim": 4, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}, "per head (10x24)", [4, 2]),
        ({"config": PerLayerConfig()}, "per head (10x24)", [4, 2]),
        ({"config": SimpleNamespace(text_config=SimpleNamespace(head_dim=5))}, "per head (5x24)", [8, 4]),
        ({"config": SimpleNamespace()}, "per row (no head size found)", [40, 20]),  # asks no configuration further out
    ],
)
def test_head_sizes_that_are_missing_or_do_not_fit(stated, rule, counts):
    attention = nn.Module()
    attention.q_proj, attention.k_proj = nn.Linear(C, 40, bias=False), nn.Linear(C, 20, bias=False)
    for name, value in stated.items():
        setattr(attention, name, value)
    outer = nn.Sequential(attention)
    outer.config = SimpleNamespace(head_dim=4) if "config" in stated else None
    cut = assign_blocks(outer)
    assert cut["0.q_proj.weight"].rule == rule
    assert [blocks.num_blocks for blocks in cut.values()] == counts


def test_fused_heads_that_do_not_add_up_and_unknown_parameters_fall_back_to_rows():
    fused = nn.Module()
    fused.qkv_proj, fused.num_heads, fused.head_dim = nn.Linear(C, 70, bias=False), 4, 10
    blocks = assign_blocks(fused)["qkv_proj.weight"]
    assert (blocks.rule, blocks.num_blocks) == ("per row (shape does not divide into heads of 10)", 70)
    shapes = {"a.weight": (6, 5), "b": (3, 4, 5), "c": (7,), "scale": (), "token": (1, 1, 9), "positions": (1, 4, 9)}
    shapes |= {"conv.weight": (4, 2, 3), "q_norm.weight": (8,)}
    counts = {name: blocks.num_blocks for name, blocks in assign_blocks_by_name(shapes).items()}
    assert list(counts.values()) == [6, 12, 7, 1, 9, 4, 4, 1]


def test_parameters_that_zero3_has_taken_away_keep_their_shape():
    model = build("llama")
    expected = assign_blocks(model)
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    assert assign_blocks(model) == expected


def test_classes_that_fully_shard_swaps_in_are_recognised():
    model = build("gpt2")
    expected = assign_blocks(model)
    for module in model.modules():
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert assign_blocks(model) == expected


def test_a_linear_layers_own_configuration_tells_no_sizes():
    """As that of torchao's layers in float8: queries lost their heads."""
    model = llama()
    before = assign_blocks(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.config = SimpleNamespace(emulate=True)
    assert assign_blocks(model) == before


def test_value_blocks_whole():
    def sections(family, name):
        return assign_blocks(build(family), value_blocks="whole")[name].sections

    assert sections("llama", "model.layers.0.self_attn.v_proj.weight") == (Contiguous(KV_HEADS * HEAD_DIM * C, 1),)
    query_key_value = (Contiguous(WIDTH * C, HEADS + KV_HEADS), Contiguous(KV_HEADS * WIDTH * C, 1))
    assert sections("phi3", "model.layers.0.self_attn.qkv_proj.weight") == query_key_value
    columns = Columns(C, ((WIDTH, 2 * HEADS), (C, 1)))
    assert sections("gpt2", "transformer.h.0.attn.c_attn.weight") == (columns,)
    with pytest.raises(ValueError, match="'gpt_neox.layers.0.*query_key_value.weight'.*Use value_blocks='rows'"):
        assign_blocks(build("gpt_neox"), value_blocks="whole")
    with pytest.raises(ValueError, match="value_blocks='row': must be 'rows' or 'whole'"):
        assign_blocks(nn.Linear(2, 2), value_blocks="row")


HEAD_DIM_BY_NAME = dict.fromkeys(["llama", "qwen3", "mixtral", "lora"], HEAD_DIM) | {"t5": 5}
HEAD_DIM_BY_NAME |= dict.fromkeys(["gpt2", "gpt_neox", "bloom", "opt", "vit"], WIDTH)


@pytest.mark.parametrize("family", HEAD_DIM_BY_NAME)
def test_names_and_shapes_alone_give_the_same_cut(family):
    model = build_with_lora() if family == "lora" else build(family)
    by_name = assign_blocks_by_name({name: p.shape for name, p in model.named_parameters()}, HEAD_DIM_BY_NAME[family])
    assert {n: b.sections for n, b in by_name.items()} == {n: b.sections for n, b in assign_blocks(model).items()}


def test_errors_by_name():
    shapes = {f"layers.{i}.{p}_proj.weight": (8, 4) for i in range(3) for p in "qkv"}
    with pytest.raises(ValueError) as error:
        assign_blocks_by_name(shapes)
    assert str(error.value) == (
        "Queries and keys are cut by attention head, but names and shapes do not tell a head's size: "
        "layers.0.q_proj.weight, layers.0.k_proj.weight, layers.1.q_proj.weight, layers.1.k_proj.weight and 2 more. "
        "Pass head_dim=..., or build the optimizer with AdamMini.from_model(model, ...), which reads it."
    )
    with pytest.raises(ValueError, match="size: c_attn.weight. Pass"):
        assign_blocks_by_name({"c_attn.weight": (4, 12)})
    with pytest.raises(ValueError, match="head_dim=0: must be at least 1"):
        assign_blocks_by_name(shapes, head_dim=0)
    fused = assign_blocks_by_name({"qkv_proj.weight": (8, 4)}, head_dim=2)["qkv_proj.weight"]
    assert (fused.rule, fused.num_blocks) == ("per row (number of heads unknown)", 8)


def test_adam_mini_1_1_1_keeps_the_same_means():
    """On a plain multi-head Llama, where its rules are right, its state after one step is 0.1 x the mean of g² over
    each of our blocks: not only their number, also their borders and order."""
    model = build("llama", num_key_value_heads=HEADS, head_dim=WIDTH, attention_bias=True)
    model(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
    theirs = Adam_mini(model.named_parameters(), dim=C, n_heads=HEADS, betas=(0.9, 0.9), verbose=False)
    theirs.step()
    for name, blocks in assign_blocks(model).items():
        p, ids = model.get_parameter(name), block_ids(blocks).flatten().numpy()
        means = np.bincount(ids, weights=p.grad.double().square().flatten()) / np.bincount(ids)
        state = theirs.state[p]["v" if "bias" in name else "vmean"].flatten().double().numpy()
        assert len(state) == blocks.num_blocks, name
        np.testing.assert_allclose(state, 0.1 * means, rtol=1e-5, err_msg=name)  # a border moved by one: 1e-1


def test_the_table_groups_layers_and_sums_up():
    assignment = assign_blocks(build("llama", num_hidden_layers=4))
    del assignment["model.layers.2.mlp.up_proj.weight"]
    table = format_assignment(assignment).splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in table]
    assert ["model.layers.{0..3}.self_attn.q_proj.weight", "40x24", "query", "per head (10x24)", "4 x 4 blocks"] in rows
    assert ["model.layers.{0..1,3}.mlp.up_proj.weight", "40x24", "mlp", "per row", "3 x 40 blocks"] in rows
    assert ["model.norm.weight", "24", "norm", "whole", "1 block"] in rows
    ids = [block_ids(blocks) for blocks in assignment.values()]
    numel, blocks = sum(i.numel() for i in ids), sum(len(i.unique()) for i in ids)
    assert table[-1] == f"total: {numel:,} parameters in {len(ids)} tensors, {blocks:,} blocks"
