"""How a model is divided into the blocks that take turns, on tiny models of each family."""

import re

import pytest
import torch
import transformers as tf
from torch import nn

from ds_memopt.blocks.partition import partition_into_blocks

NO_LIST = "no nn.ModuleList, nn.ModuleDict or nn.Sequential of two or more layers to train. Set blocks to patterns"
SIZES = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2)
SIZES |= dict(max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
T5 = SIZES | dict(d_kv=4, num_layers=3, num_decoder_layers=3, decoder_start_token_id=0)
# Much smaller than the text model, as vision towers are, though of more layers.
CLIP = dict(hidden_size=4, intermediate_size=4, num_attention_heads=2, image_size=8, patch_size=4, num_hidden_layers=5)
CLIP |= {"model_type": "clip_vision_model"}


class Layer(nn.Module):
    """A layer with more experts than the model has layers, and projections that stand in it directly."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q_proj = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 5)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.embed_out = nn.Linear(4, 7)


class Decoder(Experts):
    """The layers in an nn.ModuleDict, as torchtitan has them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(self.layers)})


class NanoGPT(nn.Module):
    """An nn.ModuleDict around the list of layers is no list of layers, though two members are of one class."""

    def __init__(self):
        super().__init__()
        parts = Experts()
        ends = dict(wte=parts.tok_embeddings, wpe=nn.Embedding(9, 4))
        self.transformer = nn.ModuleDict(ends | dict(h=parts.layers, ln_f=parts.norm))


class Blocks(nn.Module):
    """The layers in an nn.Sequential, as timm has them, behind another one, which holds no layers."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.blocks = nn.Sequential(*Experts().layers)
        self.norm = nn.LayerNorm(4)


class Stages(nn.Module):
    """A ResNet: a list of layers for each stage, of which the last is larger by far."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.layer1 = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))
        self.layer2 = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4 * 9)) for _ in range(3)))


def flat_sequential():
    """The whole model in one nn.Sequential, ends and layers."""
    ends = Experts()
    return nn.Sequential(*ends.layers, ends.norm, ends.embed_out)


def torch_layers():
    return nn.ModuleDict({"mlp_stack": nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 3)})


LLAVA = dict(text_config=SIZES | {"model_type": "llama"}, vision_config=CLIP)
FAMILIES = {
    "llama": ("LlamaForCausalLM", SIZES, "model.layers"),
    "tied_llama": ("LlamaForCausalLM", SIZES | dict(tie_word_embeddings=True), "model.layers"),
    "gpt2": ("GPT2LMHeadModel", SIZES, "transformer.h"),
    "bert": ("BertForSequenceClassification", SIZES, "bert.encoder.layer"),
    "opt": ("OPTForCausalLM", SIZES | dict(word_embed_proj_dim=4), "model.decoder.layers"),
    "t5": ("T5ForConditionalGeneration", T5, "encoder.block decoder.block"),
    "mixtral": ("MixtralForCausalLM", SIZES | dict(num_local_experts=5), "model.layers"),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES, "gpt_neox.layers"),
    "vit": ("ViTModel", SIZES | dict(image_size=8, patch_size=4), "layers"),
    "llava": ("LlavaForConditionalGeneration", LLAVA, "model.language_model.layers"),
    "experts": (Experts, None, "layers"),
    "torch": (torch_layers, None, "mlp_stack.layers"),
    "torchtitan": (Decoder, None, "layers"),
    "nanogpt": (NanoGPT, None, "transformer.h"),
    "timm": (Blocks, None, "blocks"),
    "resnet": (Stages, None, "layer1 layer2"),
    "sequential": (flat_sequential, None, ""),
}


def build(family):
    kind, config, _ = FAMILIES[family]
    with torch.device("meta"):
        return getattr(tf, kind)(getattr(tf, kind).config_class(**config)) if config else kind()


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def divide(model, trainable=None, **options):
    """The partition, checked to hold each trainable parameter once, in the order of the model, and no empty block."""
    trainable = names_of(model) if trainable is None else trainable
    partition = partition_into_blocks(model, trainable, **options)
    parts = [*partition.blocks.values(), partition.always_active, partition.never_trained]
    assert sorted(name for part in parts for name in part) == sorted(trainable)
    order = {name: i for i, name in enumerate(names_of(model))}
    assert all(list(part) == sorted(part, key=order.get) for part in parts)
    assert all(parts[:-2])
    return partition


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_a_block(family):
    model = build(family)
    partition = divide(model)
    layers = [f"{path}.{i}".lstrip(".") for path in FAMILIES[family][2].split() or [""] for i in range(3)]
    assert list(partition.blocks) == layers
    for layer in layers:
        assert list(partition.blocks[layer]) == [n for n in names_of(model) if n.startswith(f"{layer}.")]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "resnet"])
