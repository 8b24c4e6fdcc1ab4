"""llm_jax's Transformer and AdamW in plain PyTorch, sharing no numeric code with them.

Used by benchmarks/parity.py and benchmarks/shakespeare_torch.py. Configs are llm_jax's own dataclasses, so
both sides read the same numbers. Array letters as in llm_jax/models/layers.py: b batch, l length, d model,
h query heads, g key-value heads, k head, f mlp, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {
    "layernorm": partial(nn.LayerNorm, eps=1e-5, bias=False),
    "rmsnorm": partial(nn.RMSNorm, eps=1e-6),
}


class Block(nn.Module):
    """Pre-norm attention and MLP. c: llm_jax's ModelConfig."""

    def __init__(self, c) -> None:
        super().__init__()
        self.c, d, h, g, k, f = c, c.model_dim, c.num_heads, c.kv_heads, c.head_size, c.mlp_size
        self.attention_norm, self.mlp_norm = NORMS[c.norm](d), NORMS[c.norm](d)
        self.qkv = nn.Linear(d, (h + 2 * g) * k, bias=False)
        self.out = nn.Linear(h * k, d, bias=False)
        self.gate = nn.Linear(d, f, bias=False) if c.activation == "swiglu" else None
        self.up = nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x_bld: Tensor, turn_2b1lk: Tensor | None, mask_b1ll: Tensor | None) -> Tensor:
        x_bld = x_bld + self._attend(self.attention_norm(x_bld), turn_2b1lk, mask_b1ll)
        h_bld = self.mlp_norm(x_bld)
        up_blf = self.up(h_bld)
        h_blf = F.silu(self.gate(h_bld)) * up_blf if self.gate else F.gelu(up_blf)
        return x_bld + self.down(h_blf)

    def _attend(self, x_bld: Tensor, turn_2b1lk: Tensor | None, mask_b1ll: Tensor | None) -> Tensor:
        (b, l, _), h, g, k = x_bld.shape, self.c.num_heads, self.c.kv_heads, self.c.head_size
        parts = self.qkv(x_bld).view(b, l, h + 2 * g, k).transpose(1, 2).split([h, g, g], dim=1)
        q_bhlk, k_bglk, v_bglk = parts
        if turn_2b1lk is not None:
            q_bhlk, k_bglk = rotate(q_bhlk, turn_2b1lk), rotate(k_bglk, turn_2b1lk)
        causal = self.c.causal and mask_b1ll is None
        o_bhlk = F.scaled_dot_product_attention(
            q_bhlk, k_bglk, v_bglk, mask_b1ll, is_causal=causal, enable_gqa=h != g
        )
        return self.out(o_bhlk.transpose(1, 2).reshape(b, l, h * k))


class Transformer(nn.Module):
    """tokens to hidden states; ``logits`` with the tied head. c: llm_jax's ModelConfig, complete."""

    def __init__(self, c) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c.padded_vocab, c.model_dim)
        learnt = c.positions == "learnt"
        self.position_embedding = nn.Embedding(c.max_length, c.model_dim) if learnt else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_norm = NORMS[c.norm](c.model_dim)
        # As a bias of the head it costs nothing: a score of any usual size + -1e30 is -1e30 in float32.
        padding_v = torch.where(torch.arange(c.padded_vocab) < c.vocab_size, 0.0, -1e30)
        self.register_buffer("padding_v", padding_v)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = (c.init_std or p.shape[1] ** -0.5) / math.sqrt(2 * c.num_layers if residual else 1)
                nn.init.normal_(p, std=std)

    def forward(self, tokens_bl: Tensor, positions_bl=None, segments_bl=None) -> Tensor:
        """[b, l] to [b, l, d]; without positions and segments every row is one segment."""
        if positions_bl is None:
            positions_bl = torch.arange(tokens_bl.shape[1], device=tokens_bl.device).expand_as(tokens_bl)
        x_bld, turn_2b1lk = self.embedding(tokens_bl), None
        if self.position_embedding:
            x_bld = x_bld + self.position_embedding(positions_bl)
        else:
            turn_2b1lk = turns(positions_bl, self.c.head_size, self.c.rotary_base)
        mask_b1ll = None
        if segments_bl is not None:
            mask_b1ll = (segments_bl[:, :, None] == segments_bl[:, None, :])[:, None]
            mask_b1ll = mask_b1ll.tril() if self.c.causal else mask_b1ll
        for block in self.blocks:
            x_bld = block(x_bld, turn_2b1lk, mask_b1ll)
        return self.final_norm(x_bld)

    def logits(self, hidden_bld: Tensor) -> Tensor:
        return F.linear(hidden_bld, self.embedding.weight, self.padding_v)


