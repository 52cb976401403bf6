"""What model families call things: the tables that the rules in `rules.py` look names up in.

A weight is known by its *key*: the name of the module that holds it (`...q_proj.weight` -> `q_proj`), or its own
name if it is a bare parameter (`in_proj_weight`). Checked against the sources of transformers 5.23 and torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ds_memopt.blocks.names import WRAPPER_NAMES

# Separate projections, as (query, key, value).
_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("wq", "wk", "wv"),  # Meta's own Llama code, torchtitan
    ("query", "key", "value"),  # BERT, ViT
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("linear_q", "linear_k", "linear_v"),  # Conformer encoders
    ("to_q", "to_k", "to_v"),  # diffusers
    ("query_global", "key_global", "value_global"),  # Longformer
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),  # nn.MultiheadAttention with kdim or vdim
)
QUERY = {query for query, _, _ in _PROJECTIONS} | {
    "q_b_proj",  # multi-head latent attention (DeepSeek): the up-projection that makes the heads
    "wq_b",  # DeepSeek V3.2's indexer
    "q_attn",  # GPT-2, cross-attention
    *("pos_q_proj", "pos_query_proj"),  # DeBERTa, of relative positions
}
KEY = {key for _, key, _ in _PROJECTIONS} | {
    *("pos_proj", "pos_key_proj"),  # DeBERTa, of relative positions
    *("linear_pos", "relative_k_proj"),  # Conformer encoders, of relative positions
}
VALUE = {value for _, _, value in _PROJECTIONS}
QUERY_BESIDE = {key: query for query, key, _ in _PROJECTIONS}


@dataclass(frozen=True)
class Fused:
    """How the output neurons of one matrix that makes queries, keys and values are ordered.

    groups: the order repeats once ("one"), once per key/value head ("kv_head"), or this many times.
    order: the parts of one group, one letter each; a part is all the heads of its kind in that group.
    """

    groups: Literal["one", "kv_head"] | int = "one"
    order: str = "qkv"


FUSED = {
    "qkv_proj": Fused(),  # Phi-3, Phi-4
    "Wqkv": Fused(),  # DBRX, MPT, ModernBERT
    "qkv": Fused(),  # ViT-like vision towers
    "c_attn": Fused(),  # GPT-2, nanoGPT
    "att_proj": Fused(),  # Bark
    "in_proj_weight": Fused(),  # nn.MultiheadAttention
    "query_key_value": Fused("kv_head"),  # GPT-NeoX, Bloom, Persimmon, all three layouts of Falcon
    "wqkv": Fused("kv_head"),  # torchtitan since 0.3
}
# Where a family uses another order under a common name: (start of the attention's class name, key).
FUSED_EXCEPTIONS = {
    ("DisentangledSelfAttention", "in_proj"): Fused("kv_head"),  # the first DeBERTa
    ("GPTBigCode", "c_attn"): Fused("kv_head"),
    ("MiniMax", "qkv_proj"): Fused("kv_head"),
    ("CodeGen", "qkv_proj"): Fused(4, "qvk"),
}
FUSED_CROSS_ATTENTION = Fused(order="kv")  # GPT-2: the queries have a matrix of their own, q_attn

# Families whose query matrix holds, head by head, the query and then an output gate of the same size.
GATED_QUERY_CLASSES = ("Qwen3Next", "Qwen3_5", "Qwen4")

# GPT-2's layers that store [in, out]; by name alone, only c_attn's shape can tell them from nanoGPT's nn.Linear.
CONV1D_KEYS = {"c_attn", "q_attn", "c_proj", "c_fc"}

EXPERT_IN = {"gate_up_proj", "gate_proj", "up_proj", "w1", "w3"}  # [E, ...] from the hidden size
EXPERT_OUT = {"down_proj", "w2"}  # [E, ...] to the hidden size

# Everything below is cut by output row whatever it is called; GWT asks for its role. The pattern is looked for in the
# last four words of the lower-cased path, "weight" left out, and the first that is found counts.
ROLES = (
    (r"rel_pos_[hw]$", "position embedding"),
    (r"router|\b(shared_expert_)?gate$", "router"),
    (r"\b(lm_head|embed_out|decoder)$", "lm_head"),
    (r"\b(\w*classifi\w*|score|pooler|predictions|lm_head)\b", "head"),
    (r"(mamba|mixer|\bconv)\.(in|out)_proj$|temporal_block\.linear_\w+$", "mixer"),
    (r"\b(q_a_proj|kv_a_proj_with_mqa|kv_b_proj)$", "latent attention"),
    (r"mlp|\bff[nw]?|feed_?forward|dense\w+dense|expert", "mlp"),
    (r"attn|attention|_att\b|\b(o_proj|wo|out_proj|out_lin|to_out)$", "attention output"),
    (r"(gate|up|down)_proj$|\b(gate_up_proj|w[123]|fc_?(\d|in|out)|c_fc|wi|wi_[01])$", "mlp"),
    (r"\b(lin|linear|linear_fc|pwconv|pointwise_conv)[12]$|\bdense_(h_to_4h|4h_to_h)$", "mlp"),
    (r"inter(mediate)?(_\w+)?\.dense$|output(_\w+)?\.dense$", "mlp"),  # BERT, behind its attention.output.dense
    (r"\b(output|output_layer|final_layer)$", "lm_head"),
)

# Where attention modules and configurations keep the size and the number of their heads.
# LXMERT's head_size is that of all heads together, hence its place.
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head", "d_kv", "d_head")
HEAD_DIM += ("kv_channels",)  # ChatGLM
NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")

# Path components that wrappers add: FSDP, activation checkpointing, torch.compile, DDP, peft.
ALL_WRAPPER_NAMES = WRAPPER_NAMES | {"_fsdp_wrapped_module", "module", "base_layer"}
