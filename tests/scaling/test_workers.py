"""Points that run, fail, diverge, are killed or stopped, and the table of what came out. A short script
stands for scripts/train.py: what is tested here is what happens around it."""

import csv
import json
import os
import signal
import threading
import time

import pytest

from llm_jax import storage
from llm_jax.scaling import workers
from llm_jax.scaling.board import Board, last_step
from llm_jax.scaling.points import zip_
from llm_jax.scaling.sweep import Sweep, resolve
from llm_jax.scaling.table import APART
from llm_jax.training import experiment
from llm_jax.training.signals import Stop

PROGRAM = """
import hashlib, json, os, signal, sys, time
from pathlib import Path

flags = dict(argument.split("=", 1) for argument in sys.argv[1:])
config = json.loads(Path(flags["--config"]).read_text())["config"]
run, how = Path(flags["--workdir"]), config["samples"]["prompt"]
(run / "metrics").mkdir(parents=True, exist_ok=True)
attempt = 1 + len(list((run / "metrics").iterdir()))
own_hash = hashlib.sha256(json.dumps({"config": config}, sort_keys=True).encode()).hexdigest()
(run / "config.json").write_text(json.dumps({"config": config, "sha256": own_hash}))
devices = {"kind": "cpu", "count": len(os.sched_getaffinity(0))}
(run / "environment.json").write_text(json.dumps({"devices": devices}))
file = (run / "metrics" / f"{attempt:04d}.jsonl").open("w")

def write(kind, step, **values):
    file.write(json.dumps({"attempt": attempt, "kind": kind, "step": step, **values}) + "\\n")
    file.flush()

def train(step, loss, bad_in_row=0):
    clock = {"seconds": time.time(), "tokens_per_second": 1.0}
    write("train", step, loss=loss, skipped=float(bad_in_row > 0), bad_in_row=bad_in_row, time=clock)

def leave(number, frame):
    (run / "told").write_text(signal.Signals(number).name)
    sys.exit(attempt - 1)

write("start", 0)
write("pause", 0, time={"seconds": 1.0})
train(1, 2.0)
if how == "fails" and attempt == 1:
    print("Traceback", file=sys.stderr)
    sys.exit("error: no space left")
if how == "is killed" and attempt == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "leaves" and attempt == 1:
    sys.exit(0)
if how == "gives up":
    train(2, None, bad_in_row=16)
    sys.exit("error: 16 bad steps in a row")
if how == "fails, then waits" and attempt == 1:
    sys.exit(1)
if (how, attempt) in (("waits", 1), ("fails, then waits", 2)):
    signal.signal(signal.SIGTERM, leave)
    (run / "ready").touch()
    time.sleep(60)
if how == "saves":  # a scheduler told it
    signal.signal(signal.SIGTERM, leave)
    print("SIGTERM: saving after this dispatch", flush=True)
    (run / "ready").touch()
    time.sleep(2)
if how == "meets":
    while len(list(run.parent.glob("*/metrics"))) < 2:
        time.sleep(0.01)
train(2, 1.5)
loss = None if how == "ends at nan" else 1.0 + config["seed"]
write("evaluation", 2, set="validation", loss=loss, bits_per_byte=loss)
"""


@pytest.fixture
def sweep_of(tmp_path):
    """A sweep of points that behave as they are told, in a directory of this name."""
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 40)
    (tmp_path / "program.py").write_text(PROGRAM)
    common = {"data.text": str(tmp_path / "text.txt"), "data.validation": "position", "steps": 2}
    common |= {"schedule.warmup_steps": 1}

    def sweep(*behaviours, name="sweep"):
        points = zip_({"seed": range(len(behaviours)), "samples.prompt": behaviours})
        sweep = Sweep(tmp_path / name, resolve(experiment.default_config(), points, common))
        sweep.prepare(sweep.points, lambda _: None)
        return sweep

    return sweep


@pytest.fixture
def run(tmp_path):
    def run(sweep, count=1, stop=None):
        board = Board(sweep, sweep.points)
        try:
            program = tmp_path / "program.py"
            return workers.run(sweep, sweep.points, count, program, stop or Stop(), board)
        finally:
            board.close()

    return run


