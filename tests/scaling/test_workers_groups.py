"""Points that are trained together while a sweep runs: one process for all, each with its own end. A short
script stands for scripts/train_together.py, and for scripts/train.py."""

import json
import signal
import threading
import time

import pytest

from llm_jax import storage
from llm_jax.scaling import groups, workers
from llm_jax.scaling.board import Board
from llm_jax.scaling.points import chain, grid
from llm_jax.scaling.sweep import Sweep, resolve
from llm_jax.training import experiment
from llm_jax.training.signals import Stop

PROGRAM = """
import hashlib, json, os, signal, sys, time
from pathlib import Path

flags, root = [argument.split("=", 1) for argument in sys.argv[1:]], Path(__file__).parent
configs = [json.loads(Path(path).read_text())["config"] for flag, path in flags if flag == "--config"]
runs = [Path(path) for flag, path in flags if flag == "--workdir"]
how, seeds = json.loads((root / "how.json").read_text()), [config["seed"] for config in configs]
with (root / "order.txt").open("a") as file:
    file.write(f"{Path(__file__).stem} {seeds}\\n")
lost = set()

def write(run, attempt, kind, step, **values):
    with (run / "metrics" / f"{attempt:04d}.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": attempt, "kind": kind, "step": step, **values}) + "\\n")

def told(number, frame):
    print("told", flush=True)
    time.sleep(0.4)  # a second signal would come meanwhile
    sys.exit(0)

for config, run in zip(configs, runs):
    (run / "metrics").mkdir(parents=True, exist_ok=True)
    text = json.dumps({"config": config}, sort_keys=True)
    content = {"config": config, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (run / "config.json").write_text(json.dumps(content))
    environment = {"devices": {"kind": "cpu", "count": 1}, "mesh": {"members": len(runs)}}
    (run / "environment.json").write_text(json.dumps(environment))
attempt = 1 + len(list((runs[0] / "metrics").iterdir()))
for step in (1, 2):
    for config, run in zip(configs, runs):
        bad = 16 if how.get(str(config["seed"])) == "diverges" else 0
        if run not in lost and (attempt, bad) < (2, 16):
            write(run, attempt, "train", step, loss=1.0, skipped=0.0, bad_in_row=bad)
        lost |= {run} if bad else set()
    if how.get("all") == f"fails at {step}":
        sys.exit("error: no space left")
    if how.get("all") == f"is killed at {step}":
        os.kill(os.getpid(), signal.SIGKILL)
    if how.get("all") == f"waits at {step}":
        signal.signal(signal.SIGTERM, told)
        (root / "ready").touch()
        time.sleep(60)
for config, run in zip(configs, runs):
    if run not in lost:
        write(run, attempt, "evaluation", 2, set="validation", loss=1.0 + config["seed"])
if len(lost) == len(runs):
    sys.exit(f"error: {seeds[-1]}: 16 bad steps in a row")
"""
TWO = grid({"seed": (0, 1)})
THREE = grid({"seed": (0, 1, 2)})


@pytest.fixture
def sweep_of(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 40)
    for name in ("train.py", "train_together.py"):
        (tmp_path / name).write_text(PROGRAM)
    common = {"data.text": str(tmp_path / "text.txt"), "data.validation": "position"}
    common |= {"schedule.warmup_steps": 1}

    def sweep(points, steps=2):
        points = [{"steps": steps, **point} for point in points]
        return Sweep(tmp_path / "sweep", resolve(experiment.default_config(), points, common))

    return sweep


@pytest.fixture
def run(tmp_path):
    """Runs a sweep as told, by seed or for all; gives its rows and which processes were started."""

    def run(sweep, together=8, index=None, stop=None, **how):
        (tmp_path / "how.json").write_text(json.dumps({key.strip("_"): text for key, text in how.items()}))
        (tmp_path / "order.txt").write_text("")
        points = groups.prepare(sweep, sweep.select(index), together, 1, lambda _: None)
        board = Board(sweep, points)
        try:
            rows = workers.run(sweep, points, 1, tmp_path / "train.py", stop or Stop(), board)
        finally:
            board.close()
        return rows, (tmp_path / "order.txt").read_text().splitlines()

    return run


def ends(rows):
    return [(row["status"], row["error"]) for row in rows]


FINISHED = ("finished", None)


def test_a_group_is_one_process(sweep_of, run, capfd):
    """Points that nobody is like are by themselves. One log serves a group, and each point says where."""
    sweep = sweep_of(chain(THREE, [{"seed": 7, "optimizer.weight_decay": 0.0}]))
    rows, order = run(sweep)
    assert order == ["train_together [0, 1, 2]", "train [7]"] and ends(rows) == [FINISHED] * 4
    assert [row["loss"] for row in rows] == [1.0, 2.0, 3.0, 8.0]
    assert [row["together"] for row in rows] == [3, 3, 3, 1]
    first, *others = (sweep.directory(point) for point in sweep.points[:3])
    assert all(f"the log is {first.log}\n" in other.log.read_text() for other in others)
    said = capfd.readouterr().err
    assert f"(steps=2, seed=0) starts together with 1+2; its log: {first.log}\n" in said
    assert said.index("point 0") < said.index(
        "point 1 (steps=2, seed=1) finished: validation loss 2.0000; 3 of 4"
    )
    assert run(sweep) == (rows, [])


def test_one_that_diverges_does_not_end_the_others(sweep_of, run):
    sweep = sweep_of(THREE)
    rows, _ = run(sweep, _1="diverges")
    diverged = ("diverged", "16 bad steps in a row up to step 1")
    assert ends(rows) == [FINISHED, diverged, FINISHED]
    assert run(sweep)[1] == []


