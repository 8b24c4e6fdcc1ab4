"""Runs that share their beginning: where they part, and that nothing tells them from runs of their own."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llm_jax.report.goodput import goodput
from llm_jax.scaling import trunks
from llm_jax.scaling.trunks import Branch, branch_step, plan, rates
from llm_jax.training import experiment, loop, metrics
from llm_jax.training.experiment import CheckpointConfig
from llm_jax.training.program import Program
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.schedules import SCHEDULES

BASE = {
    "data.text": ("python:docs",),
    "steps": 200,
    "steps_per_dispatch": 5,
    "schedule.name": "wsd",
    "schedule.warmup_steps": 12,
}


def of(**changes):
    changes = BASE | {key.replace("__", "."): value for key, value in changes.items()}
    return experiment.resolve(experiment.override(experiment.default_config(), changes))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_two_runs_part_where_their_rates_do(name):
    """Whatever the schedule: equal before, and not in every step of the dispatch after."""
    short, long = of(schedule__name=name), of(schedule__name=name, steps=330)
    step = branch_step(short, long)
    one, other = (e.schedule.build(e.optimizer.learning_rate, e.steps) for e in (short, long))
    assert step % 5 == 0 and step < 200
    assert all(one(count) == other(count) for count in {0, step // 2, step - 1} if 0 <= count < step)
    assert step == 195 or any(one(count) != other(count) for count in range(step, step + 5))


def test_where_schedules_part():
    assert branch_step(of(), of(steps=330)) == 160  # before the last fifth of 200
    assert branch_step(of(steps_per_dispatch=25), of(steps=350, steps_per_dispatch=25)) == 150
    assert branch_step(of(schedule__name="cosine"), of(steps=330, schedule__name="cosine")) == 10
    assert branch_step(of(schedule__name="constant"), of(steps=330, schedule__name="constant")) == 195
    linear = {"schedule__name": "linear", "schedule__warmup_steps": 0}
    assert branch_step(of(**linear), of(steps=330, **linear)) == 0
    assert rates(of(), 200).dtype == np.float32


def test_the_longest_of_equals_is_the_trunk():
    """Seeds, widths and cadences keep runs apart; with one that has no equal there is nothing to share."""
    points = [of(steps=steps, seed=seed) for seed in (0, 1) for steps in (100, 400, 200)]
    assert plan(points) == {0: Branch(1, 80), 2: Branch(1, 160), 3: Branch(4, 80), 5: Branch(4, 160)}
    apart = [of(), of(steps=400, seed=1), of(steps=300, model__remat=True), of(steps=80, evaluation__every=5)]
    assert plan(apart) == {}
    assert plan([of(schedule__name="linear", steps=s, schedule__warmup_steps=0) for s in (100, 200)]) == {}


SMALL = {
    "global_batch_size": 8,
    "steps_per_dispatch": 5,
    "data.validation": "position",
    "data.sequence_length": 16,
    "model.num_layers": 1,
    "model.scan_layers": False,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "evaluation.every": 15,
    "samples.tokens": 0,
    "schedule.name": "wsd",
    "schedule.warmup_steps": 3,
    "schedule.decay_share": 0.4,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trunk of 40 steps, a run of 25 that left it at 15, and one of 25 that was trained alone."""
    root = tmp_path_factory.mktemp("runs")
    (root / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    changes = SMALL | {"data.text": str(root / "text.txt")}

    def train(name, **more):
        config = experiment.override(experiment.default_config(), changes | more)
        loop.run(experiment.resolve(config), root / name, say=lambda _: None)
        return RunDirectory(root / name)

    trunk = train("trunk", steps=40, **{"checkpoint.at": (15,)})
    branch = RunDirectory(root / "branch")
    assert trunks.is_there(trunk, 15) and not trunks.is_there(trunk, 20)
    trunks.graft(trunk, 15, branch, 25)
    attempts = len(metrics.segments(branch.metrics))
    train("branch", steps=25, **{"data.shards": str(trunk.data)})
    assert len(metrics.segments(branch.metrics)) == attempts + 1
    return trunk, branch, train("alone", steps=25, **{"data.shards": str(trunk.data)})


@pytest.mark.slow
def test_a_branch_is_the_run_that_was_trained_alone(runs):
    """Parameters, optimiser and metrics, to the last bit; with dropout."""
    trunk, branch, alone = runs
    states = [jax.device_get(Program.restore(run.path)[1]) for run in (branch, alone)]
    assert states[0].step == 25 and len(jax.tree.leaves(states[0].opt_state)) > 10
    jax.tree.map(np.testing.assert_array_equal, *states)
    stories = [metrics.without_time(metrics.read(run.metrics)) for run in (branch, alone)]
    assert stories[0] == stories[1] and len(stories[0]) == 25 + 2
    assert stories[0] != metrics.without_time(metrics.read(trunk.metrics))[:27]
    contents = [json.loads(run.config.read_text()) for run in (branch, alone)]
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_a_branch_says_where_it_came_from(runs):
    trunk, branch, alone = runs
    fingerprint = json.loads(trunk.config.read_text())["fingerprint"]
    assert branch.branched() == {"from": fingerprint, "step": 15}
    assert alone.branched() == {} and json.loads(alone.config.read_text())["fingerprint"] != fingerprint


@pytest.mark.slow
def test_a_branch_made_only_its_own_steps(runs):
    _, branch, _ = runs
    first, own = (metrics.read_segment(path) for path in metrics.segments(branch.metrics))
    assert [r["step"] for r in first if r["kind"] == "train"] == list(range(1, 16))
    assert own[0] | {"time": 0} == {"attempt": 2, "kind": "start", "step": 15, "time": 0}
    assert [r["step"] for r in own if r["kind"] == "train"] == list(range(16, 26))
    assert "time" not in first[0]  # so that the time between the two counts for no run
    spent = {kind: seconds for kind, seconds in goodput(branch.metrics).items() if seconds}
    assert "restart" not in spent and spent["start"] > 0


def test_named_steps_fall_between_dispatches():
    with pytest.raises(experiment.UserError, match=r"config.checkpoint.at\[1\]=12 is not a multiple of"):
        of(checkpoint__at=(10, 12))
    assert dataclasses.replace(CheckpointConfig(), at=(10,)) == of(checkpoint__at=(10,)).checkpoint
