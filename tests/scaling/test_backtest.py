"""Rolling origins: what is fitted, what is foretold, who is chosen."""

import dataclasses

import numpy as np
import pytest
from tables import BUDGETS, TRUTH, isoflop_runs

from llm_jax.scaling import backtest
from llm_jax.scaling.backtest import FRONTIER, RUNS
from llm_jax.scaling.laws.methods import METHODS

QUICK = {name: METHODS[name] for name in ("tied", "frontier", "kaplan")}


@pytest.fixture(scope="module")
def trials():
    return backtest.backtest(isoflop_runs(), QUICK)


def test_origins_are_whole_budgets_but_the_last(trials):
    np.testing.assert_allclose(backtest.origins(isoflop_runs()), BUDGETS[1:-1])
    assert {trial.origin for trial in trials} == {*BUDGETS[1:-1]}
    assert {trial.fitted for trial in trials} == {10, 15}
    dense = isoflop_runs(budgets=np.geomspace(1e15, 1e18, 20))
    assert len(backtest.origins(dense)) == backtest.ORIGINS


def test_each_kind_is_asked_of_who_can_answer(trials):
    kinds = {(trial.method, trial.kind) for trial in trials}
    assert kinds == {
        ("tied", RUNS),
        ("tied", FRONTIER),
        ("frontier", FRONTIER),
        ("kaplan", RUNS),
        ("kaplan", FRONTIER),
    }
    within = [trial.flops / trial.origin for trial in trials]
    assert min(within) > 1 and max(within) <= backtest.HORIZON


def test_the_future_is_not_looked_at():
    runs = isoflop_runs()
    later = np.where(runs.flops > BUDGETS[2] * 1.01, 1.5, 1.0)
    changed = backtest.backtest(dataclasses.replace(runs, loss=runs.loss * later), QUICK)
    for before, after in zip(backtest.backtest(runs, QUICK), changed, strict=True):
        assert before.predicted == after.predicted
        assert (before.seen != after.seen) == (before.flops > BUDGETS[2] * 1.01)


def test_the_right_form_is_chosen_and_the_wrong_one_is_seen_to_miss(trials):
    for kind in (RUNS, FRONTIER):
        scores = backtest.scores(trials, kind)
        assert scores["tied"] < 2e-3 < 5e-3 < scores["kaplan"]  # which has no E
    assert backtest.choose(trials, RUNS) == "tied"
    assert backtest.choose((), RUNS) is None


def test_scores_are_of_shared_origins_by_how_much_was_fitted():
    def trial(method, origin, fitted, error):
        return backtest.Trial(method, RUNS, origin, fitted, 2 * origin, 1.0 + error, 1.0)

    some = (trial("a", 1, 10, 0.9), trial("a", 2, 10, 0.1), trial("a", 3, 30, -0.02))
    other = (trial("b", 2, 10, 0.3), trial("b", 3, 30, 0.01), trial("c", 1, 10, 0.0))
    scores = backtest.scores(some + other, RUNS)
    assert scores == pytest.approx({"a": 0.04, "b": 0.0825})  # 1 is not shared; c has no trial at the last


def test_a_truth_with_noise_is_foretold_within_it():
    found = backtest.backtest(isoflop_runs(TRUTH, noise=0.003, seed=1), QUICK)
    assert backtest.scores(found, FRONTIER)["frontier"] < 0.01