def attempts(sweep, index):
    return len(list((sweep.directory(sweep.points[index]).run.metrics).iterdir()))


def plain(rows):
    return [{key: value for key, value in row.items() if key not in APART} for row in rows]


def test_one_end_does_not_end_the_others(sweep_of, run):
    """And another start goes on with what has failed, or was left by a signal, alone."""
    sweep = sweep_of("fails", "", "is killed", "leaves", "gives up", "ends at nan")
    rows = run(sweep)
    assert [(row["status"], row["error"]) for row in rows] == [
        ("failed", "no space left"),
        ("finished", None),
        ("failed", "ended by SIGKILL"),
        ("unfinished", None),
        ("diverged", "16 bad steps in a row"),
        ("diverged", None),
    ]
    assert rows[1]["loss"] == rows[1]["best_loss"] == 2.0 and rows[1]["steps"] == 2
    assert rows[4]["skipped_steps"] == 1 and rows[5]["loss"] is None
    rows = run(sweep)
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["diverged"] * 2
    assert rows[0]["error"] is None
    assert [attempts(sweep, index) for index in range(6)] == [2, 1, 2, 2, 1, 1]
    assert run(sweep) == rows and attempts(sweep, 0) == 2


def test_the_table(sweep_of, run):
    """Both forms hold the same, and differ by wall clock and device alone from those of another time."""
    sweep, other = sweep_of("fails", "", name="a"), sweep_of("fails", "", name="b")
    run(sweep)
    rows = run(sweep)
    assert [json.loads(line) for line in (sweep.path / "table.jsonl").read_text().splitlines()] == rows
    run(other)
    again = run(other)
    assert plain(rows) == plain(again) and rows != again
    with (sweep.path / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first["overrides.samples.prompt"] == "fails" and second["overrides.seed"] == "1"
    assert first["loss"] == "1.0" and first["error"] == "" and first["fingerprint"] == rows[0]["fingerprint"]
    assert first["time.attempts"] == "2" and first["device.kind"] == "cpu" and first["parameters"] == ""
    tokens = 2 * 8 * 64
    assert first["tokens"] == str(tokens) and float(first["training_flops"]) % tokens == 0


def test_points_not_run_are_in_the_table(sweep_of, run, tmp_path):
    sweep = sweep_of("", "")
    rows = workers.run(
        sweep, sweep.select(1), 1, tmp_path / "program.py", Stop(), Board(sweep, sweep.select(1))
    )
    assert [row["status"] for row in rows] == ["waiting", "finished"]
    assert rows[0]["steps"] is None and rows[0].keys() == rows[1].keys()
    assert rows[0]["time"].keys() == rows[1]["time"].keys()


def test_what_was_deleted_is_run_again_and_damage_is_named(sweep_of, run):
    sweep = sweep_of("", "")
    run(sweep)
    first, second = (sweep.directory(point).run for point in sweep.points)
    for path in [*first.metrics.iterdir(), first.config]:
        path.unlink()
    second.config.write_text("{")
    rows = run(sweep)
    assert rows[0]["status"] == "finished" and rows[0]["steps"] == 2
    assert rows[1]["status"] == "failed" and "config.json is corrupt" in rows[1]["error"]


def test_a_point_is_run_by_one_process_at_a_time(sweep_of, run, monkeypatch):
    """The one that trains holds the lock, also when the one that started it is gone."""
    sweep = sweep_of("", "")
    directory = sweep.directory(sweep.points[0])
    directory.make()
    lock = storage.lock(directory.lock)
    assert sweep.status_now(sweep.points[0]) == "running"
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.0)
    assert [row["status"] for row in run(sweep)] == ["waiting", "finished"]
    monkeypatch.setattr(workers, "GRACE_SECONDS", 60.0)
    threading.Timer(0.3, lock.close).start()  # the process elsewhere ends: this one takes over
    assert [row["status"] for row in run(sweep)] == ["finished", "finished"]


def test_the_lock_outlives_the_sweep(sweep_of, tmp_path):
    sweep = sweep_of("waits")
    directory = sweep.directory(sweep.points[0])
    worker = workers.start_next(sweep, [(sweep.points[0],)], set(), tmp_path / "program.py")
    worker.members[0].lock.close()  # as the kernel does for a sweep that is killed
    assert storage.lock(directory.lock) is None
    worker.process.kill()
    worker.process.wait()
    storage.lock(directory.lock).close()


