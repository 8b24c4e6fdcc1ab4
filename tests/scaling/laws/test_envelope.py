"""The lower envelope of training curves."""

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import envelope
from llm_jax.scaling.runs import Runs

E, A, B, ALPHA, BETA = 1.8, 500.0, 2000.0, 0.35, 0.35


def curves(sizes=12, rows=15, low=1e7, high=1e10):
    """Runs of a known surface, each seen at ``rows`` token counts from 1 to 1,000 tokens a parameter."""
    params = np.repeat(np.geomspace(low, high, sizes), rows)
    tokens = params * np.tile(np.geomspace(1, 1000, rows), sizes)
    loss = E + A / params**ALPHA + B / tokens**BETA
    names = np.array([f"run {size:.0f}" for size in params])
    return Runs(params, tokens, 6 * params * tokens, loss, {"run_name": names})


def test_a_known_truth_is_recovered():
    law = envelope.fit(curves(sizes=24, rows=25))
    assert law.a == pytest.approx(0.5, abs=0.01) and law.b == pytest.approx(0.5, abs=0.01)
    params = (A / B) ** (1 / 0.7) * (1e21 / 6) ** 0.5
    assert law.optimum(1e21)[0] == pytest.approx(params, rel=0.03)
    assert law.frontier(1e21) == pytest.approx(
        E + A / params**ALPHA + B / (1e21 / 6 / params) ** BETA, rel=2e-3
    )


def test_its_points_lie_between_a_smaller_and_a_larger_model():
    runs = curves()
    found = envelope.envelope(runs)
    sizes = np.unique(runs.params)
    assert found.params.min() > sizes[0] and found.params.max() < sizes[-1]
    np.testing.assert_allclose(6 * found.params * found.tokens, found.flops, rtol=1e-9)
    assert np.all(np.diff(found.params) >= 0)  # larger models for more compute


def test_a_run_that_is_nowhere_best_changes_nothing():
    runs = curves()
    again = np.r_[np.arange(len(runs)), np.arange(60, 75)]
    names = np.r_[runs.columns["run_name"], ["bad"] * 15]
    loss = np.r_[runs.loss, runs.loss[60:75] + 1]
    more = Runs(runs.params[again], runs.tokens[again], runs.flops[again], loss, {"run_name": names})
    assert vars(envelope.fit(more)) == pytest.approx(vars(envelope.fit(runs)))


def test_refit_takes_what_was_drawn():
    runs = curves()
    law = envelope.fit(runs)
    weights = np.ones((3, len(runs)))
    weights[1, 60:75] = 0  # without one run
    weights[2] = 0
    again = envelope.refit(law, runs, weights, np.stack([runs.loss, runs.loss, runs.loss]))
    assert again.a[0] == pytest.approx(law.a)
    assert again.a[1] == pytest.approx(envelope.fit(runs.take(weights[1] > 0)).a, abs=1e-3) != law.a
    assert np.isnan(again.a[2]) and again.frontier(1e20).shape == (3,)


def test_refusals():
    with pytest.raises(UserError, match="needs a column 'name'"):
        envelope.fit(curves(), by="name")
    with pytest.raises(UserError, match="0 sizes that are best"):
        envelope.fit(curves(sizes=2))
