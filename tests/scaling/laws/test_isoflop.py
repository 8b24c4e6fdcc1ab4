"""The frontier through isoFLOP minima: what is recovered, what is no minimum, how far to trust it."""

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import isoflop
from llm_jax.scaling.runs import Runs

# Besiroglu et al. 2024
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
EXPONENT = BETA / (ALPHA + BETA)
BUDGETS = np.geomspace(1e18, 1e21, 7)


def optimum(flops, a=ALPHA, b=BETA):
    params = (a * A / (b * B)) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))
    return params, flops / 6 / params


def surface(params, tokens, a=ALPHA, b=BETA):
    return E + A / params**a + B / tokens**b


def sweep(budgets, reach=4.0, sizes=5, off=1.0, miss=0.0, noise=0.0, seed=0, truth=(ALPHA, BETA)):
    """sizes: of each budget, log-spaced within a factor of ``reach`` of off x the best; miss: of a budget."""
    draw = np.random.default_rng(seed)
    flops = np.repeat(budgets, sizes) * np.exp(miss * draw.uniform(-1, 1, len(budgets) * sizes))
    best = optimum(np.repeat(budgets, sizes), *truth)[0]
    params = off * best * np.tile(reach ** np.linspace(-1, 1, sizes), len(budgets))
    tokens = flops / 6 / params
    loss = surface(params, tokens, *truth) * np.exp(noise * draw.standard_normal(len(params)))
    return Runs(params, tokens, flops, loss)


def test_a_known_truth_is_recovered():
    law = isoflop.fit(sweep(BUDGETS))
    assert law.a == pytest.approx(EXPONENT, abs=1e-4) and law.a + law.b == pytest.approx(1)
    np.testing.assert_allclose((law.E, law.gamma), (E, ALPHA * EXPONENT), rtol=1e-3)
    params, tokens = law.optimum(1e22)
    np.testing.assert_allclose((params, tokens), optimum(1e22), rtol=0.01)
    assert law.frontier(1e22) == pytest.approx(surface(*optimum(1e22)), rel=1e-4)


@pytest.mark.parametrize("count, miss", [(2, 0.01), (3, 0.002), (4, 0.001)])
def test_few_budgets_foretell_three_times_the_largest(count, miss):
    budgets = 1e19 * 10 ** (0.5 * np.arange(count))
    law, flops = isoflop.fit(sweep(budgets)), 3 * budgets[-1]
    assert law.frontier(flops) == pytest.approx(surface(*optimum(flops)), rel=miss)


def test_noise_does_not_send_e_astray():
    """Noise of 0.3% and three budgets: 0.74% at 3x over 200 sweeps, where a power law without E has 1.6%."""
    budgets = 1e19 * 10 ** (0.5 * np.arange(3))
    flops = 3 * budgets[-1]
    laws = [isoflop.fit(sweep(budgets, noise=0.003, seed=seed)) for seed in range(30)]
    errors = np.array([law.frontier(flops) for law in laws]) / surface(*optimum(flops)) - 1
    assert np.sqrt(np.mean(errors**2)) < 0.010 and np.abs(errors).max() < 0.03


def test_e_has_a_prior_where_noise_is_all_there_is():
    """Noise of 1%, 10x the largest of three budgets: 3.1% over 300 sweeps, and 3.9% with E free."""
    budgets = 1e19 * 10 ** (0.5 * np.arange(3))
    laws = [isoflop.fit(sweep(budgets, noise=0.01, seed=seed)) for seed in range(60)]
    errors = np.array([law.frontier(1e21) for law in laws]) / surface(*optimum(1e21)) - 1
    assert np.sqrt(np.mean(errors**2)) < 0.035


def test_a_minimum_at_the_edge_is_reported_and_left_out():
    good, far = sweep(BUDGETS[:3]), sweep(BUDGETS[3:4], reach=2.0, off=8.0)
    runs = Runs(*(np.r_[getattr(good, n), getattr(far, n)] for n in ("params", "tokens", "flops", "loss")))
    found = isoflop.budgets(runs)
    assert [budget.interior for budget in found] == [True, True, True, False]
    assert found[3].params < far.params.min()
    assert vars(isoflop.fit(runs)) == pytest.approx(vars(isoflop.fit(good)), rel=1e-3)


def test_a_budget_says_where_its_valley_is():
    budget = isoflop.budgets(sweep(BUDGETS[:1]))[0]
    np.testing.assert_allclose((budget.params, budget.tokens), optimum(BUDGETS[0]), rtol=0.01)
    assert budget.loss == pytest.approx(surface(*optimum(BUDGETS[0])), rel=1e-4)
    assert budget.width == pytest.approx(16) and budget.points == 5
    assert budget.at(budget.params) == budget.loss < budget.at(2 * budget.params)