def test_a_signal_goes_to_the_workers_and_no_other_is_started(sweep_of, run):
    """What a worker does then, be it an error, says nothing of its point."""
    sweep = sweep_of("fails, then waits", "", "")
    path = sweep.directory(sweep.points[0]).run.path
    assert [row["status"] for row in run(sweep)] == ["failed", "finished", "finished"]
    sweep.directory(sweep.points[2]).outcome.unlink()
    stop = Stop()
    thread = threading.Thread(target=request, args=(stop, path))
    thread.start()
    rows = run(sweep, stop=stop)
    thread.join()
    assert [row["status"] for row in rows] == ["unfinished", "finished", "unfinished"]
    assert (path / "told").read_text() == "SIGTERM" and attempts(sweep, 2) == 1
    assert [row["status"] for row in run(sweep)] == ["finished"] * 3


@pytest.mark.slow
def test_a_worker_that_a_scheduler_told_is_not_told_again(sweep_of, run):
    """A second signal would end it before it has saved."""
    sweep = sweep_of("saves")
    path, stop = sweep.directory(sweep.points[0]).run.path, Stop()
    thread = threading.Thread(target=request, args=(stop, path))
    thread.start()
    rows = run(sweep, stop=stop)
    thread.join()
    assert not (path / "told").exists() and [row["status"] for row in rows] == ["finished"]


def request(stop, path):
    """SIGTERM comes once a point is under way."""
    while not (path / "ready").exists():
        time.sleep(0.01)
    stop.signal = signal.SIGTERM


def test_workers_run_side_by_side_and_share_the_cores(sweep_of, run):
    sweep = sweep_of("meets", "meets")  # each waits for the other
    rows = run(sweep, count=2)
    assert [row["device"]["count"] for row in rows] == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2


def test_every_worker_has_as_many_cores(monkeypatch):
    """A point must not depend on which worker it comes to."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6, 7, 9})
    assert workers.share(0, 1) == {3, 5, 6, 7, 9}
    assert [workers.share(slot, 2) for slot in range(2)] == [{3, 5}, {6, 7}]
    assert [workers.share(slot, 7) for slot in range(7)] == [{3}, {5}, {6}, {7}, {9}, {3}, {5}]


def test_an_error_of_the_sweep_stops_the_workers(sweep_of, run, monkeypatch):
    """A table that cannot be written, for example."""
    sweep = sweep_of("", "waits")
    write, path = workers.Table.write, sweep.directory(sweep.points[1]).run.path

    def fails(table):
        if table.row(sweep.points[0])["status"] != "finished":
            return write(table)
        while not (path / "ready").exists():
            time.sleep(0.01)
        raise OSError("no space left")

    monkeypatch.setattr(workers.Table, "write", fails)
    with pytest.raises(OSError, match="no space"):
        run(sweep, count=2)
    assert (path / "told").read_text() == "SIGTERM"


def test_what_a_person_sees(sweep_of, run, capfd):
    sweep = sweep_of("", "fails", "")
    run(sweep)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("point 0 (seed=0, samples.prompt=) starts; its log: ")
    assert "point 0 (seed=0, samples.prompt=) finished: validation loss 1.0000; 1 of 3 done" in lines[1]
    assert "best 1.0000 (point 0); ETA 0:0" in lines[1]
    assert "failed: no space left; 1 of 3 done; best 1.0000 (point 0)" in lines[3]
    assert "2 of 3 done" in lines[5]
    run(sweep)
    assert "goes on at step 1" in capfd.readouterr().err


def test_last_step_of_a_run_under_way(sweep_of, run):
    sweep = sweep_of("")
    directory = sweep.directory(sweep.points[0]).run
    assert last_step(directory) == 0
    run(sweep)
    path = directory.metrics / "0002.jsonl"
    path.write_text('{"step": 7}\n{"step": 8, "lo')
    assert last_step(directory) == 7
    path.write_text('{"st')
    assert last_step(directory) == 0