def test_sublayers_split_every_layer_in_two(family):
    model = build(family)
    whole, halves = divide(model).blocks, divide(model, blocks="sublayer").blocks
    assert list(halves) == [f"{layer}.{half}" for layer in whole for half in ("attention", "mlp")]
    for layer, names in whole.items():
        assert sorted(names) == sorted(halves[f"{layer}.attention"] + halves[f"{layer}.mlp"])


@pytest.mark.parametrize(
    "family, mlp",
    [
        ("llama", "mlp.gate_proj mlp.up_proj mlp.down_proj post_attention_layernorm"),
        ("mixtral", "mlp.gate mlp.experts.gate_up_proj mlp.experts.down_proj post_attention_layernorm"),
        ("gpt2", "ln_2 mlp.c_fc mlp.c_proj"),
        ("bert", "intermediate.dense output.dense output.LayerNorm"),
        ("opt", "fc1 fc2 final_layer_norm"),
        ("gpt_neox", "post_attention_layernorm mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        ("vit", "layernorm_after mlp.fc1 mlp.fc2"),
        ("experts", "gate experts.0 experts.1 experts.2 experts.3 experts.4"),
        ("torch", "linear1 linear2 norm2"),
    ],
)
def test_the_mlp_has_its_matrices_biases_and_norm(family, mlp):
    layer = FAMILIES[family][2] + ".1."
    names = divide(build(family), blocks="sublayer").blocks[layer + "mlp"]
    modules = dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name.removeprefix(layer)) for name in names)
    assert sorted(modules) == sorted(mlp.split())


def test_norms_of_t5_go_with_the_sublayer_that_they_stand_in():
    blocks = divide(build("t5"), blocks="sublayer").blocks
    for mlp, path in (("encoder.block.1", "layer.1"), ("decoder.block.1", "layer.2")):
        dense = tuple(f"{mlp}.{path}.DenseReluDense.{matrix}" for matrix in ("wi.weight", "wo.weight"))
        assert blocks[f"{mlp}.mlp"] == (*dense, f"{mlp}.{path}.layer_norm.weight")
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in blocks["encoder.block.0.attention"]


@pytest.mark.parametrize(
    "family, embedding, head",
    [
        ("llama", "model.embed_tokens", "model.norm lm_head"),
        ("tied_llama", "model.embed_tokens", "model.norm"),
        ("gpt2", "transformer.wte transformer.wpe", "transformer.ln_f"),
        ("opt", "embed_tokens embed_positions project_in", "project_out final_layer_norm"),
        ("t5", "shared", "encoder.final_layer_norm decoder.final_layer_norm"),
        ("gpt_neox", "gpt_neox.embed_in", "gpt_neox.final_layer_norm lm_head"),
        ("bert", "word_embeddings position_embeddings token_type_embeddings embeddings.LayerNorm", "pooler classifier"),
        ("vit", "cls_token position_embeddings patch_embeddings", "layernorm pooler.dense"),
        ("llava", "language_model.embed_tokens", "language_model.norm lm_head"),
        ("experts", "tok_embeddings", "norm embed_out"),
        ("torchtitan", "tok_embeddings", "norm embed_out"),
    ],
)
def test_embedding_comes_first_and_head_last(family, embedding, head):
    model = build(family)
    partition = divide(model, include_embedding=True, include_lm_head=True)
    layers = list(divide(model).blocks)
    assert list(partition.blocks) == ["embedding", *layers, "lm_head"]
    for block, modules in (("embedding", embedding), ("lm_head", head)):
        for name in partition.blocks[block]:
            assert any(module in name for module in modules.split()), name
        assert all(any(module in name for name in partition.blocks[block]) for module in modules.split())
    other = ("vision_tower", "multi_modal_projector") if family == "llava" else ()
    assert partition.never_trained == tuple(n for n in names_of(model) if any(part in n for part in other))


def test_either_end_can_be_left_out():
    model = build("llama")
    only_embedding, only_head = divide(model, include_embedding=True), divide(model, include_lm_head=True)
    assert only_embedding.blocks["embedding"] == only_head.never_trained == ("model.embed_tokens.weight",)
    assert only_head.blocks["lm_head"] == only_embedding.never_trained == ("model.norm.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "family, tied", [("tied_llama", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")]
)
def test_a_tied_matrix_is_embedding_to_whoever_asks_for_either(family, tied):
    model = build(family)
    assert tied in divide(model).never_trained
    assert tied in divide(model, include_embedding=True).blocks["embedding"]
    blocks = divide(model, include_lm_head=True).blocks
    assert blocks["embedding"] == (tied,) and list(blocks)[0] == "embedding"
    assert all(name.split(".")[1] in ("norm", "ln_f") for name in blocks["lm_head"])