@pytest.mark.parametrize(
    "runs, said",
    [
        (sweep(BUDGETS[:1]), "1 of 1 budgets"),
        (sweep(BUDGETS, off=32.0), "0 of 7 budgets .* add sizes at C = 1e\\+18"),
        (sweep(BUDGETS, sizes=2), "0 of 7 budgets"),
    ],
)
def test_what_has_no_frontier_is_refused(runs, said):
    with pytest.raises(UserError, match=said):
        isoflop.fit(runs)


def test_runs_that_miss_their_budget_are_moved_to_it():
    """5% either way: N* stays within 1.4% and the loss within 0.14%."""
    runs = sweep(BUDGETS, miss=0.05)
    found = isoflop.budgets(runs)
    assert len(found) == 7
    for budget in found:
        assert budget.params == pytest.approx(optimum(budget.flops)[0], rel=0.02)
        assert 6 * budget.params * budget.tokens == pytest.approx(budget.flops)
        assert budget.loss == pytest.approx(surface(*optimum(budget.flops)), rel=0.0015)
    assert isoflop.fit(runs).a == pytest.approx(EXPONENT, abs=0.004)


def test_tokens_follow_where_a_flop_is_not_six():
    runs = sweep(BUDGETS)
    exact = Runs(runs.params, runs.tokens, runs.flops * 1.2, runs.loss)
    np.testing.assert_allclose(isoflop.fit(exact).optimum(1.2e22), isoflop.fit(runs).optimum(1e22), rtol=1e-6)


def test_a_wide_sweep_is_fitted_near_its_minimum():
    """alpha/beta = 0.5, +-16x: a parabola of all sizes has N* 23% low, this one 15% (and one of +-4x 8%)."""
    truth = (0.3, 0.6)
    wide = isoflop.budgets(sweep(BUDGETS[3:4], reach=16.0, sizes=9, truth=truth))[0]
    assert wide.points == 7 and wide.width == pytest.approx(64)
    assert 0.84 < wide.params / optimum(BUDGETS[3], *truth)[0] < 1


def test_a_sparse_sweep_has_five_sizes():
    assert isoflop.budgets(sweep(BUDGETS[:1], reach=100.0, sizes=9))[0].points == 5


def test_seeds_count_as_what_they_are():
    runs = sweep(BUDGETS[:3])
    twice = runs.take(np.r_[np.arange(len(runs)), np.arange(len(runs))])
    assert vars(isoflop.fit(twice)) == pytest.approx(vars(isoflop.fit(runs)), rel=1e-3)


def test_refit_equals_fit_for_each_repeat():
    runs = sweep(BUDGETS[:4], noise=0.003)
    law = isoflop.fit(runs)
    both = isoflop.refit(law, runs, np.ones((2, len(runs))), np.stack([runs.loss, runs.loss * 1.1]))
    assert both.a == pytest.approx([law.a, law.a]) and both.K[1] == pytest.approx(1.1 * law.K)
    assert both.frontier(np.array([1e21, 1e22])).shape == (2, 2)
    drawn = np.ones((1, len(runs)))
    drawn[0, [0, 6]] = 0, 2  # as a table with that run left out, and that one twice
    rows = np.repeat(np.arange(len(runs)), drawn[0].astype(int))
    assert isoflop.refit(law, runs, drawn).a[0] == pytest.approx(isoflop.fit(runs.take(rows)).a)
    drawn = np.ones((1, len(runs)))
    drawn[0, :5] = 0  # without its first budget
    assert isoflop.refit(law, runs, drawn).a[0] == pytest.approx(isoflop.fit(runs.take(drawn[0] > 0)).a)
    drawn[0, :15] = 0
    assert np.isnan(isoflop.refit(law, runs, drawn).a[0])


def test_a_parametric_bootstrap_knows_the_spread():
    """Spread of 200 refits to redrawn noise, beside that of 80 sweeps with noise of their own."""
    laws = [isoflop.fit(sweep(BUDGETS[:5], noise=0.003, seed=seed)) for seed in range(80)]
    runs = sweep(BUDGETS[:5], noise=0.003, seed=1)
    fitted = isoflop.fitted(runs)
    noise = np.random.default_rng(0).standard_normal((200, len(runs)))
    again = isoflop.refit(laws[0], runs, np.ones(noise.shape), fitted * np.exp(0.003 * noise))
    assert np.std(again.a) == pytest.approx(np.std([law.a for law in laws]), rel=0.25)


def test_fitted_is_nan_where_no_parabola_is():
    runs = sweep(BUDGETS[:2], reach=64.0, sizes=13)  # steps of a factor 2, of which 3 are near
    fitted = isoflop.fitted(runs)
    assert np.isnan(fitted).sum() == 2 * 6
    seen = ~np.isnan(fitted)
    np.testing.assert_allclose(fitted[seen], runs.loss[seen], rtol=0.01)
