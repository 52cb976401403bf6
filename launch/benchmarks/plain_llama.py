"""A Llama in torch alone, with the parameter names of transformers' LlamaForCausalLM, so that roles are recognised."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu


class Shape(NamedTuple):
    """Sizes of a Llama with as many key as query heads."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int


class Attention(nn.Module):
    """Causal self-attention with rotary positions of base 10,000."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads, self.head_dim = shape.heads, shape.hidden // shape.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(shape.hidden, shape.hidden, bias=False))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotated.to(v.dtype) for rotated in (_rotate(q, cos, sin), _rotate(k, cos, sin)))
        return self.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, dim = self.embed_tokens(tokens), self.layers[0].self_attn.head_dim
        frequencies = 1e4 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
        angles = torch.arange(tokens.shape[1], device=x.device)[:, None] * frequencies.repeat(2)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.norm(x)


class PlainLlama(nn.Module):
    """A causal language model; called with tokens [sequences, length] it returns the mean loss of the next token.

    Weights are drawn from N(0, 0.02), norms are 1.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(self.model(tokens)).float()
        return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> PlainLlama:
    """A model whose weights are made in this dtype, as fake tensors need it."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return PlainLlama(shape)
    finally:
        torch.set_default_dtype(usual)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
