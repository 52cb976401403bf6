"""What each matrix is in families whose names mislead: what GWT transforms, what decays, where the heads lie."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf
from test_blocks import zero_one_block_at_a_time
from torch import nn

from ds_memopt import GWT
from ds_memopt.blocks import assign_blocks

SIZES = dict(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GQA = SIZES | dict(num_key_value_heads=2)
MAMBA = GQA | dict(mamba_d_state=4, mamba_d_conv=2, mamba_expand=2, mamba_dt_rank=4)
MAMBA2 = MAMBA | dict(mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_ssm=32)
EMBEDDING = dict(embedding_size=8)
DISENTANGLED = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=False, type_vocab_size=0)
MAMBA_LAYERS = dict(layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=8, n_groups=1)
BART = dict(vocab_size=11, d_model=16, encoder_layers=2, decoder_layers=2)
T5 = SIZES | dict(d_kv=4, d_model=16, d_ff=24, num_layers=2, num_heads=4)
DISTILBERT = dict(vocab_size=11, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
FAMILIES = {  # class, configuration, matrices that stay dense beside embeddings, lm_head and convolutions
    "bert": ("BertForSequenceClassification", SIZES, "pooler.dense classifier"),
    "roberta": ("RobertaForSequenceClassification", SIZES, "classifier.dense classifier.out_proj"),
    "electra": ("ElectraForMaskedLM", SIZES | EMBEDDING, "electra.embeddings_project generator_predictions.dense"),
    "esm": ("EsmForMaskedLM", SIZES | dict(mask_token_id=3), "contact_head.regression lm_head.dense"),
    "deberta": ("DebertaForMaskedLM", SIZES | DISENTANGLED, "transform.dense"),
    "deberta_v2": ("DebertaV2ForMaskedLM", SIZES | DISENTANGLED, "transform.dense"),
    "albert": ("AlbertForMaskedLM", SIZES | EMBEDDING, "encoder.embedding_hidden_mapping_in predictions.dense"),
    "distilbert": ("DistilBertForMaskedLM", DISTILBERT, "vocab_transform"),
    "mpnet": ("MPNetForMaskedLM", SIZES, "lm_head.dense"),
    "longformer": ("LongformerForMaskedLM", SIZES | dict(attention_window=4), "lm_head.dense"),
    "vit": ("ViTForImageClassification", SIZES | dict(image_size=8, patch_size=4), "classifier"),
    "clip": ("CLIPTextModel", SIZES, ""),
    "bart": ("BartForSequenceClassification", BART, "classification_head.dense classification_head.out_proj"),
    "t5": ("T5ForConditionalGeneration", T5, ""),
    "modernbert": ("ModernBertForMaskedLM", SIZES, "head.dense"),
    "convnext": ("ConvNextForImageClassification", dict(hidden_sizes=[64] * 4, depths=[2] * 4), "classifier"),
    "mamba": ("MambaForCausalLM", SIZES | dict(state_size=4), "mixer.A_log mixer.x_proj mixer.dt_proj"),
    "mamba2": ("Mamba2ForCausalLM", SIZES | dict(num_heads=4, head_dim=8, n_groups=1, state_size=4), ""),
    "jamba": (
        "JambaForCausalLM",
        MAMBA | dict(num_experts=2),
        "mamba.A_log mamba.x_proj mamba.dt_proj feed_forward.router",
    ),
    "bamba": ("BambaForCausalLM", MAMBA2 | dict(attn_layer_indices=[1]), ""),
    "falcon_h1": ("FalconH1ForCausalLM", MAMBA2, ""),
    "lfm2": ("Lfm2ForCausalLM", GQA | dict(layer_types=["conv", "full_attention"]), ""),
    "nemotron_h": ("NemotronHForCausalLM", GQA | MAMBA_LAYERS, ""),
    "cohere": ("CohereForCausalLM", GQA | dict(use_qk_norm=True), "self_attn.q_norm self_attn.k_norm"),
    "lxmert": (
        "LxmertModel",
        SIZES | dict(l_layers=2, x_layers=2, r_layers=2, visual_feat_dim=8),
        "visn_fc.visn_fc visn_fc.box_fc pooler.dense",
    ),
}


def build(family, device="meta"):
    kind, config, _ = FAMILIES[family]
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(tf, kind)(getattr(tf, kind).config_class(**config))


@pytest.mark.parametrize("family", FAMILIES)
def test_gwt_transforms_every_matrix_of_the_layers_and_no_other(family, caplog):
    model = build(family)
    with caplog.at_level(logging.WARNING, "ds_memopt"):
        optimizer = GWT.from_model(model)
    dense = {}
    for name, blocks in assign_blocks(model).items():
        expected = ("embedding", "position embedding", "lm_head", "conv", "vector", "bias")
        if len(blocks.shape) > 1 and blocks.role not in expected and name not in optimizer.transformed:
            words = [word for word in name.removesuffix(".weight").split(".") if not word.isdigit()]
            dense[".".join(words[-2:])] = blocks.role
    assert " ".join(dense) == FAMILIES[family][2]
    assert not [record for record in caplog.records if record.name == "ds_memopt"]


def test_norms_with_a_row_for_each_head_do_not_decay():
    optimizer = GWT.from_model(build("cohere"), weight_decay=0.1)
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    path = "model.layers.0.self_attn."
    assert [decays[f"{path}{part}.weight"] for part in ("q_norm", "k_norm", "q_proj")] == [0.0, 0.0, 0.1]
    blocks = optimizer.roles[f"{path}q_norm.weight"]
    assert (blocks.role, blocks.num_blocks) == ("norm", 4)


def zeroed_by_blocks(parts, weight, blocks):
    """For each block the part, a head or a value channel, that vanishes when its weights are zero; [] if none does."""
    return [
        [part for part, values in parts().items() if not values.any()] for _ in zero_one_block_at_a_time(weight, blocks)
    ]


def by_head(tensor, heads, kind):
    return {(kind, head): part for head, part in enumerate(tensor.unflatten(-1, (heads, -1)).unbind(-2))}


def by_channel(tensor):
    return {("v", channel): part for channel, part in enumerate(tensor.unbind(-1))}


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("deberta", ["pos_proj", "pos_q_proj"]),
        ("deberta_v2", ["pos_key_proj", "pos_query_proj", "query_proj"]),
        ("longformer", ["query_global", "key_global"]),
        ("lxmert", ["query"]),
    ],
)
def test_projections_of_positions_and_of_global_tokens_go_by_head(family, weights):
    """Each is divided into heads by the family's own code, [..., heads x head_dim] being read head by head."""
    model, x = build(family, "cpu"), torch.randn(3, 16)
    for weight in weights:
        name = next(name for name in model.state_dict() if name.endswith(f".{weight}.weight"))
        layer = model.get_submodule(name.removesuffix(".weight"))
        heads = lambda layer=layer: by_head(x @ layer.weight.T, 4, "q")  # noqa: E731
        zeroed = zeroed_by_blocks(heads, layer.weight, assign_blocks(model)[name])
        assert zeroed == [[("q", head)] for head in range(4)]


