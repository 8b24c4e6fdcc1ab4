import dataclasses

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import surface
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import Runs

TRUE = Surface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def runs_of(law, noise=0.0, seed=0):
    """4 budgets of 5 sizes within 4x of the best."""
    flops = np.repeat(np.geomspace(1e18, 1e20, 4), 5)
    params = law.optimum(flops)[0] * np.tile(np.geomspace(1 / 4, 4, 5), 4)
    tokens = flops / (law.flops_per * params)
    off = noise * np.random.default_rng(seed).normal(size=len(flops))
    return Runs(params, tokens, flops, law.loss(params, tokens) * np.exp(off))


def constants(law):
    return np.array([law.E, law.A, law.B, law.alpha, law.beta])


@pytest.fixture(scope="module")
def grid():
    """A table with noise, and where every start ends."""
    runs = runs_of(TRUE, noise=0.005)
    return runs, *surface.solve_grid(runs)


@pytest.fixture(scope="module")
def noisy(grid):
    runs, *ends = grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surface, "solve_grid", lambda *_: ends)
        return runs, surface.fit(runs)


def test_the_optimum_spends_the_budget_and_is_least_along_it():
    flops = np.array([1e17, 1e21])
    params, tokens = TRUE.optimum(flops)
    np.testing.assert_allclose(6 * params * tokens, flops)
    for factor in (0.99, 1.01):
        assert np.all(TRUE.loss(params * factor, tokens / factor) > TRUE.frontier(flops))
    np.testing.assert_allclose(TRUE.loss(params, tokens), TRUE.frontier(flops))
    np.testing.assert_allclose(np.diff(np.log(params)), TRUE.a * np.log(1e4))


def test_arrays_of_fields_are_the_leading_axis():
    two = Surface(*(np.array([x, 1.1 * x]) for x in constants(TRUE)))
    params = np.geomspace(1e6, 1e9, 6).reshape(2, 3)
    loss = two.loss(params, 1e9)
    assert loss.shape == (2, 2, 3)
    np.testing.assert_allclose(loss[0], TRUE.loss(params, 1e9))
    assert two.frontier(1e20).shape == two.a.shape == (2,)
    np.testing.assert_allclose(two.frontier(np.array([1e19, 1e20]))[0], TRUE.frontier(np.array([1e19, 1e20])))


@pytest.mark.parametrize(
    "law", [TRUE, Surface(1.69, 406.4, 410.7, 0.34, 0.28), Surface(1.2, 3e4, 40.0, 0.6, 0.2, 7.5)]
)
def test_projection_finds_the_truth_of_losses_without_noise(law):
    found = surface.fit_projected(runs_of(law))
    np.testing.assert_allclose(constants(found), constants(law), rtol=1e-4)
    np.testing.assert_allclose(found.flops_per, law.flops_per)


@pytest.mark.slow
def test_the_whole_grid_and_the_projection_are_the_same_to_6_digits(noisy):
    runs, law = noisy
    assert np.all(np.abs(constants(law) / constants(TRUE) - 1) > 1e-3)  # or any start would do
    np.testing.assert_allclose(constants(surface.fit_projected(runs)), constants(law), rtol=1e-6)


def test_the_grid_has_its_4500_starts_and_more_than_1000_of_them_end_at_the_best(grid, noisy):
    runs, rows, values = grid
    assert rows.shape == (4500, 5)
    np.testing.assert_allclose(values.min(), surface.objective(noisy[1], runs))
    assert np.sum(values < values.min() * (1 + 1e-6)) > 1000


def test_no_step_away_from_the_fit_has_a_lower_objective(noisy):
    runs, law = noisy
    least = surface.objective(law, runs)
    for name in ("E", "A", "B", "alpha", "beta"):
        for factor in (1 - 1e-4, 1 + 1e-4):
            moved = dataclasses.replace(law, **{name: getattr(law, name) * factor})
            assert surface.objective(moved, runs) > least


def test_objective_is_the_huber_sum():
    runs = runs_of(TRUE).take(np.arange(6))
    runs.loss[:2] *= np.exp([0.0005, -0.02])
    expected = 0.0005**2 / 2 + 1e-3 * (0.02 - 1e-3 / 2)
    np.testing.assert_allclose(surface.objective(TRUE, runs), expected)
    np.testing.assert_allclose(surface.objective(TRUE, runs, delta=1.0), (0.0005**2 + 0.02**2) / 2)


def test_huber_resists_an_outlier_that_draws_least_squares_away():
    runs = runs_of(TRUE)
    runs.loss[3] *= 1.1
    np.testing.assert_allclose(surface.fit_projected(runs).a, TRUE.a, rtol=0.01)
    assert abs(surface.fit_projected(runs, delta=1.0).a / TRUE.a - 1) > 0.05


def test_a_weight_is_so_many_copies_and_given_losses_stand_in(noisy):
    runs, law = noisy
    weights = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20), 3).astype(float)
    other = runs_of(TRUE, noise=0.005, seed=2)
    many = surface.refit(law, runs, weights, np.stack([runs.loss, runs.loss, other.loss]))
    assert many.a.shape == (3,)
    for index, source in ((0, runs), (2, other)):
        copies = source.take(np.repeat(np.arange(20), weights[index].astype(int)))
        one = surface.refit(law, copies, np.ones((1, 20)))
        for field in ("E", "A", "B", "alpha", "beta"):
            np.testing.assert_allclose(getattr(many, field)[index], getattr(one, field)[0], rtol=1e-3)


def test_what_cannot_tell_five_constants_is_refused():
    runs = runs_of(TRUE)
    with pytest.raises(UserError, match="5 runs cannot tell them: add runs"):
        surface.fit(runs.take(np.arange(5)))
    for name, word in (("params", "one size"), ("tokens", "one number of tokens")):
        flat = dataclasses.replace(runs, **{name: np.full(20, 1e8)})
        with pytest.raises(UserError, match=f"{word}, 1e.08: .* two or more"):
            surface.fit_projected(flat)
    with pytest.raises(UserError, match=r"one power of the size .* add runs of another ratio"):
        surface.fit(dataclasses.replace(runs, tokens=20 * runs.params))
