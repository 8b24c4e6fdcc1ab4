"""Losses over a fixed set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.data.batch import Batch
from llm_jax.models import context
from llm_jax.models.transformer import Transformer, scorer
from llm_jax.objectives.cross_entropy import PredictsTokens
from llm_jax.training.step import Metrics

LOSS_SE = "loss_se"
Pair = tuple[float, float]  # a sum and its weight


def make_evaluation(model: Transformer, objective: PredictsTokens) -> Callable[..., Metrics]:
    """(params, batch [1, 1, rows, length]) -> {name: (sum, weight)}, without dropout."""

    def sums(params: Any, batch: Batch) -> Metrics:
        batch = jax.tree.map(lambda x: jnp.squeeze(x, (0, 1)), batch)
        batch = context.deal(batch, model.layout, model.config.causal)
        variables = {"params": params}
        hidden, _ = model.apply(variables, batch.inputs, batch.positions, batch.segments)
        totals = objective.sums(scorer(model, params), hidden, batch, evaluating=True)
        weights = objective.weights(batch, evaluating=True)
        return {name: (totals[name], weights[name]) for name in totals}

    return sums


def evaluate(
    sums: Callable[..., Metrics],
    params: Any,
    batches: Iterable[Batch],
    bytes_per_target: float | None = None,
) -> dict[str, float]:
    """Means over every target of ``batches``: loss (nats), its standard error ``loss_se``, accuracy, and what
    ``derived`` adds.

    Sums are added in float64 on the host, two batches late so that the device never waits.
    """
    totals: dict[str, list[float]] = {}
    losses: list[Pair] = []  # of each batch
    pending: list[Metrics] = []
    for batch in batches:
        pending.append(sums(params, batch))
        if len(pending) > 2:
            losses.append(_add(totals, pending.pop(0)))
    losses += [_add(totals, result) for result in pending]
    means = {name: total / max(weight, 1.0) for name, (total, weight) in totals.items()}
    means |= standard_error(losses)
    return derived(means | {"targets": totals["loss"][1]}, bytes_per_target)


def standard_error(batches: Sequence[Pair]) -> dict[str, float]:
    """{"loss_se"}: of the mean over targets as an estimate of the mean over all such text, or {} for a single
    batch, which tells nothing of it.

    batches: (sum, weight) of each. They are the clusters: targets of a row, and rows of a document, which
    stand side by side, go together, so that the spread of single targets would promise too much. Their mean
    is a ratio of two sums, its variance that of a ratio (Cochran 1977, Sampling Techniques, chapter 6). Two
    models on one set share most of this error: their difference is known better than either.
    """
    count, weight = len(batches), sum(w for _, w in batches)
    if count < 2 or weight == 0:
        return {}
    mean = sum(total for total, _ in batches) / weight
    squares = sum((total - mean * w) ** 2 for total, w in batches)
    return {LOSS_SE: math.sqrt(count / (count - 1) * squares) / weight}


def derived(means: dict[str, float], bytes_per_target: float | None) -> dict[str, float]:
    """``means``, the loss first, with perplexity and, where the text of a target is known, bits per byte.

    bytes_per_target: of the whole split, so that a few batches of it give an estimate and not a part.
    """
    out = {"loss": means["loss"]} | means | {"perplexity": math.exp(min(means["loss"], 700.0))}
    if bytes_per_target is not None:
        out["bits_per_byte"] = means["loss"] / math.log(2) / bytes_per_target
    return out


def weigh(
    parts: Mapping[str, dict[str, float]],
    weights: Mapping[str, float],
    bytes_per_target: Mapping[str, float | None],
) -> dict[str, float]:
    """Several evaluations as one, of targets drawn from each part with the probability that is its weight;
    ``targets`` are counted. All are {split: value}."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    first = next(iter(parts.values()))
    apart = ("targets", "perplexity", "bits_per_byte", LOSS_SE)
    names = [name for name in first if name not in apart]
    means = {name: sum(weights[s] * part[name] for s, part in parts.items()) for name in names}
    if all(LOSS_SE in part for part in parts.values()):  # of independent texts
        means[LOSS_SE] = math.hypot(*(weights[s] * part[LOSS_SE] for s, part in parts.items()))
    means["targets"] = sum(part["targets"] for part in parts.values())
    known = None not in bytes_per_target.values()
    return derived(means, sum(weights[s] * bytes_per_target[s] for s in parts) if known else None)


def _add(totals: dict[str, list[float]], result: Metrics) -> Pair:
    """Adds the sums of a batch; gives those of its loss."""
    result = jax.device_get(result)
    for name, pair in result.items():
        entry = totals.setdefault(name, [0.0, 0.0])
        for i, value in enumerate(pair):
            entry[i] += float(value)
    total, weight = result["loss"]
    return float(total), float(weight)
