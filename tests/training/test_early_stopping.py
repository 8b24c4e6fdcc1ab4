"""Patience: the rule alone, and a run that ends by it, stopped on the way or not."""

import signal

import numpy as np
import pytest

from llm_jax.errors import Stopped, UserError
from llm_jax.training import experiment, loop, metrics
from llm_jax.training.early_stopping import out_of_patience
from llm_jax.training.program import Program
from llm_jax.training.signals import Stop

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([], 2, False),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, 2.0, 2.0, 2.0], 2, True),  # equal is no improvement
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, 2.0, 2.5, 1.9, 2.0], 1, True),
        ([3.0, float("nan")], 1, True),
        ([3.0, None, None, 2.9], 3, False),  # null in the story
        ([None, None, None], 2, True),
        ([3.0, 4.0, 5.0, 6.0], 0, False),
    ],
)
def test_the_rule(losses, patience, expected):
    assert out_of_patience(losses, patience) is expected


def make_experiment(text, **changes):
    """A run whose parameters are frozen, so that no evaluation is better than the first."""
    config = experiment.default_config()
    common = {
        "steps": 60,
        "steps_per_dispatch": 5,
        "data.text": (str(text),),
        "data.validation": "position",
        "data.sequence_length": 16,
        "model.num_layers": 1,
        "model.model_dim": 16,
        "evaluation.every": 10,
        "evaluation.patience": 2,
        "samples.tokens": 2,
        "ema_decay": 0.5,
        "optimizer.rules": ({"match": ".*", "learning_rate": 0.0},),
    }
    return experiment.resolve(experiment.override(config, common | changes))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 60)
    return path


def test_a_run_ends_by_it(text, tmp_path, monkeypatch):
    """After the third evaluation, with its checkpoint and samples, and a line that says why."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = loop.run(make_experiment(text), whole)
    story = metrics.read(whole / "metrics")
    assert result["step"] == 30 and [r["step"] for r in metrics.evaluations(story)] == [10, 20, 30]
    end = story[-1]
    assert end["kind"] == "end" and end["step"] == 30 and "no better loss in 2 evaluations" in end["early"]
    assert "=== step 30 ===" in (whole / "samples.txt").read_text()
    state = Program.restore(whole)[1]
    assert state.step == 30
    np.testing.assert_array_equal(state.ema["embedding"], state.params["embedding"])

    # Asked to stop at 15, it goes on from there, with the first evaluation of the attempt before.
    stop, steps = Stop(), Program.steps

    def asked(self, state, batches):
        stop.signal = signal.SIGTERM if int(state.step) == 10 else None
        return steps(self, state, batches)

    monkeypatch.setattr(Program, "steps", asked)
    with pytest.raises(Stopped):
        loop.run(make_experiment(text), cut, stop=stop)
    monkeypatch.setattr(Program, "steps", steps)
    loop.run(make_experiment(text), cut)
    again = metrics.read(cut / "metrics")
    assert metrics.without_time(again) == metrics.without_time(story)
    assert again[-1]["step"] == 30 and again[-1]["early"] == end["early"]

    # The same command does nothing more; with more patience it goes on.
    assert loop.run(make_experiment(text), whole)["step"] == 30
    assert loop.run(make_experiment(text, **{"evaluation.patience": 4}), whole)["step"] == 50


def test_it_counts_evaluations(text):
    with pytest.raises(UserError, match=r"patience=2 counts evaluations.*needs evaluation.every"):
        make_experiment(text, **{"evaluation.every": 0})
