"""Learning-rate and batch laws: published numbers, recovery from a grid, valleys that are not bracketed."""

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling.laws import tuning
from llm_jax.scaling.runs import Runs

SIZES, TOKENS = (1e6, 4e6, 1.6e7), (1e8, 1e9)


def grid(rule=tuning.STEP_LAW, off=0.2, noise=0.0, batches=(-2, -1, 0, 1, 2), cells=None):
    """A valley at the rule's optimum for each N and D, on rates sqrt 2 apart, ``off`` steps beside it."""
    rows = []
    for params, tokens in cells or [(n, d) for n in SIZES for d in TOKENS]:
        best_lr, best_batch = rule.rate(params, tokens), rule.batch_tokens(params, tokens)
        for i in range(-4, 5):
            for j in batches:
                lr, batch = best_lr * 2 ** (0.5 * (i + off)), best_batch * 2 ** (j + off * (len(batches) > 1))
                valley = 0.02 * np.log(lr / best_lr) ** 2 + 0.01 * np.log(batch / best_batch) ** 2
                rows.append((params, tokens, lr, batch, 3 * np.exp(valley)))
    params, tokens, lr, batch, loss = np.array(rows).T
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(loss)))
    return Runs(params, tokens, 6 * params * tokens, loss, {"lr": lr, "batch_tokens": batch})


def test_published_rules():
    # Step Law at 1B and 100B tokens; DeepSeek 7B (table 2 of the paper, C = 6 N D of 6.9B and 2T): 4.2e-4
    assert tuning.STEP_LAW.rate(1e9, 1e11) == pytest.approx(1.64e-3, rel=0.01)
    assert tuning.STEP_LAW.batch_tokens(1e9, 1e11) == pytest.approx(1.11e6, rel=0.01)
    assert tuning.DEEPSEEK.rate(6.9e9, 2e12) == pytest.approx(4.2e-4, rel=0.05)
    assert tuning.DEEPSEEK.batch_tokens(6.9e9, 2e12) == pytest.approx(2304 * 4096, rel=0.05)
    # the peak rates of the ladder's own runs, at 4,096 tokens a row
    for params, lr in ((190354176, 0.000972728518721015), (3169537280, 0.000380931742816925)):
        assert tuning.olmo_ladder(4096).rate(params, 1.0) == pytest.approx(lr, rel=1e-9)
    assert tuning.olmo_ladder().batch_tokens(108e6, 1.0) == pytest.approx(160 * 2048)
    assert tuning.olmo_ladder(4096).batch_tokens(108e6, 1.0) == pytest.approx(160 * 2048)
    # Delphi's reference point, and both of its powers
    assert tuning.DELPHI.rate(1.0, 2.5e9, 64 * 4096) == pytest.approx(0.0063)
    assert tuning.DELPHI.rate(1.0, 2.5e9, 256 * 4096) == pytest.approx(0.0126)
    assert tuning.DELPHI.rate(1.0, 2.5e10, 64 * 4096) == pytest.approx(0.0063 * 0.1**0.3)
    for rule in tuning.RULES.values():
        assert 1e-4 < rule.rate(1e9, 2e10) < 1e-2 and 2e5 < rule.batch_tokens(1e9, 2e10) < 4e6 and rule.source


def test_the_token_horizon():
    assert tuning.horizon(1e-3, 1e9, 1e9) == 1e-3
    assert tuning.horizon(1e-3, 1e9, 1e10) == pytest.approx(1e-3 * 10**-0.3)


def test_a_known_rule_is_recovered_between_the_rates_tried():
    rule = tuning.fit(grid())
    assert (rule.lr.params, rule.lr.tokens) == pytest.approx((-0.713, 0.307), abs=1e-6)
    assert rule.batch.tokens == pytest.approx(0.571, abs=1e-6) and rule.batch.params == 0
    assert rule.rate(1e9, 1e11) == pytest.approx(tuning.STEP_LAW.rate(1e9, 1e11), rel=1e-4)
    assert rule.batch_tokens(1e9, 1e11) == pytest.approx(tuning.STEP_LAW.batch_tokens(1e9, 1e11), rel=1e-4)


def test_a_rule_in_compute():
    rule = tuning.fit(grid(tuning.DEEPSEEK), of=("flops",))
    assert rule.lr.params == rule.lr.tokens == pytest.approx(-0.125, abs=1e-6)
    assert rule.batch.params == rule.batch.tokens == pytest.approx(0.3271, abs=1e-6)