def turns(positions_bl: Tensor, head_dim: int, base: float) -> Tensor:
    """Cosines and sines of the rotary angles, [2, b, 1, l, head_dim / 2]."""
    frequencies_k = base ** (-torch.arange(0, head_dim, 2, device=positions_bl.device) / head_dim)
    angles_b1lk = positions_bl[:, None, :, None] * frequencies_k
    return torch.stack([angles_b1lk.cos(), angles_b1lk.sin()])


def rotate(x_bhlk: Tensor, turn_2b1lk: Tensor) -> Tensor:
    """Feature i and feature i + head_dim/2 are a point that is turned: the halves convention. In real
    numbers, because torch.compile makes no kernels of complex ones."""
    (a_bhlk, b_bhlk), (cos_b1lk, sin_b1lk) = x_bhlk.chunk(2, dim=-1), turn_2b1lk
    turned = a_bhlk * cos_b1lk - b_bhlk * sin_b1lk, a_bhlk * sin_b1lk + b_bhlk * cos_b1lk
    return torch.cat(turned, dim=-1).to(x_bhlk.dtype)


def mean_loss(logits_blv: Tensor, targets_bl: Tensor, weights_bl: Tensor) -> Tensor:
    """Cross-entropy averaged by weight."""
    loss_n = F.cross_entropy(logits_blv.flatten(0, 1), targets_bl.flatten(), reduction="none")
    return (loss_n * weights_bl.flatten()).sum() / weights_bl.sum().clamp(min=1.0)


# ---- parameters of llm_jax ------------------------------------------------------------------


def views(model: Transformer, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor | list[Tensor]]:
    """{llm_jax's name: a view in llm_jax's layout}, for blocks a list, one a layer.

    of: what to look at of a parameter, its data or its gradient.
    """
    out: dict[str, Tensor | list[Tensor]] = {"embedding": of(model.embedding.weight)}
    if model.position_embedding:
        out["position_embedding"] = of(model.position_embedding.weight)
    out["final_norm/scale"] = of(model.final_norm.weight)
    for block in model.blocks:
        for name, view in _block_views(block, of).items():
            out.setdefault(f"blocks/{name}", []).append(view)
    return out


def _block_views(block: Block, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    c, h, g = block.c, block.c.num_heads, block.c.kv_heads
    # nn.Linear holds [out, in]; cutting an axis of its transpose in two is still a view.
    qkv_dhk = of(block.qkv.weight).T.view(c.model_dim, h + 2 * g, c.head_size)
    query, key, value = qkv_dhk.split([h, g, g], dim=1)
    out = {
        "attention_norm/scale": of(block.attention_norm.weight),
        "attention/query": query,
        "attention/key": key,
        "attention/value": value,
        "attention/out": of(block.out.weight).T.view(h, c.head_size, c.model_dim),
        "mlp_norm/scale": of(block.mlp_norm.weight),
        "mlp/in": of(block.up.weight).T,
        "mlp/out": of(block.down.weight).T,
    }
    return out | ({"mlp/gate": of(block.gate.weight).T} if block.gate else {})


def load(model: Transformer, params: dict) -> None:
    """Copies llm_jax's parameters, a nested dict of numpy arrays, into the model. Names must be equal."""
    arrays, targets = flatten(params), views(model, lambda p: p.data)
    if arrays.keys() != targets.keys():
        raise ValueError(f"only on one side: {sorted(arrays.keys() ^ targets.keys())}")
    for name, target in targets.items():
        value = torch.tensor(arrays[name])
        for view, part in zip(target, value, strict=True):  # layers of a list, or rows of a tensor
            if view.shape != part.shape:  # copy_ would broadcast
                raise ValueError(f"{name}: {tuple(part.shape)} does not fit {tuple(view.shape)}")
            view.copy_(part)


def gradients(model: Transformer) -> dict:
    """{llm_jax's name: numpy array in llm_jax's layout} of the gradients; copies."""
    found = views(model, lambda p: p.grad)
    return {name: (torch.stack(v) if isinstance(v, list) else v.clone()).numpy() for name, v in found.items()}


def flatten(tree: dict, path: str = "") -> dict:
    """{"blocks/mlp/in": array} of a nested dict."""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value}
    return out


# ---- training -------------------------------------------------------------------------------


def adamw(model: Transformer, c) -> torch.optim.AdamW:
    """c: llm_jax's AdamW with its default rules. Matrices and embeddings decay, gains of norms do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=c.epsilon, fused=True)


def learning_rate(step: int, peak: float, warmup_steps: int, end_ratio: float, steps: int) -> float:
    """Linear from peak / (warmup_steps + 1) to peak at warmup_steps, half a cosine to the end."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = min((step - warmup_steps) / (steps - warmup_steps), 1.0)
    return peak * (end_ratio + (1 - end_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def update(optimizer: torch.optim.AdamW, loss: Tensor, rate: float, clip_norm: float) -> None:
    """Backward pass, clipping by global norm, one step at this learning rate."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
