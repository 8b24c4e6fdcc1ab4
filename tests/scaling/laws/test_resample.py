import dataclasses

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import isoflop, resample, surface
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import Runs

TRUE = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
KINDS = (resample.PARAMETRIC, resample.CASE)
NOISE = 0.005


def runs_of(noise, step=2.0):
    """5 budgets of 6 sizes, and normal noise on log losses: [repeats] tables, where it has repeats."""
    flops = np.repeat(np.geomspace(1e18, 1e20, 5), 6)
    params = TRUE.optimum(flops)[0] * np.tile(step ** np.arange(-2.5, 3), 5)
    tokens = flops / (6 * params)
    return Runs(params, tokens, flops, TRUE.loss(params, tokens) * np.exp(noise))


def drawn(runs, kind, repeats=200, seed=0, law=TRUE):
    return resample.resample(law, runs, surface.refit, kind, repeats, seed)


def losses_drawn(law, runs, repeats=10):
    seen = []
    resample.resample(law, runs, lambda *given: seen.append(given), repeats=repeats)
    return seen[0][3]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_without_noise_have_no_width(kind):
    many = drawn(runs_of(np.zeros(30)), kind)
    assert many.a.shape == (200,)
    low, high = resample.interval(many.a)
    assert abs(low / TRUE.a - 1) < 1e-6 and abs(high / TRUE.a - 1) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_width_is_that_of_fits_to_other_tables(kind):
    """Over 25 tables the median interval is 0.8 to 1.5 of the true spread, and 21 or more hold the truth."""
    noise = NOISE * np.random.default_rng(1).standard_normal((400, 30))
    tables = runs_of(noise).loss
    clean = runs_of(np.zeros(30))
    fits = surface.refit(TRUE, clean, np.ones_like(tables), tables)
    truth = np.ptp(resample.interval(fits.a))
    widths, held = [], 0
    for index in range(25):
        law = Surface(*(getattr(fits, name)[index] for name in ("E", "A", "B", "alpha", "beta")))
        runs = dataclasses.replace(clean, loss=tables[index])
        low, high = resample.interval(drawn(runs, kind, law=law).a)
        widths.append(high - low)
        held += low <= TRUE.a <= high
    assert 0.8 < np.median(widths) / truth < 1.5
    assert held >= 21


def test_noise_is_seen_in_what_residuals_the_fit_has_left():
    """Twice the noise, twice the width; of few runs it is Student's, wider than a normal deviation's."""
    noise = NOISE * np.random.default_rng(2).standard_normal(30)
    widths = [np.ptp(resample.interval(drawn(runs_of(k * noise), resample.PARAMETRIC).a)) for k in (1, 2)]
    assert 1.7 < widths[1] / widths[0] < 2.3

    runs = runs_of(noise).take(np.arange(7))
    there = TRUE.loss(runs.params, runs.tokens)
    away = np.log(losses_drawn(TRUE, runs, repeats=4000) / there)
    assert np.mean(away**4) / np.mean(away**2) ** 2 > 4  # 3 of normal noise, infinite of 2 degrees of freedom
    sigma = np.sqrt(np.pi / 2) * np.sum(np.abs(np.log(runs.loss / there))) / (7 - 5)
    assert abs(np.median(np.abs(away)) / (0.8165 * sigma) - 1) < 0.05  # the median of |t|, 2 degrees


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_again(kind):
    runs = runs_of(NOISE * np.random.default_rng(3).standard_normal(30))
    first = drawn(runs, kind, 20)
    np.testing.assert_array_equal(first.E, drawn(runs, kind, 20).E)
    assert np.all(first.E != drawn(runs, kind, 20, seed=1).E)


@pytest.mark.parametrize("kind", KINDS)
def test_a_law_of_minima_alone_is_resampled_about_its_parabolas(kind):
    runs = runs_of(NOISE * np.random.default_rng(4).standard_normal(30))
    many = resample.resample(isoflop.fit(runs), runs, isoflop.refit, kind, 50)
    low, high = resample.interval(many.a)
    assert low < TRUE.a < high and high - low < 0.3


def test_runs_that_no_parabola_reaches_have_losses_too():
    runs = runs_of(np.zeros(30), step=5.0)
    assert np.isnan(isoflop.fitted(runs)).any()
    np.testing.assert_allclose(losses_drawn(isoflop.fit(runs), runs), runs.loss[None].repeat(10, 0), rtol=0.2)


def test_an_interval_holds_its_share_of_further_draws_however_few_there_are():
    draws = np.random.default_rng(5).standard_normal((4000, 40))
    low, high = resample.interval(draws[:, :-1].T)
    assert (
        abs(np.mean((low <= draws[:, -1]) & (draws[:, -1] <= high)) - 0.95) < 0.012
    )  # 0.90 by the usual ones


def test_repeats_without_an_answer_are_left_out():
    assert resample.interval(np.array([1.0, np.nan, 3.0]), 0.5) == (1.0, 3.0)


def test_what_cannot_be_drawn_is_refused():
    runs = runs_of(np.zeros(30))
    with pytest.raises(UserError, match="bootstrap 'jackknife' is none of parametric, case"):
        drawn(runs, "jackknife")
    with pytest.raises(UserError, match=r"5 constants leave no noise to be seen in 5 runs: add runs"):
        drawn(runs.take(np.arange(5)), resample.PARAMETRIC)


def test_rows_of_a_run_are_drawn_together():
    runs, seen = runs_of(np.zeros(30)), []
    runs = dataclasses.replace(runs, columns={"run": np.repeat(["a", "b", "c", "d", "e"], 6)})
    resample.resample(TRUE, runs, lambda *given: seen.append(given), repeats=50, by="run")
    weights = seen[0][2].reshape(50, 5, 6)
    assert np.all(weights == weights[:, :, :1]) and np.all(weights[:, :, 0].sum(-1) == 5)
    assert len(np.unique(weights[:, :, 0], axis=0)) > 10
