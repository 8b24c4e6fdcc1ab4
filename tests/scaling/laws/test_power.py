"""Kaplan's laws: recovery, the best split, and trends in one of N, D and C."""

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import power
from llm_jax.scaling.runs import Runs

TRUTH = power.Kaplan(6.4e13, 1.8e13, 0.076, 0.103)


def table(noise=0.0, seed=0):
    params, tokens = (x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)))
    loss = TRUTH.loss(params, tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(36))
    return Runs(params, tokens, 6 * params * tokens, loss)


def test_a_known_truth_is_recovered():
    law = power.fit(table())
    assert vars(law) == pytest.approx(vars(TRUTH), rel=1e-5)


def test_outliers_do_not_move_it():
    runs = table(noise=0.001)
    runs.loss[3] *= 1.3
    assert power.fit(runs).alpha_N == pytest.approx(0.076, abs=0.001)


def test_the_optimum_is_the_least_loss_along_a_budget():
    sizes = np.geomspace(1e6, 1e12, 20_001)
    losses = TRUTH.loss(sizes, 1e20 / 6 / sizes)
    params, tokens = TRUTH.optimum(1e20)
    assert params == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    assert 6 * params * tokens == pytest.approx(1e20)
    assert TRUTH.frontier(1e20) == pytest.approx(losses.min(), rel=1e-7)
    grown = np.log(TRUTH.optimum(1e22)[0] / TRUTH.optimum(1e20)[0]) / np.log(100)
    assert TRUTH.a == pytest.approx(grown) == pytest.approx(0.575, abs=1e-3)


def test_refit_gives_the_spread_of_the_noise():
    runs = table(noise=0.003)
    law = power.fit(runs)
    weights = np.random.default_rng(0).multinomial(36, np.full(36, 1 / 36), size=60)
    again = power.refit(law, runs, weights)
    assert again.loss(1e9, np.array([1e10, 1e11])).shape == (60, 2)
    others = [power.fit(table(noise=0.003, seed=seed)).a for seed in range(1, 17)]
    assert np.std(again.a) == pytest.approx(np.std(others), rel=0.5)
    two = power.refit(law, runs, np.ones((2, 36)), np.stack([runs.loss, 1.1 * runs.loss]))
    np.testing.assert_allclose(two.loss(1e8, 1e10) / law.loss(1e8, 1e10), (1, 1.1), rtol=1e-3)


def test_trends_where_the_other_is_ample():
    runs = table()
    ample = Runs(np.geomspace(1e6, 1e8, 5), np.full(5, 1e16), np.full(5, 1.0), np.zeros(5))
    ample = Runs(ample.params, ample.tokens, ample.flops, TRUTH.loss(ample.params, ample.tokens))
    found = power.trend(ample, "params")
    assert found.exponent == pytest.approx(0.076, abs=5e-4) and found.scale == pytest.approx(6.4e13, rel=0.1)
    # along the frontier L ~ C^-(alpha_N a)
    assert power.trend(runs, "flops").exponent == pytest.approx(0.076 * TRUTH.a, rel=0.1)
    assert found.loss(6.4e13) == pytest.approx(1, rel=0.01)


def test_a_trend_goes_through_runs_that_beat_all_with_less():
    runs = table()
    found = power.trend(runs, "flops")
    order = np.argsort(runs.flops)
    beaten = runs.loss[order] > np.minimum.accumulate(runs.loss[order])
    runs.loss[order[beaten]] += 5
    assert beaten.sum() > 5 and vars(power.trend(runs, "flops")) == vars(found)


def test_too_few_runs_are_refused():
    with pytest.raises(UserError, match="needs 5"):
        power.fit(table().take(np.arange(4)))
    with pytest.raises(UserError, match="a trend in tokens needs 3 runs"):
        power.trend(table().take(np.arange(2)), "tokens")