def test_the_first_deberta_interleaves_queries_keys_and_values():
    model, x = build("deberta", "cpu"), torch.randn(1, 3, 16)
    name = "deberta.encoder.layer.0.attention.self.in_proj"
    attention, layer = model.get_submodule(name.removesuffix(".in_proj")), model.get_submodule(name)

    def parts():
        queries, keys, values = attention.transpose_for_scores(layer(x)).chunk(3, dim=-1)  # [1, heads, tokens, width]
        channels = values.transpose(1, 2).flatten(-2)
        heads = {(kind, head): t[:, head] for kind, t in (("q", queries), ("k", keys)) for head in range(4)}
        return heads | by_channel(channels)

    zeroed = zeroed_by_blocks(parts, layer.weight, assign_blocks(model)[f"{name}.weight"])
    assert all(len(vanished) == 1 for vanished in zeroed) and sorted(v for (v,) in zeroed) == sorted(parts())


class SelfAttention(nn.Module):
    """The fused projection of ChatGLM2 and later: one class for both orders, which a flag tells apart."""

    def __init__(self, multi_query: bool):
        super().__init__()
        self.multi_query_attention, self.num_heads = multi_query, 4
        self.query_key_value = nn.Linear(16, 16 + 2 * (8 if multi_query else 16), bias=False)

    def parts(self, x):
        mixed = self.query_key_value(x)
        if self.multi_query_attention:
            queries, keys, values = mixed.split([16, 8, 8], dim=-1)
        else:
            queries, keys, values = (t.flatten(-2) for t in mixed.unflatten(-1, (4, 12)).split(4, dim=-1))
        return by_head(queries, 4, "q") | by_head(keys, keys.shape[-1] // 4, "k") | by_channel(values)


@pytest.mark.parametrize("multi_query", [True, False])
def test_chatglm_has_all_queries_then_all_keys_then_all_values(multi_query):
    module, x = SelfAttention(multi_query), torch.randn(3, 16)
    blocks = assign_blocks(module)["query_key_value.weight"]
    zeroed = zeroed_by_blocks(lambda: module.parts(x), module.query_key_value.weight, blocks)
    assert all(len(vanished) == 1 for vanished in zeroed) and sorted(v for (v,) in zeroed) == sorted(module.parts(x))


def test_gwt_warns_once_where_most_matrices_stay_dense(caplog):
    """Layers under names that nothing tells; what the user excluded, embeddings and heads do not count."""
    model = nn.ModuleDict({f"part{i}": nn.Linear(16, 16) for i in range(3)})
    model["attention"], model["lm_head"] = nn.Linear(16, 16), nn.Linear(16, 900)
    with caplog.at_level(logging.WARNING, "ds_memopt"):
        optimizer = GWT.from_model(model)
        for _ in range(2):
            model["part0"](torch.randn(2, 16)).sum().backward()
            optimizer.step()
        (record,) = caplog.records
        assert record.getMessage().startswith("GWT leaves 75 % of the elements of this model's matrices dense")
        assert "The largest is part0.weight, (16, 16). To transform such matrices list" in record.getMessage()
        GWT.from_model(model, include=[r"part.*weight"])
        GWT.from_model(model, exclude=["part"])
    assert len(caplog.records) == 1