def test_only_trainable_parameters_appear():
    model = build("llama")
    norms = [name for name in names_of(model) if "norm" in name]
    blocks = divide(model, norms, blocks="sublayer").blocks
    assert blocks["model.layers.2.attention"] == ("model.layers.2.input_layernorm.weight",)
    upper = [name for name in names_of(model) if "layers.0" not in name]
    assert list(divide(model, upper).blocks) == ["model.layers.1", "model.layers.2"]
    model = build("llava")
    tower = divide(model, [name for name in names_of(model) if "vision_tower" in name])
    assert list(tower.blocks) == [f"model.vision_tower.encoder.layers.{i}" for i in range(5)]


def test_lora_factors_go_with_their_frozen_matrix():
    model = build("opt")
    for layer in model.model.decoder.layers:
        for parent, child in ((layer.self_attn, "v_proj"), (layer, "fc2")):
            wrapped = nn.Module()  # as peft lays it out
            wrapped.base_layer = getattr(parent, child)
            wrapped.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            setattr(parent, child, wrapped)
    lora = [name for name in names_of(model) if "lora" in name]
    path = "model.decoder.layers.1"
    blocks = divide(model, lora, blocks="sublayer", include_embedding=True, include_lm_head=True).blocks
    assert len(blocks) == 6 and blocks[f"{path}.attention"] == (f"{path}.self_attn.v_proj.lora_A.default.weight",)
    assert blocks[f"{path}.mlp"] == (f"{path}.fc2.lora_A.default.weight",)


def test_explicit_blocks():
    model = build("gpt2")
    partition = divide(model, blocks=[["wte", "wpe"], [r"h\.[12]\..*weight"]], always_active=["ln_f"])
    first, second = "block 0 (wte)", r"block 1 (h\.[12]\..*weight)"
    assert list(partition.blocks) == [first, second]
    assert partition.blocks[first] == ("transformer.wte.weight", "transformer.wpe.weight")
    assert len(partition.blocks[second]) == 12
    assert partition.always_active == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    assert all(".h.0." in name or "bias" in name for name in partition.never_trained)


def test_always_active_parameters_leave_the_blocks():
    partition = divide(build("llama"), always_active=["norm", "lm_head"], include_lm_head=True)
    assert len(partition.always_active) == 8 and list(partition.blocks) == [f"model.layers.{i}" for i in range(3)]
    assert partition.never_trained == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(blocks="layers"), r"^blocks='layers' is out of range: it must be \"layer\", .* Try \"layer\"\.$"),
        (dict(blocks=["wte", "wpe"]), r"^blocks=\['wte', 'wpe'\] is out of range"),
        (dict(blocks=[["wte"], []]), "a list of regular expressions for each of at least two blocks"),
        (dict(blocks=[["wte"]]), "at least two blocks"),
        (dict(include_embedding="yes"), "^include_embedding='yes' is out of range: it must be true or false"),
        (dict(include_lm_head=1), "^include_lm_head=1 is out of range: it must be true or false"),
        (dict(always_active="norm"), r"^always_active='norm' is out of range: .*Try \[\"norm\"\]"),
        (dict(always_active=["rms"]), "^always_active: 'rms' matches none of 40 parameters, such as 'transformer.wte"),
        (dict(always_active=["("]), r"^always_active: '\(' is not a regular expression \("),
        (dict(always_active=["."]), r"^always_active=\['.'\] leaves none of 40 parameters. Match fewer"),
        (dict(blocks=[["wte"], ["layers"]]), "^blocks: 'layers' matches none of 40 parameters, such as '.*Fix it"),
        (dict(blocks=[["wte"], ["we", "h"]]), r"wte.weight' is in 'block 0 \(wte\)' and in 'block 1 \(we\)'. Make"),
        (
            dict(blocks=[["wte"], ["h"]], include_lm_head=True),
            "^include_lm_head=True does not go with explicit .* List",
        ),
        (
            dict(trainable=["lm_head.weight"]),
            r"^trainable: the model has no 'lm_head.weight'. Use the names of",
        ),
        (dict(trainable=["transformer.h.0.ln_1.weight", "transformer.wte.weight"]), NO_LIST),
        (dict(model=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), NO_LIST),
    ],
)
def test_what_cannot_rotate_is_refused_with_the_remedy(options, message):
    model = options.get("model") or build("gpt2")
    with pytest.raises(ValueError, match=message):
        partition_into_blocks(**dict(model=model, trainable=names_of(model)) | options)
