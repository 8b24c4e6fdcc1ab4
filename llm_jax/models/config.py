"""What a model is: the shape of a decoder or an encoder, and how it is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_jax.config import identity, runtime
from llm_jax.models.activations import ACTIVATIONS

NEVER = -1e30  # the score of a token that cannot be
VOCAB_MULTIPLE = 128  # the lane width of a TPU; also lets the head be cut by any usual tensor axis


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder (causal) or an encoder. Zeros stand for values derived from the others, or none.

    num_kv_heads: 0 = num_heads (MHA); less is GQA, 1 MQA. head_dim: 0 = model_dim / num_heads.
    mlp_dim: 0 = 4 * model_dim, or 8/3 of it, rounded up to a multiple of 8, for gated activations.
    vocab_size: 0 = the tokenizer's. max_length: 0 = data.sequence_length; the learnt position table.
    init_std: 0 = 1 / sqrt(fan_in); matrices that write to the residual stream are divided by
    sqrt(2 * init_layers) in both cases (Radford et al. 2019), init_layers 0 = num_layers. zero_init: these,
    and an untied head, begin at 0, so that every block begins as the identity (Zhang et al. 2019, Fixup,
    arXiv 1901.09321). embedding_std: of embeddings and head, 0 = as any matrix's.
    residual_scale, logit_scale: factors on what every residual branch adds, and on the logits before their
    cap; training/transfer.py sets them, with embedding_std and init_layers, from width and depth.
    value_residual: a layer's values are mixed with the first layer's, by a learnt share that begins at a half
    (Zhou et al. 2024, arXiv 2410.17897, ResFormer).
    window: a pattern over layers, repeated: how far a layer looks, in tokens, 0 = everywhere; (128, 128, 0)
    is ModernBERT's. rotary_local_base: of layers with a window, 0 = rotary_base.
    stochastic_depth: the last block's chance to be left out, growing linearly from 0 at the first.
    num_experts: 0 = one MLP a block; else so many of mlp_dim each, of which every token has
    experts_per_token, and shared_experts that all tokens have. capacity_factor: an expert takes so many times
    its even share of a group's tokens and drops the rest; 0 = it takes all. routing_group: tokens of a group,
    0 = a row. balance_loss, router_z_loss: coefficients, of each layer's own.
    logit_softcap, attention_softcap: cap * tanh(x / cap), 0 = none. embedding_norm: a norm after the
    embeddings. biases: of matrices and LayerNorms.
    dtype: of matrix products; "auto" = bfloat16 on TPU and GPU, float32 on CPU.
    fp8: the products of blocks in 8 bits, beside head and attention in dtype (fp8.py); dense MLPs only.
    kernel: of attention; "auto" = where they fit splash on TPUs, and on GPUs cudnn for rows of one segment
    and flash for packed ones; else dense while its scores are few, else blockwise.
    scan_layers: compile one block and scan; unrolled is faster on a CPU but compiles longer.
    remat: recompute blocks in the backward pass instead of keeping their activations.
    """

    num_layers: int = identity(2)
    model_dim: int = identity(64)
    num_heads: int = identity(4)
    num_kv_heads: int = identity(0)
    head_dim: int = identity(0)
    mlp_dim: int = identity(0)
    vocab_size: int = identity(0)
    max_length: int = identity(0)
    causal: bool = identity(True)
    block: str = identity("prenorm", neutral="prenorm")
    positions: str = identity("rotary")
    rotary_base: float = identity(10000.0)
    rotary_local_base: float = identity(0.0, neutral=0.0)
    window: tuple[int, ...] = identity((0,), neutral=(0,))
    norm: str = identity("rmsnorm")
    embedding_norm: bool = identity(False, neutral=False)
    qk_norm: bool = identity(False, neutral=False)
    activation: str = identity("swiglu")
    biases: bool = identity(False, neutral=False)
    num_experts: int = identity(0, neutral=0)
    experts_per_token: int = identity(2, neutral=2)
    capacity_factor: float = identity(0.0, neutral=0.0)
    routing_group: int = identity(0, neutral=0)
    shared_experts: int = identity(0, neutral=0)
    balance_loss: float = identity(0.01, neutral=0.01)
    router_z_loss: float = identity(0.001, neutral=0.001)
    tied_head: bool = identity(True, neutral=True)
    logit_softcap: float = identity(0.0, neutral=0.0)
    attention_softcap: float = identity(0.0, neutral=0.0)
    dropout: float = identity(0.0)
    stochastic_depth: float = identity(0.0, neutral=0.0)
    init_std: float = identity(0.0)
    init_layers: int = identity(0, neutral=0)
    embedding_std: float = identity(0.0, neutral=0.0)
    zero_init: bool = identity(False, neutral=False)
    residual_scale: float = identity(1.0, neutral=1.0)
    logit_scale: float = identity(1.0, neutral=1.0)
    value_residual: bool = identity(False, neutral=False)
    dtype: str = runtime("auto")
    fp8: bool = runtime(False)
    kernel: str = runtime("auto")
    scan_layers: bool = runtime(True)
    remat: bool = runtime(False)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.activation].gated

    @property
    def mlp_size(self) -> int:
        two_thirds = -(-8 * self.model_dim // 3 // 8) * 8
        return self.mlp_dim or (two_thirds if self.gated else 4 * self.model_dim)

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of every layer."""
        return tuple(self.window[i % len(self.window)] for i in range(self.num_layers))

    def std(self, fan_in: int, residual: bool = False) -> float:
        """Standard deviation of a matrix's initial entries."""
        if residual and self.zero_init:
            return 0.0
        std = self.init_std or 1.0 / math.sqrt(fan_in)
        return std / math.sqrt(2 * (self.init_layers or self.num_layers)) if residual else std