def test_where_all_diverge_each_has_its_own_reason(sweep_of, run):
    """The process says the last one's."""
    assert (
        ends(run(sweep_of(TWO), _0="diverges", _1="diverges")[0])
        == [("diverged", "16 bad steps in a row up to step 1")] * 2
    )


def test_who_was_killed_goes_on_with_the_same_members(sweep_of, run):
    """Also by a start that would make other groups, or is of one point alone, or of more points."""
    rows, order = run(sweep_of(THREE), together=2, all="is killed at 1")
    assert order == ["train [0]", "train_together [1, 2]"]
    assert ends(rows) == [("failed", "ended by SIGKILL")] * 3
    assert run(sweep_of(THREE), index=2, together=1, all="is killed at 2")[1] == ["train_together [1, 2]"]
    rows, order = run(sweep_of(chain([{"seed": 5}, {"seed": 6}], THREE)))
    assert order == ["train_together [5, 6]", "train [0]", "train_together [1, 2]"]
    assert ends(rows) == [FINISHED] * 5


def test_who_is_settled_is_started_with_the_others(sweep_of, run):
    """They must stay the same program. The process failed for a reason that is not the diverged one's."""
    sweep = sweep_of(THREE)
    rows, _ = run(sweep, _1="diverges", all="fails at 2")
    failed = ("failed", "no space left")
    assert ends(rows) == [failed, ("diverged", "16 bad steps in a row up to step 1"), failed]
    rows, order = run(sweep, _1="diverges")
    assert order == ["train_together [0, 1, 2]"]
    assert ends(rows) == [FINISHED, ("diverged", "16 bad steps in a row up to step 1"), FINISHED]
    sweep.directory(sweep.points[2]).run.config.unlink()  # deleted by hand
    assert run(sweep, _1="diverges")[1] == ["train_together [0, 1, 2]"]


def test_the_locks_of_all_are_held(sweep_of, run, tmp_path):
    """By the process, also when the sweep that started it is gone."""
    sweep = sweep_of(TWO)
    (tmp_path / "how.json").write_text('{"all": "waits at 1"}')
    sweep.prepare(sweep.points, lambda _: None)
    waiting = groups.settle(sweep, sweep.points, 8)
    worker = workers.start_next(sweep, waiting, set(), tmp_path / "train.py")
    assert not waiting and [sweep.status_now(point) for point in sweep.points] == ["running"] * 2
    for member in worker.members:
        member.lock.close()  # as the kernel does for a sweep that is killed
    assert [sweep.status_now(point) for point in sweep.points] == ["running"] * 2
    worker.process.kill()
    worker.process.wait()
    assert "running" not in [sweep.status_now(point) for point in sweep.points]


def test_a_group_waits_for_all_its_locks_and_keeps_none(sweep_of, run, monkeypatch):
    sweep = sweep_of(TWO)
    sweep.prepare(sweep.points, lambda _: None)
    directory = sweep.directory(sweep.points[1])
    directory.make()
    lock = storage.lock(directory.lock)
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.0)
    assert run(sweep)[1] == []
    assert [sweep.status_now(point) for point in sweep.points] == ["waiting", "running"]
    monkeypatch.setattr(workers, "GRACE_SECONDS", 60.0)
    threading.Timer(0.3, lock.close).start()
    assert ends(run(sweep)[0]) == [FINISHED] * 2


def test_a_signal_is_told_once_to_a_group(sweep_of, run, tmp_path):
    def request():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        stop.signal = signal.SIGTERM

    sweep, stop = sweep_of(TWO), Stop()
    thread = threading.Thread(target=request)
    thread.start()
    rows, _ = run(sweep, stop=stop, all="waits at 1")
    thread.join()
    assert ends(rows) == [("unfinished", None)] * 2
    assert sweep.directory(sweep.points[0]).log.read_text().count("told") == 1
    rows, order = run(sweep)
    assert order == ["train_together [0, 1]"] and ends(rows) == [FINISHED] * 2


def test_the_group_of_one_point(sweep_of, run):
    rows, order = run(sweep_of(grid({"seed": range(4)})), together=2, index=3)
    assert order == ["train_together [2, 3]"]
    assert [row["status"] for row in rows] == ["waiting"] * 2 + ["finished"] * 2


def test_trunks_and_branches_are_by_themselves(sweep_of):
    """A branch with the beginning of a group would not be what the point is alone."""
    wsd = {"schedule.name": ("wsd",), "steps": (10, 20), "seed": (0, 1)}
    sweep = sweep_of(chain(grid(wsd), grid({"schedule.name": ("wsd",), "seed": (2, 3), "steps": (20,)})))
    sweep.prepare(sweep.points, lambda _: None)
    found = groups.settle(sweep, sweep.points, 8)
    assert [[point.index for point in group] for group in found] == [[0], [1], [2], [3], [4, 5]]


def test_a_group_does_not_branch_off_what_was_added_later(sweep_of, run):
    points = grid({"schedule.name": ("wsd",), "seed": (0, 1)})
    sweep = sweep_of(points, steps=10)
    sweep.prepare(sweep.points, lambda _: None)
    groups.settle(sweep, sweep.points, 8)
    longer = sweep_of([{"steps": 10, **point} for point in points] + [{"steps": 40, **points[0]}])
    assert longer.branches[0].trunk == 2
    assert run(longer)[1] == ["train_together [0, 1]", "train [0]"]
