"""Points that branch off others while a sweep runs: in which order, when the trunk fails, or is not there. A
short script stands for scripts/train.py."""

import json
import shutil
import threading
import time

import pytest

from llm_jax import storage
from llm_jax.models.flops import training_flops_per_token
from llm_jax.scaling import workers
from llm_jax.scaling.board import Board
from llm_jax.scaling.points import grid
from llm_jax.scaling.sweep import Sweep, resolve
from llm_jax.scaling.table import saving, step_flops
from llm_jax.training import experiment, metrics
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.samples import SampleFile
from llm_jax.training.signals import Stop

PROGRAM = """
import hashlib, json, sys, time
from pathlib import Path

flags = dict(argument.split("=", 1) for argument in sys.argv[1:])
config = json.loads(Path(flags["--config"]).read_text())["config"]
run, root, steps = Path(flags["--workdir"]), Path(__file__).parent, config["steps"]
how = json.loads((root / "how.json").read_text()).get(str(steps), "")
sha = lambda text: hashlib.sha256(text.encode()).hexdigest()

(run / "metrics").mkdir(parents=True, exist_ok=True)
attempts = sorted((run / "metrics").iterdir())
lines = [json.loads(line) for path in attempts for line in path.read_text().splitlines()]
begin, attempt = max([line["step"] for line in lines], default=0), 1 + len(attempts)
content = {"fingerprint": run.name, "data": "text", "config": config}
content["sha256"] = sha(json.dumps(content, sort_keys=True))
(run / "config.json").write_text(json.dumps(content))
(run / "environment.json").write_text(json.dumps({"devices": {"kind": "cpu", "count": 1}}))
with (root / "order.txt").open("a") as file:
    file.write(f"{steps} from {begin}\\n")
file = (run / "metrics" / f"{attempt:04d}.jsonl").open("w")

def write(kind, step, **values):
    file.write(json.dumps({"attempt": attempt, "kind": kind, "step": step, **values}) + "\\n")
    file.flush()

write("start", begin, time={"process": 0.0, "at": 1.0})
for step in range(begin + 1, steps + 1):
    if how == f"fails at {step}":
        sys.exit("error: no space left")
    write("train", step, loss=1.0, skipped=0.0, bad_in_row=0)
    if step in config["checkpoint"]["at"] or step == steps:
        path = run / "checkpoints" / f"{step:08d}"
        path.mkdir(parents=True)
        arrays = {f"params/{name}": [[4, 2], "float32"] for name in ("embedding", "head", "blocks/mlp/in")}
        body = json.dumps({"arrays": arrays}, indent=1, sort_keys=True)
        text = json.dumps({"sha256": sha(body), "content": body}, indent=1) + "\\n"
        (path / "manifest.json").write_text(text)
    for _ in range(500):
        if how != f"waits at {step}" or list(run.parent.glob("*/metrics/0002.jsonl")):
            break
        time.sleep(0.01)
sections = range(8, steps + 1, 8)
(run / "samples.txt").write_text("".join(f"=== step {step} ===\\nof {steps}\\n" for step in sections))
write("evaluation", steps, set="validation", loss=100.0 - steps, loss_se=0.1)
"""
SHORT, MIDDLE, LONG = 10, 20, 40


@pytest.fixture
def sweep(tmp_path):
    """Of three lengths, the longest last; its schedule decays over the last fifth."""
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 40)
    (tmp_path / "program.py").write_text(PROGRAM)
    common = {"data.text": str(tmp_path / "text.txt"), "data.validation": "position"}
    common |= {"schedule.name": "wsd", "schedule.warmup_steps": 2, "steps_per_dispatch": 2}
    points = grid({"steps": (SHORT, MIDDLE, LONG)})
    sweep = Sweep(tmp_path / "sweep", resolve(experiment.default_config(), points, common))
    sweep.prepare(sweep.points, lambda _: None)
    return sweep


@pytest.fixture
def run(sweep, tmp_path):
    """Runs points of the sweep, as told by their lengths; gives the rows and what started from where."""

    def run(count=1, index=None, **how):
        (tmp_path / "how.json").write_text(json.dumps({key.strip("_"): text for key, text in how.items()}))
        (tmp_path / "order.txt").write_text("")
        points = sweep.select(index)
        board = Board(sweep, points)
        try:
            rows = workers.run(sweep, points, count, tmp_path / "program.py", Stop(), board)
        finally:
            board.close()
        return rows, (tmp_path / "order.txt").read_text().splitlines()

    return run


@pytest.fixture
def elsewhere(sweep):
    """The longest point is under way in another process, which ends after so many seconds."""

    def take(seconds):
        directory = sweep.directory(sweep.points[2])
        directory.make()
        threading.Timer(seconds, storage.lock(directory.lock).close).start()

    return take


