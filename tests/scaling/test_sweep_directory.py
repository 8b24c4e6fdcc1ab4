"""A sweep before it runs: points that are checked, data that are shared, names that are known."""

import dataclasses
import json

import numpy as np
import pytest

from llm_jax import cli, storage
from llm_jax.errors import UserError
from llm_jax.scaling.points import grid, zip_
from llm_jax.scaling.sweep import Sweep, describe, resolve
from llm_jax.text import shards
from llm_jax.training import experiment

TEXT = "To be, or not to be, that is the question.\n" * 40


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def points_of(text):
    """The points of a sweep over a small config."""

    def points(sweep, **common):
        common = {"data.text": text, "data.validation": "position"} | common
        return resolve(experiment.default_config(), sweep, common)

    return points


def test_every_point_is_checked_and_a_bad_one_is_named(points_of):
    points = points_of([{}, {"seed": np.int64(1)}, {"optimizer.learning_rate": "3e-4"}])
    assert [point.index for point in points] == [0, 1, 2]
    assert points[1].experiment.seed == 1 and type(points[1].overrides["seed"]) is int
    assert points[2].experiment.optimizer.learning_rate == 3e-4
    for sweep, message in (
        (
            grid({"model.num_heads": (2, 3)}),
            r"point 1 \(model.num_heads=3\): config.model.model_dim=64 is not",
        ),
        ([{}, {"model.num_head": 2}], r"point 1 .*did you mean config.model.num_heads"),
        ([{"steps": "many"}], r"point 0 .*config.steps must be int"),
        ([{}, "seed=1"], r"point 1 of sweep\(\) is 'seed=1'; a point is a dict"),
        ([], "gives no points"),
        ([{"data.validation": "document"}], r"--config.data.validation is set by the sweep itself"),
    ):
        with pytest.raises(UserError, match=message):
            points_of(sweep)


def test_two_points_of_one_identity_are_named(points_of, tmp_path):
    with pytest.raises(
        UserError, match=r"point 0 \(seed=1\) and point 2 \(seed=1, model.remat=True\) are the"
    ):
        points_of([{"seed": 1}, {"seed": 2}, {"seed": 1, "model.remat": True}])
    vocabulary = len({*TEXT}) + 5
    points = points_of([{}, {"model.vocab_size": vocabulary}])  # the same once the text is read
    with pytest.raises(UserError, match=rf"point 0 .* and point 1 \(model.vocab_size={vocabulary}\) are the"):
        Sweep(tmp_path / "sweep", points).prepare(points, print)
    points = points_of([{}, {"model.vocab_size": 8}])
    with pytest.raises(UserError, match=r"point 1 \(model.vocab_size=8\): .*smaller than the tokenizer's"):
        Sweep(tmp_path / "sweep", points).prepare(points, print)


def test_data_are_prepared_once_for_all_that_share_them(points_of, text, tmp_path):
    """Rows and evaluation sets may differ; text, split and tokenizer may not."""
    sets = ({"name": "same", "text": (text,)},)
    same = [{}, {"data.sequence_length": 32}, {"model.model_dim": 32, "evaluation.sets": sets}]
    other = [{"data.validation_fraction": 0.2}, {"tokenizer.name": "byte"}, {"data.markers": False}]
    points = points_of([*same, *other])
    sweep, said = Sweep(tmp_path / "sweep", points), []
    assert [sweep.fingerprint(point) for point in points] == [None] * 6
    sweep.prepare(points[:1], said.append)
    assert len(said) == 4 and sweep.fingerprint(points[1]) and not sweep.fingerprint(points[3])
    sweep.prepare(points, said.append)
    assert len({sweep.shards(point) for point in points}) == 4
    assert len({sweep.fingerprint(point) for point in points}) == 6
    assert "test.same" in shards.read_header(sweep.shards(points[0]))["splits"]
    said.clear()
    again = Sweep(tmp_path / "sweep", points)
    again.prepare(points, said.append)
    assert not said and again.fingerprint(points[5]) == sweep.fingerprint(points[5])


def test_shards_made_before_are_used_as_they_are(points_of, tmp_path):
    points = points_of([{}])
    sweep = Sweep(tmp_path / "first", points)
    sweep.prepare(points, print)
    ready = points_of([{}], **{"data.shards": str(sweep.shards(points[0]))})
    other = Sweep(tmp_path / "second", ready)
    other.prepare(ready, print)
    assert other.fingerprint(ready[0]) == sweep.fingerprint(points[0])
    assert not (tmp_path / "second").exists()


def test_the_config_of_a_point_is_whole(points_of, tmp_path):
    """Read back it is the same experiment, whatever the values are made of."""
    sources = ({"name": "a", "text": (str(tmp_path / "text.txt"),), "weight": 2.0},)
    points = points_of(
        zip_({"data.sources": ([], sources), "optimizer.learning_rate": (np.float32(1e-3), 1 / 3)})
    )
    sweep = Sweep(tmp_path / "sweep", points)
    sweep.prepare(points, print)
    for point in points:
        directory = sweep.directory(point)
        directory.make()
        sweep.write_config(point, directory)
        read = experiment.resolve(cli.load_config(str(directory.config)))
        assert read.data.shards == str(sweep.shards(point))
        data = dataclasses.replace(read.data, shards="")
        assert dataclasses.replace(read, data=data) == point.experiment
        assert json.loads(json.dumps(point.overrides)).keys() == point.overrides.keys()


def test_json_that_is_no_config_is_named(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    for name, message in (("list", "is not the config.json of a run"), ("none", "no such file")):
        with pytest.raises(UserError, match=message):
            cli.load_config(f"{tmp_path}/{name}.json")


def test_directories_that_are_something_else(points_of, tmp_path, bucket):
    points = points_of([{}])
    with pytest.raises(UserError, match="gs://bucket/sweep: a sweep needs locks, which a bucket has not"):
        Sweep(storage.path("gs://bucket/sweep"), points)
    with pytest.raises(UserError, match="is a file"):
        Sweep(tmp_path / "text.txt", points)
    with pytest.raises(UserError, match=r"is not a sweep's directory \(it holds text.txt\)"):
        Sweep(tmp_path, points)
    with pytest.raises(UserError, match="has the points 0 to 0"):
        Sweep(tmp_path / "new", points).select(1)
    assert not (tmp_path / "new").exists()


def test_a_point_in_words():
    assert describe({"a.b": 1, "c": "x"}) == "a.b=1, c=x" and describe({}) == "as the config is"
