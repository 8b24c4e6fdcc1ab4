"""Data-constrained law: what epochs are worth, the optimum under a limit, and the fit of both constants."""

from dataclasses import dataclass

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import repeated
from llm_jax.scaling.runs import Runs


@dataclass(frozen=True)
class Base:
    E: float = np.exp(0.6254804)
    A: float = np.exp(6.255414)
    B: float = np.exp(7.3049974)
    alpha: float = 0.3526596
    beta: float = 0.3526596
    flops_per: float = 6.0

    def loss(self, params, tokens):
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta


LAW, UNIQUE = repeated.of(Base()), 1e9


def table(R_D=12.0, R_N=4.0, noise=0.001, epochs=(1, 2, 4, 10, 40), low=1e7):
    params, times, unique = (x.ravel() for x in np.meshgrid(np.geomspace(low, 1e9, 5), epochs, [1e8, 1e9]))
    tokens = times * unique
    loss = repeated.of(Base(), R_D, R_N).loss(params, tokens, unique)
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(loss)))
    return Runs(params, tokens, 6 * params * tokens, loss, {"unique_tokens": unique})


def test_four_epochs_are_nearly_fresh_and_forty_almost_nothing_more():
    """Muennighoff et al. 2023, section 6: up to 4 epochs next to no loss; by 40 repeats are worthless."""
    worth = LAW.effective_tokens(np.array([1, 2, 4, 40, 80]) * UNIQUE, UNIQUE) / UNIQUE
    assert worth[0] == 1 and worth[1] > 1.96 and worth[2] > 3.7  # of 4
    assert worth[3] > 0.9 * (1 + repeated.R_D) and worth[4] - worth[3] < 1.2  # of 40 more
    fresh, again = LAW.loss(3e7, 4 * UNIQUE), LAW.loss(3e7, 4 * UNIQUE, UNIQUE)
    assert 0 < again / fresh - 1 < 0.006
    assert LAW.loss(3e7, 40 * UNIQUE, UNIQUE) - LAW.loss(3e7, 80 * UNIQUE, UNIQUE) < 0.01


def test_one_epoch_of_a_small_model_is_the_base():
    params, tokens = np.array([1e7, 4e7]), 1e9
    np.testing.assert_allclose(LAW.loss(params, tokens), Base().loss(params, tokens), rtol=1e-12)
    # U_N = 0.051 U_D (eq. 17): beyond it parameters count for less
    assert LAW.effective_params(0.050 * UNIQUE, UNIQUE) == pytest.approx(0.050 * UNIQUE)
    assert LAW.effective_params(0.1 * UNIQUE, UNIQUE) < 0.099 * UNIQUE
    assert LAW.effective_params(1e15, UNIQUE) == pytest.approx(0.0511 * (1 + repeated.R_N) * UNIQUE, rel=0.01)


def test_the_optimum_without_a_limit_is_the_base_s():
    params, tokens = LAW.optimum(1e20)
    assert params == pytest.approx((Base.A / Base.B) ** (1 / (2 * Base.alpha)) * (1e20 / 6) ** 0.5, rel=1e-5)
    assert 6 * params * tokens == pytest.approx(1e20)
    assert LAW.frontier(1e20) == pytest.approx(Base().loss(params, tokens), rel=1e-9)
    assert LAW.a == 0.5


def test_a_limit_of_data_favours_epochs_over_parameters():
    """R_D > R_N: with data short the best model is smaller than with data enough, and sees its data again."""
    params, tokens = LAW.optimum(1e20, UNIQUE)
    free, _ = LAW.optimum(1e20)
    assert params < free and tokens > 10 * UNIQUE
    sizes = np.geomspace(1e7, 1e11, 20_001)
    losses = LAW.loss(sizes, 1e20 / 6 / sizes, UNIQUE)
    assert LAW.frontier(1e20, UNIQUE) == pytest.approx(losses.min(), rel=1e-7)
    assert params == pytest.approx(sizes[losses.argmin()], rel=2e-3)
    assert LAW.frontier(1e20, UNIQUE) > LAW.frontier(1e20, 1e10) > LAW.frontier(1e20)


def test_its_constants_are_recovered():
    law = repeated.fit(table(), Base())
    np.testing.assert_allclose((law.R_D, law.R_N), (12, 4), rtol=0.05)
    assert law.E == Base.E


def test_without_excess_parameters_r_n_is_the_paper_s():
    runs = table()
    small = runs.take(runs.params < 0.04 * runs.columns["unique_tokens"])
    law = repeated.fit(small, Base())
    np.testing.assert_allclose(law.R_D, 12, rtol=0.1)
    np.testing.assert_allclose(law.R_N, repeated.R_N, rtol=1e-6)


def test_refit_has_repeats_first():
    runs = table(noise=0.003)
    law = repeated.fit(runs, Base())
    weights = np.random.default_rng(0).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=30)
    again = repeated.refit(law, runs, weights)
    assert 0.01 < np.std(again.R_D) < 2 and np.median(again.R_D) == pytest.approx(law.R_D, rel=0.1)
    assert again.loss(1e8, np.array([1e9, 1e10]), 1e9).shape == (30, 2)
    params, tokens = again.optimum(np.array([1e19, 1e20]), 1e9)
    assert params.shape == tokens.shape == again.frontier(np.array([1e19, 1e20]), 1e9).shape == (30, 2)


def test_refusals():
    with pytest.raises(UserError, match="no column 'seen'"):
        repeated.fit(table(), Base(), unique="seen")
    with pytest.raises(UserError, match="R_D needs 2 runs with more tokens"):
        repeated.fit(table(epochs=(1,)), Base())