def test_the_trunk_is_first_and_the_others_begin_where_they_leave_it(sweep, run, capfd):
    work = step_flops(sweep.complete(sweep.points[0])) * (40 + 2 + 4)
    assert Board(sweep, sweep.points)._flops() == (0.0, work)
    rows, order = run()
    assert order == ["40 from 0", "10 from 8", "20 from 16"]
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert [row["branched_at"] for row in rows] == [8, 16, None]
    assert [row["branched_from"] for row in rows] == [rows[2]["fingerprint"]] * 2 + [None]
    a_step = rows[2]["training_flops"] / 40
    assert [row["training_flops"] for row in rows] == [10 * a_step, 20 * a_step, 40 * a_step]
    assert [row["saved_flops"] for row in rows] == [8 * a_step, 16 * a_step, None]
    assert saving(rows).startswith("2 points branched off") and "(34%)" in saving(rows)
    assert "point 0 (steps=10) branches off point 2 at step 8; its log" in capfd.readouterr().err
    assert Board(sweep, sweep.points)._flops() == (work, 0.0)
    assert run() == (rows, []) and saving(rows[2:]) == ""


def test_what_the_table_says_of_a_run(run):
    row = run()[0][0]
    assert [row[f"{group}parameters"] for group in ("", "embedding_", "head_", "rest_")] == [24, 8, 8, 8]
    assert row["non_embedding_parameters"] == 16 and row["matmul_parameters"] > 0
    assert row["batch_sequences"] == 8 and row["batch_tokens"] == 8 * 64 and row["tokens"] == 10 * 8 * 64
    assert 0 < row["unique_tokens"] < 1000 and row["epochs"] == row["tokens"] / row["unique_tokens"] > 5
    assert (row["schedule"], row["decay_share"], row["warmup_steps"], row["seed"]) == ("wsd", 0.2, 2, 0)
    assert (row["optimizer"], row["learning_rate"], row["weight_decay"]) == ("adamw", 1e-3, 0.1)
    assert (row["loss"], row["loss_se"], row["bits_per_byte"]) == (90.0, 0.1, None)


def test_flops_of_an_encoder_are_of_what_it_scores():
    """15% of 64 places, rounded to 10; the rest of the head's products it does not make."""
    config = experiment.default_config(objective="mlm")
    changes = {"data.text": ("python:docs",), "model.causal": False, "model.vocab_size": 128}
    e = experiment.resolve(experiment.override(config, changes))
    everywhere = 8 * 64 * training_flops_per_token(e.model, 64)
    assert everywhere - step_flops(e) == 3 * 2 * 8 * (64 - 10) * 64 * 128


def test_a_branch_starts_as_soon_as_its_checkpoint_is_there(run):
    """Here the trunk waits for it."""
    rows, order = run(count=2, _40="waits at 8")
    assert order[:2] == ["40 from 0", "10 from 8"] and [row["status"] for row in rows] == ["finished"] * 3


def test_a_point_whose_trunk_failed_is_trained_alone(run):
    """Between the two branches: the first one has what it needs."""
    rows, order = run(_40="fails at 12")
    assert order == ["40 from 0", "10 from 8", "20 from 0"]
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert [row["branched_at"] for row in rows] == [8, None, None]
    rows, order = run()
    assert order == ["40 from 11"] and [row["branched_at"] for row in rows] == [8, None, None]


def test_a_point_of_an_array_waits_for_a_trunk_under_way_and_for_nobody_else(run, elsewhere):
    assert run(index=0)[1] == ["10 from 0"]
    elsewhere(0.3)  # it ends before it comes to the branch
    began = time.monotonic()
    assert run(index=1)[1] == ["20 from 0"] and time.monotonic() - began > 0.2


def test_patience_does_not_end_while_a_trunk_is_under_way(run, elsewhere, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.05)
    elsewhere(0.3)
    assert run()[1] == ["40 from 0", "10 from 8", "20 from 16"]


def test_a_branch_appears_as_a_whole(run, sweep, monkeypatch):
    """Killed while it is made it is not there; then it is made anew, and nothing is left over."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "branch_off", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            run()
    runs = sweep.path / "runs"
    assert len(storage.leftovers(runs)) == 1 and len(list(runs.glob("[!.]*"))) == 1
    rows, order = run()
    assert order == ["10 from 8", "20 from 16"] and [row["branched_at"] for row in rows] == [8, 16, None]
    assert not storage.leftovers(runs)


def test_a_damaged_trunk_is_none(run, sweep):
    run(index=2)
    path = sweep.directory(sweep.points[2]).run.config
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    rows, order = run(index=0)
    assert order == ["10 from 0"] and rows[0]["status"] == "finished" and rows[0]["branched_at"] is None


def test_of_a_trunk_that_was_stopped_a_branch_has_what_came_before_it(sweep, run):
    run(index=2, _40="fails at 12")
    run(index=2)
    trunk, branch = (sweep.directory(sweep.points[i]).run for i in (2, 1))
    assert run(index=1, _20="fails at 18")[1] == ["20 from 16"]
    assert SampleFile(branch.samples).read() == {8: "of 40\n", 16: "of 40\n"}
    assert run(index=1)[1] == ["20 from 17"]
    made = [[r["step"] for r in metrics.read(run.metrics) if r["kind"] == "train"] for run in (trunk, branch)]
    assert made == [list(range(1, 41)), list(range(1, 21))]
    assert [path.name for path in metrics.segments(branch.metrics)][2:] == ["0003.jsonl", "0004.jsonl"]
