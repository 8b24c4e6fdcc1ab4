"""Who is trained with whom: decided once, kept whatever happens to the sweep afterwards."""

import json

import pytest

from llm_jax.errors import UserError
from llm_jax.scaling import groups
from llm_jax.scaling.points import chain, grid
from llm_jax.scaling.sweep import Sweep, resolve
from llm_jax.training import experiment

SEEDS = grid({"model.model_dim": (16, 32), "seed": range(5)})


@pytest.fixture
def sweep_of(tmp_path):
    """A sweep whose data are there."""
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 40)
    common = {"data.text": str(tmp_path / "text.txt"), "data.validation": "position"}

    def sweep(points):
        sweep = Sweep(tmp_path / "sweep", resolve(experiment.default_config(), points, common))
        sweep.prepare(sweep.points, lambda _: None)
        return sweep

    return sweep


def planned(points, largest, workers=1, **common):
    common = {"data.text": "python:docs"} | common
    found = resolve(experiment.default_config(), points, common)
    return groups.plan([point.experiment for point in found], largest, workers)


def settled(sweep, largest=8, workers=1):
    found = groups.settle(sweep, sweep.points, largest, workers)
    return [[point.index for point in group] for group in found]


def test_alike_are_together_and_groups_are_even():
    assert planned(SEEDS, 8) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert planned(SEEDS, 3) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert planned(SEEDS, 1) == [[i] for i in range(10)]
    rates = grid({"optimizer.learning_rate": (1e-3, 1e-2), "seed": (0, 1)})
    assert planned(rates, 8) == [[0, 1, 2, 3]]
    assert planned(rates, 8, workers=2) == [[0, 1], [2, 3]]  # else one of them would wait
    mixed = chain(rates, grid({"optimizer.weight_decay": (0.0, 0.2)}), [{"steps": 200}])
    assert planned(mixed, 8) == [[0, 1, 2, 3], [4], [5], [6]]
    # That one ends on a loss of its own, or is to begin from another run, keeps it by itself.
    patient = grid({"seed": (0, 1)}, [{"evaluation.every": 10, "evaluation.patience": 2}])
    assert planned(patient, 8) == [[0], [1]]
    assert planned(grid({"seed": (0, 1)}), 8, init_from="runs/other") == [[0], [1]]


def test_groups_are_kept(sweep_of):
    sweep = sweep_of(SEEDS)
    assert settled(sweep, largest=3) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    names = [sweep.fingerprint(point) for point in sweep.points]
    assert json.loads((sweep.path / "points" / "groups.json").read_text())[1] == names[2:5]
    assert settled(sweep_of(SEEDS), largest=8, workers=4) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    # Points come and go: the others stay with whom they were, and the new ones are by themselves.
    fewer = sweep_of(SEEDS[:4] + grid({"model.model_dim": (16,), "seed": (7, 8)}))
    assert settled(fewer) == [[0, 1], [2, 3], [4, 5]]


def test_who_has_begun_alone_stays_alone(sweep_of):
    sweep = sweep_of(SEEDS[:5])
    run = sweep.directory(sweep.points[2]).run
    run.path.mkdir(parents=True)
    run.config.write_text("{}")
    assert settled(sweep) == [[0, 1, 3, 4], [2]]
    run.config.unlink()
    assert settled(sweep) == [[0, 1, 3, 4], [2]]


def test_a_damaged_record_is_said(sweep_of):
    sweep = sweep_of(SEEDS[:2])
    settled(sweep)
    (sweep.path / "points" / "groups.json").write_text("[1")
    with pytest.raises(UserError, match=r"groups.json is corrupt .*delete it to group anew"):
        settled(sweep)
