"""The standard error of a loss: as wide as the losses of other texts scatter."""

import math

import numpy as np
import pytest

from llm_jax.training.evaluate import standard_error, weigh


def test_it_is_the_scatter_of_the_mean_over_other_texts():
    """Targets of a batch go together and batches are uneven; 1000 sets of 50 batches are drawn."""
    draw = np.random.default_rng(0)
    weights = draw.integers(5, 100, (1000, 50))
    level = 3.0 + draw.normal(0, 0.3, weights.shape)  # of a batch: half its variance at 45 targets
    sums = level * weights + draw.normal(0, 2.0, weights.shape) * np.sqrt(weights)
    losses = sums.sum(1) / weights.sum(1)
    found = [
        standard_error(list(zip(*pair, strict=True)))["loss_se"] for pair in zip(sums, weights, strict=True)
    ]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(losses.std(), rel=0.07)
    within = np.abs(losses - 3.0) < 1.96 * np.array(found)
    assert 0.92 < within.mean() < 0.97
    alone = np.sqrt((2.0**2 + 0.3**2) / weights.sum(1).mean())  # as if targets were independent
    assert np.median(found) > 1.3 * alone


def test_equal_batches_have_that_of_a_plain_mean():
    losses = np.array([2.0, 2.5, 3.5, 3.0])
    found = standard_error([(loss * 10, 10.0) for loss in losses])
    assert found["loss_se"] == pytest.approx(losses.std(ddof=1) / 2)


def test_where_it_is_not_known():
    assert standard_error([(20.0, 10.0)]) == {} and standard_error([(0.0, 0.0)] * 3) == {}
    assert math.isnan(standard_error([(math.nan, 10.0), (20.0, 10.0)])["loss_se"])
    assert math.isnan(standard_error([(math.inf, 10.0), (20.0, 10.0)])["loss_se"])


def test_of_several_texts():
    def part(loss, **more):
        return {"loss": loss, "accuracy": 0.5, "targets": 10.0, "perplexity": math.exp(loss)} | more

    weights, per_target = {"a": 0.6, "b": 0.4}, {"a": None, "b": None}
    whole = weigh({"a": part(2.0, loss_se=0.3), "b": part(3.0, loss_se=0.4)}, weights, per_target)
    assert whole["loss_se"] == pytest.approx(math.sqrt(0.18**2 + 0.16**2))
    assert whole["loss"] == pytest.approx(2.4)
    assert "loss_se" not in weigh({"a": part(2.0, loss_se=0.3), "b": part(3.0)}, weights, per_target)
