"""What model families call things: the tables that the rules in `rules.py` look names up in.

A weight is known by its *key*: the name of the module that holds it (`...q_proj.weight` -> `q_proj`), or its own
name if it is a bare parameter (`in_proj_weight`). Checked against the sources of transformers 5.23 and torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ds_memopt.blocks.names import WRAPPED

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
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),  # nn.MultiheadAttention with kdim or vdim
)
QUERY = {query for query, _, _ in _PROJECTIONS} | {
    "q_b_proj",  # multi-head latent attention (DeepSeek): the up-projection that makes the heads
    "wq_b",  # DeepSeek V3.2's indexer
    "q_attn",  # GPT-2, cross-attention
}
KEY = {key for _, key, _ in _PROJECTIONS}
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
}
# Where a family uses another order under a common name: (start of the attention's class name, key).
FUSED_EXCEPTIONS = {
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

# Everything below is cut by output row whatever it is called: the names serve the log only.
ROLES = {
    **dict.fromkeys(("lm_head", "embed_out", "output", "output_layer", "final_layer"), "lm_head"),
    **dict.fromkeys(("o_proj", "wo", "Wo", "out_proj", "out_lin", "to_out"), "attention output"),
    **dict.fromkeys(("gate", "router"), "router"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"), "mlp"),
    **dict.fromkeys(("fc1", "fc2", "c_fc", "fc_in", "fc_out", "wi", "wi_0", "wi_1", "lin1", "lin2"), "mlp"),
    **dict.fromkeys(("linear1", "linear2", "dense_h_to_4h", "dense_4h_to_h", "linear_fc1", "linear_fc2"), "mlp"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "latent attention"),
}

# Where attention modules and configurations keep the size and the number of their heads.
HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "dim_head", "d_kv", "d_head")
NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")

# Path components that wrappers add: FSDP, activation checkpointing, torch.compile, DDP, peft.
WRAPPERS = WRAPPED | {"_fsdp_wrapped_module", "module", "base_layer"}
