"""Forecasts: sealed, dated, with an interval that knows of noise, form and single runs."""

import dataclasses
import json

import numpy as np
import pytest
from tables import TRUTH, isoflop_runs

from llm_jax.errors import UserError
from llm_jax.scaling import forecast, study
from llm_jax.scaling.forecast import interval
from llm_jax.training import experiment, loop

AHEAD = 1e17


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    """A law.json of a noisy table."""
    path = tmp_path_factory.mktemp("law") / "law.json"
    found = study.study(isoflop_runs(noise=0.003), ("tied", "frontier", "kaplan"), repeats=60)
    path.write_text(json.dumps(found))
    return path


def test_the_best_run_of_a_budget(law):
    made = forecast.foretell(law, AHEAD)
    assert made.method == json.loads(law.read_text())["chosen"]["frontier"]
    truth = float(TRUTH.frontier(AHEAD))
    assert made.low < truth < made.high and abs(made.loss / truth - 1) < 0.02
    assert made.low < made.loss < made.high < 1.1 * made.low
    assert 6 * made.params * made.tokens == pytest.approx(AHEAD, rel=0.05)


def test_a_run_of_its_own_size(law):
    params, tokens = 3e8, 1e9
    made = forecast.foretell(law, None, params, tokens)
    assert (made.params, made.tokens) == (params, tokens)
    assert made.loss == pytest.approx(float(TRUTH.loss(params, tokens)), rel=0.02)
    with pytest.raises(UserError, match="frontier is of the best run of a budget alone"):
        forecast.foretell(law, None, params, tokens, "frontier")
    with pytest.raises(UserError, match="no method 'oracle'; name one by --method: tied, frontier, kaplan"):
        forecast.foretell(law, AHEAD, method="oracle")


def test_the_interval_joins_what_can_be_wrong():
    drawn = 2.0 * np.exp(0.01 * np.random.default_rng(0).standard_normal(4000))
    alone = interval(drawn, 2.0, np.array([]), 0.0)
    np.testing.assert_allclose(alone, 2 * np.exp(np.array([-1, 1]) * 1.645 * 0.01), rtol=1e-3)
    width = alone[1] - alone[0]
    missed = interval(drawn, 2.0, np.array([0.03]), 0.0)
    assert missed[0] < alone[0] and alone[1] < missed[1]  # to both sides, whichever way it missed
    noisy = interval(drawn, 2.0, np.array([]), 0.01)
    assert noisy[1] - noisy[0] == pytest.approx(width * 2**0.5, rel=0.03)


def test_few_trials_borrow_the_misses_of_all():
    trials = [
        {"kind": "frontier", "method": name, "error": error}
        for name, error in (("a", 0.01), ("b", 0.02), ("b", 0.03), ("b", 0.04))
    ]
    assert forecast.misses(trials, "a", "frontier").tolist() == [0.01, 0.02, 0.03, 0.04]
    assert forecast.misses(trials, "b", "frontier").tolist() == [0.02, 0.03, 0.04]


def test_a_forecast_is_written_once_and_not_changed(law, tmp_path):
    path, made = tmp_path / "forecast.json", forecast.foretell(law, AHEAD)
    forecast.write(path, made)
    assert forecast.read(path) == made
    with pytest.raises(UserError, match="is a forecast already"):
        forecast.write(path, made)
    path.write_text(path.read_text().replace("2", "3", 1))
    with pytest.raises(UserError, match="is corrupt"):
        forecast.read(path)


def test_what_came_of_it(law):
    made = forecast.foretell(law, AHEAD)
    scored = forecast.score(made, made.loss / 1.01, AHEAD)
    assert scored["error"] == pytest.approx(0.01) and scored["inside"]
    assert not forecast.score_run(made, str(2 * made.high))["inside"]
    with pytest.raises(UserError, match="the run had 2e"):
        forecast.score(made, 2.0, 2 * AHEAD)
    with pytest.raises(UserError, match="neither a number nor a run's directory"):
        forecast.score_run(made, "runs/none")


RUN = {
    "steps": 10,
    "global_batch_size": 8,
    "data.sequence_length": 16,
    "data.validation": "position",
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "samples.tokens": 0,
    "schedule.warmup_steps": 2,
}


@pytest.mark.slow
def test_a_run_is_scored_by_its_directory(law, tmp_path):
    """Its last evaluation; and its FLOPs must be those that were foretold, which these are not."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    changes = RUN | {"data.text": str(tmp_path / "text.txt")}
    config = experiment.override(experiment.default_config(), changes)
    e = experiment.resolve(config)
    loss = loop.run(e, tmp_path / "run", say=lambda _: None)["loss"]
    made = forecast.foretell(law, AHEAD)
    e = experiment.complete(e, 40)
    flops = 10 * 8 * 16 * e.flops_per_token()
    with pytest.raises(UserError, match="FLOPs, the forecast is of 1e"):
        forecast.score_run(made, str(tmp_path / "run"))
    scored = forecast.score_run(dataclasses.replace(made, flops=flops), str(tmp_path / "run"))
    assert scored["seen"] == loss and scored["inside"] is (made.low <= loss <= made.high)
