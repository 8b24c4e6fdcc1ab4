"""One story out of several attempts."""

import json

import pytest
from bucket import NOTHING

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.training import metrics
from llm_jax.training.metrics import MetricsWriter


def attempt(directory, start, steps, loss=lambda step: step / 3):
    writer = MetricsWriter(directory)
    writer.write("start", start)
    for step in range(start + 1, steps + 1):
        writer.write("train", step, {"loss": loss(step)}, {"seconds": 0.1 * step})
    return writer


def test_the_latest_attempt_wins(tmp_path):
    attempt(tmp_path / "whole", 0, 10).close()
    attempt(tmp_path / "cut", 0, 7, loss=lambda step: step / 3 if step <= 4 else -1.0).close()
    attempt(tmp_path / "cut", 4, 10).close()
    whole, cut = (metrics.read(tmp_path / name) for name in ("whole", "cut"))
    assert whole != cut
    assert metrics.without_time(whole) == metrics.without_time(cut)
    assert [record["attempt"] for record in cut if record["kind"] == "train"] == [1] * 4 + [2] * 6


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    attempt(tmp_path, 0, 3).close()
    path = tmp_path / "0001.jsonl"
    path.write_text(path.read_text()[:-10])
    assert [r["step"] for r in metrics.read(tmp_path)] == [0, 1, 2]
    attempt(tmp_path, 2, 3).close()
    assert [r["step"] for r in metrics.read(tmp_path) if r["kind"] == "train"] == [1, 2, 3]


def test_in_a_bucket_that_lists_nothing(bucket, tmp_path):
    """Attempts are found by their names; one that was killed has what came before its last sync."""
    bucket.shown = NOTHING
    directory = storage.path("gs://bucket/run/metrics")
    killed = attempt(directory, 0, 4)
    killed.sync()
    killed.write("train", 5, {"loss": -1.0})
    assert metrics.read(directory)[-1]["step"] == 4
    attempt(directory, 4, 10).close()
    attempt(tmp_path, 0, 10).close()
    assert metrics.without_time(metrics.read(directory)) == metrics.without_time(metrics.read(tmp_path))
    assert [path.name for path in metrics.segments(directory)] == ["0001.jsonl", "0002.jsonl"]


def test_damage_elsewhere_is_named(tmp_path):
    attempt(tmp_path, 0, 3).close()
    path = tmp_path / "0001.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    with pytest.raises(UserError, match=r"0001.jsonl, line 2"):
        metrics.read(tmp_path)


def test_what_is_not_finite_is_null_and_lines_are_json(tmp_path):
    writer = attempt(tmp_path, 0, 0)
    writer.write("train", 1, {"loss": float("nan"), "grad_norm": float("inf")})
    line = (tmp_path / "0001.jsonl").read_text().splitlines()[1]
    assert json.loads(line) == {"attempt": 1, "kind": "train", "step": 1, "loss": None, "grad_norm": None}
    writer.close()


def test_what_is_written_comes_back(tmp_path):
    writer = attempt(tmp_path, 0, 0)
    values = {"set": "wiki", "loss": 1.5, "param_norms": {"blocks/0": 2.5, "blocks/1": float("nan")}}
    record = writer.write("evaluation", 3, values)
    writer.close()
    assert record["param_norms"] == {"blocks/0": 2.5, "blocks/1": None} and record["set"] == "wiki"
    assert metrics.read(tmp_path)[1] == record


def test_evaluations_of_one_set():
    story = [
        {"kind": "train", "step": 1},
        {"kind": "evaluation", "step": 1, "set": "wiki"},
        {"kind": "evaluation", "step": 1, "set": "validation"},
        {"kind": "evaluation", "step": 2},  # before sets had names
    ]
    assert metrics.evaluations(story) == story[2:] and metrics.evaluations(story, "wiki") == story[1:2]
