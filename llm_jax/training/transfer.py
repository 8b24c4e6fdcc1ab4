"""Hyperparameters of a small model for a larger one: what its learning rate, weight decay, epsilon and
initialisation become, as plain changes to a config. The learning rate is tuned at the base shape and stays.

With m = width / base width (of each matrix's own inputs) and l = layers / base layers, factors on the base's:

                                        standard        mup             completep
    hidden matrices: learning rate      1               1/m             1/m
      weight decay                      1               m               m
      initial std                       1/sqrt(m) *     1/sqrt(m)       1/sqrt(m)
      of those that write, also         1/sqrt(l)       1/sqrt(l)       1
    embeddings and head: learning rate  1               1               1
      initial std                       1/sqrt(m) *     1               1
    gains and biases: learning rate     1               1               1
    epsilon: in blocks                  1               1/m             1/(m l)
      elsewhere                         1               1/m             1/m
    residual branches                   1               1               1/l
    logits                              1               1/m             1/m

standard: what the config says, * where its ``init_std`` is 0, else 1.
mup: Yang and Hu et al. 2022, Tensor Programs V (arXiv 2203.03466), table 8, the form with a head that may be
tied. completep: Dey et al. 2025 (arXiv 2505.01618), table 1 with alpha = 1; mup's decay and epsilon are from
there, too. AdamW subtracts rate * (update + decay * p): m times the decay undoes 1/m of the rate.

Why: Adam moves every entry of a matrix by about the rate, and these moves agree with what comes in, so what
goes out moves by rate * inputs; 1/m holds that. The head reads as many numbers, but its rows may be those of
embeddings, whose moves should not shrink, so it is the logits that do. l branches that each move by 1 would
move their sum by l. Gradients are then 1/m, in blocks 1/(m l), of the base's, and epsilon stands beside them.

With a fixed ``head_dim``, which is asked for, attention's 1/sqrt(head_dim) is a constant. At the base's own
shape nothing changes.
"""

from __future__ import annotations

import math
from typing import Any

from llm_jax import config as configs
from llm_jax.errors import UserError
from llm_jax.models.blocks import BLOCKS
from llm_jax.models.config import ModelConfig
from llm_jax.training.optimizers import GAINS_AND_BIASES
from llm_jax.training.rules import Rule

TRANSFERS = ("standard", "mup", "completep")


def transfer(name: str, model: ModelConfig, base: ModelConfig) -> dict[str, Any]:
    """{dotted key: value} to change in the config of ``model``, whose optimiser is AdamW with the values that
    were tuned at ``base``. The rules are AdamW's own with factors and replace those of the config.

    Raises UserError for an unknown name, and for models between which the recipe is not known to transfer.
    """
    if name not in TRANSFERS:
        raise UserError(f"transfer: {name!r} is none of {', '.join(TRANSFERS)}")
    if name == "standard":
        return {}
    _check(name, model, base)
    width = model.model_dim / base.model_dim
    depth = model.num_layers / base.num_layers if name == "completep" else 1.0
    changes = {
        "model.embedding_std": base.embedding_std or base.std(base.model_dim),
        "model.logit_scale": base.logit_scale / width,
        "optimizer.rules": tuple(configs.to_dict(rule) for rule in _rules(model, base, depth)),
    }
    if base.init_std:
        changes["model.init_std"] = base.init_std / math.sqrt(width)
    if name == "completep":
        changes["model.init_layers"] = base.init_layers or base.num_layers
        changes["model.residual_scale"] = base.residual_scale / depth
    return changes


def _rules(model: ModelConfig, base: ModelConfig, depth: float) -> list[Rule]:
    """The first that matches decides. depth: layers over the base's, 1 where the recipe knows no depth."""
    width = model.model_dim / base.model_dim
    inside, outside = 1.0 / (width * depth), 1.0 / width  # of epsilon

    def matrices(match: str, inputs: float) -> Rule:
        return Rule(match, learning_rate=1.0 / inputs, weight_decay=inputs, epsilon=inside)

    normed_outside = model.embedding_norm or not BLOCKS[model.block].ends_normed
    return [
        Rule(f"blocks/{GAINS_AND_BIASES}", weight_decay=0.0, epsilon=inside),
        matrices("blocks/attention/out", model.num_heads / base.num_heads),
        matrices("blocks/mlp/out", model.mlp_size / base.mlp_size),
        matrices("blocks/.*", width),
        *([Rule(GAINS_AND_BIASES, weight_decay=0.0, epsilon=outside)] if normed_outside else []),
        Rule(epsilon=outside),
    ]


def _check(name: str, model: ModelConfig, base: ModelConfig) -> None:
    if model.head_size != base.head_size:
        raise UserError(
            f"transfer: {name} keeps head_dim as at the base, {base.head_size}, not {model.head_size}; "
            "change num_heads with the width"
        )
    if model.num_experts:
        raise UserError(f"transfer: {name} is not known for experts; leave model.num_experts 0")
    if name == "completep" and BLOCKS[model.block].ends_normed:
        raise UserError(f"transfer: completep scales branches beside a stream, not block={model.block!r}")