def test_one_batch_is_a_valley_in_the_rate_alone():
    found = tuning.optima(grid(batches=(0,)))
    assert len(found) == 6 and all(best.interior for best in found)
    assert found[0].rate == pytest.approx(tuning.STEP_LAW.rate(1e6, 1e8))
    assert found[0].loss == pytest.approx(3)


def test_an_optimum_at_the_edge_is_not_interior():
    runs = grid(batches=(0,))
    best = tuning.STEP_LAW.rate(1e6, 1e8)
    cut = runs.take(~((runs.params == 1e6) & (runs.tokens == 1e8) & (runs.columns["lr"] > 0.9 * best)))
    edge = tuning.optima(cut)[0]
    assert not edge.interior and edge.rate < 0.9 * best
    two = runs.take((runs.params > 1e6) | (runs.columns["lr"] > 2 * best))
    assert not tuning.optima(two)[0].interior


def test_optima_at_the_edge_do_not_count_where_others_are_enough():
    cells = [(n, d) for n in (*SIZES, 6.4e7) for d in TOKENS]
    runs = grid(batches=(0,), cells=cells)
    best = tuning.STEP_LAW.rate(runs.params, runs.tokens)
    cut = runs.take(~((runs.params == 1e6) & (runs.columns["lr"] > 0.7 * best)))
    assert sum(b.interior for b in tuning.optima(cut)) == 6
    assert tuning.fit(cut).lr.params == pytest.approx(-0.713, abs=1e-6)


def test_the_best_rate_is_that_of_the_best_batch():
    """The best rate goes with the root of the batch here, and no batch tried is the best one."""
    rows = []
    for batch in (1.0, 4.0, 16.0):
        for lr in 0.1 * 2 ** (0.5 * np.arange(-6, 10)):
            valley = 0.02 * np.log(lr / (0.1 * batch**0.5)) ** 2 + 0.01 * np.log(batch / 6.0) ** 2
            rows.append((lr, batch, 3 * np.exp(valley)))
    lr, batch, loss = np.array(rows).T
    ones = np.ones(len(lr))
    best = tuning.optima(Runs(ones, ones, ones, loss, {"lr": lr, "batch_tokens": batch}))[0]
    assert best.interior and best.batch == pytest.approx(6) and best.rate == pytest.approx(0.1 * 6**0.5)


def test_how_often_a_run_was_drawn_counts():
    runs = grid(batches=(0,), noise=0.01).take(np.arange(9))
    twice = np.where(np.arange(9) == 3, 2.0, 1.0)
    again = runs.take(np.r_[np.arange(9), 3])
    assert tuning.optima(runs, weights=twice)[0].rate == pytest.approx(tuning.optima(again)[0].rate)
    assert tuning.optima(runs, weights=twice)[0].rate != pytest.approx(tuning.optima(runs)[0].rate, rel=1e-4)


def test_a_divergence_far_up_the_valley_does_not_matter():
    runs = grid(batches=(0,))
    high = runs.columns["lr"] > 3.9 * tuning.STEP_LAW.rate(runs.params, runs.tokens)
    runs.loss[high] = 8.0
    assert high.sum() == 6 and tuning.optima(runs)[0].rate == pytest.approx(
        tuning.STEP_LAW.rate(1e6, 1e8), rel=0.05
    )


def test_refit_gives_an_interval():
    runs = grid(noise=0.0005)
    rule = tuning.fit(runs)
    weights = np.random.default_rng(0).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=40)
    again = tuning.refit(rule, runs, weights)
    assert again.rate(1e9, 1e11).shape == (40,)
    assert (
        abs(np.mean(again.lr.params) + 0.713) < 4 * np.std(again.lr.params) and np.std(again.lr.params) > 1e-3
    )
    none = tuning.refit(rule, runs, np.zeros((1, len(runs))))
    assert np.isnan(none.rate(1e9, 1e11)).all()


def test_refusals():
    together = [(n, 20 * n) for n in SIZES]
    with pytest.raises(
        UserError, match="3 pairs of N and D cannot tell how the rate depends on params and tok"
    ):
        tuning.fit(grid(cells=together))
    tuning.fit(grid(tuning.DEEPSEEK, cells=together), of=("flops",))
    with pytest.raises(UserError, match="no column 'peak'"):
        tuning.fit(grid(), lr="peak")
