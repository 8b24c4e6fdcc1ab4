"""Exact matrix-product FLOPs of a model, counted from its shapes."""

from __future__ import annotations

from llm_jax.models.transformer import ModelConfig


def matmul_parameters(c: ModelConfig) -> int:
    """Parameters that multiply every token: blocks and head (padded); no embedding look-ups, no gains. Of the
    experts those that a token has, and the router."""
    attention = c.model_dim * c.head_size * 2 * (c.num_heads + c.kv_heads)
    mlps = c.experts_per_token + c.shared_experts if c.num_experts else 1
    matrices = 3 if c.gated else 2
    feed_forward = mlps * matrices * c.model_dim * c.mlp_size + c.model_dim * c.num_experts
    return c.num_layers * (attention + feed_forward) + c.model_dim * c.padded_vocab


def training_flops_per_token(c: ModelConfig, length: int, causal: bool = False) -> float:
    """Forward and backward FLOPs a token at rows of ``length``; a multiply-add is 2.

    The backward pass costs twice the forward pass. Attention scores and their use cost 2 * 2 * length *
    head_dim * num_heads a token and layer; causal=True counts the half that a causal mask leaves
    ((length + 1) / 2 keys a query on average), for honest MFU. A window counts for what it lets be seen in
    both cases. Recomputation is not counted.
    """
    attention = sum(4 * keys(length, window, causal) * c.head_size * c.num_heads for window in c.windows)
    return 3 * (2 * matmul_parameters(c) + attention)


def keys(length: int, window: int, causal: bool) -> float:
    """How many keys a query sees, averaged over a row, by causal mask and window (0 = none)."""
    w = min(window or length, length)
    one_side = w - w * (w - 1) / (2 * length)  # itself among them
    return one_side if causal else 2 * one_side - 1
