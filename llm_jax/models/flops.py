"""Exact matrix-product FLOPs of a model, counted from its shapes."""

from __future__ import annotations

from llm_jax.models.transformer import ModelConfig


def matmul_parameters(c: ModelConfig) -> int:
    """Parameters that multiply every token: blocks and head (padded); no embedding look-ups, no gains."""
    attention = c.model_dim * c.head_size * 2 * (c.num_heads + c.kv_heads)
    matrices = 3 if c.activation == "swiglu" else 2
    mlp = matrices * c.model_dim * c.mlp_size
    return c.num_layers * (attention + mlp) + c.model_dim * c.padded_vocab


def training_flops_per_token(c: ModelConfig, length: int, causal: bool = False) -> float:
    """Forward and backward FLOPs a token at rows of ``length``; a multiply-add is 2.

    The backward pass costs twice the forward pass. Attention scores and their use cost 2 * 2 * length *
    head_dim * num_heads a token and layer; causal=True counts the half that a causal mask leaves
    ((length + 1) / 2 keys a query on average), for honest MFU. Recomputation is not counted.
    """
    keys = (length + 1) / 2 if causal else length
    attention = c.num_layers * 4 * keys * c.head_size * c.num_heads
    return 3 * (2 * matmul_parameters(c) + attention)
