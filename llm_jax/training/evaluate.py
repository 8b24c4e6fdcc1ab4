"""Losses over a fixed set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.data.batch import Batch
from llm_jax.models.transformer import Transformer
from llm_jax.objectives.cross_entropy import PredictsTokens
from llm_jax.training.step import Metrics, make_losses


def make_evaluation(model: Transformer, objective: PredictsTokens) -> Callable[..., Metrics]:
    """(params, batch [1, 1, rows, length]) -> {name: (sum, weight)}, without dropout."""
    losses = make_losses(model, objective)

    def sums(params: Any, batch: Batch) -> Metrics:
        batch = jax.tree.map(lambda x: jnp.squeeze(x, (0, 1)), batch)
        weights = objective.weights(batch)
        means = losses(params, batch, weights, None)
        return {name: (means[name] * weights[name], weights[name]) for name in means}

    return sums


def evaluate(sums: Callable[..., Metrics], params: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Means over every target of ``batches``: loss (nats), accuracy, and perplexity.

    Sums are added in float64 on the host, one batch late so that the device never waits.
    """
    totals: dict[str, list[float]] = {}
    pending: list[Metrics] = []
    for batch in batches:
        pending.append(sums(params, batch))
        if len(pending) > 2:
            _add(totals, pending.pop(0))
    for result in pending:
        _add(totals, result)
    means = {name: total / max(weight, 1.0) for name, (total, weight) in totals.items()}
    return means | {"perplexity": math.exp(min(means["loss"], 700.0)), "targets": totals["loss"][1]}


def _add(totals: dict[str, list[float]], result: Metrics) -> None:
    for name, pair in jax.device_get(result).items():
        entry = totals.setdefault(name, [0.0, 0.0])
        for i, value in enumerate(pair):
            entry[i] += float(value)
