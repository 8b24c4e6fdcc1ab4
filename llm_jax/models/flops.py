"""FLOPs of matrix products: a model's, exactly, from its shapes, and those of any traced program."""

from __future__ import annotations

import math
from typing import Any

import jax

from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig


def matmul_parameters(c: ModelConfig) -> int:
    """Parameters that multiply every token: blocks and head (padded); no embedding look-ups, no gains. Of the
    experts those that a token has, and the router."""
    attention = c.model_dim * c.head_size * 2 * (c.num_heads + c.kv_heads)
    mlps = c.experts_per_token + c.shared_experts if c.num_experts else 1
    matrices = 3 if c.gated else 2
    feed_forward = mlps * matrices * c.model_dim * c.mlp_size + c.model_dim * c.num_experts
    return c.num_layers * (attention + feed_forward) + c.model_dim * c.padded_vocab


def training_flops_per_token(c: ModelConfig, length: int, causal: bool = False, scored: float = 1.0) -> float:
    """Forward and backward FLOPs a token at rows of ``length``; a multiply-add is 2.

    The backward pass costs twice the forward pass. Attention scores and their use cost 2 * 2 * length *
    head_dim * num_heads a token and layer; causal=True counts the half that a causal mask leaves
    ((length + 1) / 2 keys a query on average), for honest MFU. A window counts for what it lets be seen in
    both cases. scored: the share of tokens that the head scores, in an encoder with masks its targets.

    These are all the products of the unrolled step (tests: within 0.1% of ``traced_flops``), but for what is
    not the model's own work: recomputation, what the dense kernel makes of keys that mask or window hide, and
    the empty places of experts with a capacity. Embeddings are look-ups, and their gradients are sums.
    """
    attention = sum(4 * keys(length, window, causal) * c.head_size * c.num_heads for window in c.windows)
    unscored = (1.0 - scored) * c.model_dim * c.padded_vocab
    return 3 * (2 * (matmul_parameters(c) - unscored) + attention)


def keys(length: int, window: int, causal: bool) -> float:
    """How many keys a query sees, averaged over a row, by causal mask and window (0 = none)."""
    w = min(window or length, length)
    one_side = w - w * (w - 1) / (2 * length)  # itself among them
    return one_side if causal else 2 * one_side - 1


def traced_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a traced program, ``jax.make_jaxpr(f)(...)``; a multiply-add is 2.

    The body of a scan counts once for each of its steps, of branches the dearest counts, and inside shard_map
    what all devices do. Raises UserError for products whose number the trace does not tell: those of a kernel
    in Pallas or of a while loop.
    """
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name.startswith("ragged_dot"):  # every row meets one of the matrices
        return 2 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
    inner = [traced_flops(x) for x in jax.tree.leaves(list(params.values())) if hasattr(x, "eqns")]
    if name in ("pallas_call", "while") and any(inner):
        raise UserError(f"the products of {name} cannot be counted; trace with model.kernel='dense'")
    if name == "cond":
        return max(inner)
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(inner)
