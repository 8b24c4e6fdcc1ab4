"""The sweep entry as a user meets it: bad input, a list, points that are killed, stopped and gone on with."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.scaling.table import APART
from llm_jax.training import metrics
from llm_jax.training.program import Program

ROOT = Path(__file__).parents[2]
popen = subprocess.Popen
CONFIG = """
from llm_jax.scaling.points import grid
from llm_jax.training import experiment

def get_config(arg=""):
    changes = {
        "steps": 80, "global_batch_size": 8, "steps_per_dispatch": 2, "data.validation": "position",
        "data.sequence_length": 32, "model.num_layers": 1, "model.model_dim": 16, "model.num_heads": 2,
        "schedule.warmup_steps": 5, "evaluation.every": 20, "checkpoint.every": 10, "samples.tokens": 4,
        "mesh.cpu_devices": 2,
    }
    return experiment.override(experiment.default_config(), changes)

def sweep(arg="0.0"):
    return grid({"optimizer.learning_rate": (1e-3, 3e-3), "model.dropout": (float(arg),)})
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path / "config.py"


@pytest.fixture
def flags(config):
    text = f"--config.data.text={config.with_name('text.txt')}"
    return lambda workdir, arg="": [f"--config={config}{arg}", f"--workdir={workdir}", text]


@pytest.fixture
def sweep(monkeypatch, capsys):
    """Runs scripts/sweep.py in this process; gives its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "sweep.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_list_touches_nothing(sweep, flags, tmp_path):
    code, out, err = sweep(*flags(tmp_path / "sweep", ":0.1"), "--list")
    assert (code, err) == (0, "") and not (tmp_path / "sweep").exists()
    assert [line.split(maxsplit=3) for line in out.splitlines()] == [
        ["0", "-" * 16, "waiting", "optimizer.learning_rate=0.001, model.dropout=0.1"],
        ["1", "-" * 16, "waiting", "optimizer.learning_rate=0.003, model.dropout=0.1"],
    ]
    assert len(sweep(*flags(tmp_path / "sweep"), "--list", "--index=1")[1].splitlines()) == 1


def test_bad_input_is_one_line_before_anything_runs(sweep, flags, config, tmp_path):
    for more, message in (
        ("--index=2", "--index=2: the sweep has the points 0 to 1"),
        (
            "--config.model.num_head=3",
            "point 0 (optimizer.learning_rate=0.001, model.dropout=0.0): config.model",
        ),
        ("--config.model.dropout=0.3", "--config.model.dropout is set by the sweep itself"),
        (f"--config={ROOT}/configs/tiny_clm.py", "tiny_clm.py has no function sweep(arg='')"),
        (f"--config={config.with_name('text.txt')}", "is not a Python file"),
    ):
        code, out, err = sweep(*flags(tmp_path / "sweep"), more)
        assert (code, out) == (2, "") and err.startswith("error: ") and message in err, err
    assert sweep(*flags(tmp_path / "sweep"), "--workers=0")[0] == 2
    assert sweep(*flags(tmp_path / "sweep"), "--together=0")[0] == 2
    assert sweep(*flags(tmp_path / "sweep"), "--together=2", "--emit=slurm")[0] == 2
    assert not (tmp_path / "sweep").exists()


def test_help_says_how_to_go_on_and_to_share(sweep):
    code, out, _ = sweep("--help")
    assert code == 0 and "the same command goes on" in out and "--index=$SLURM_ARRAY_TASK_ID" in out


STAND_IN = """
import json, signal, sys, time
from pathlib import Path

flags = dict(argument.split("=", 1) for argument in sys.argv[1:])
run, config = Path(flags["--workdir"]), json.loads(Path(flags["--config"]).read_text())["config"]
(run / "metrics").mkdir(parents=True, exist_ok=True)
if config["optimizer"]["learning_rate"] < 2e-3:
    sys.exit("error: no space left")

def save(number, frame):
    signal.signal(number, signal.SIG_DFL)  # a second one would end it here
    time.sleep(0.3)
    (run / "saved").touch()
    sys.exit(130)

signal.signal(signal.SIGINT, save)
(run / "ready").touch()
time.sleep(60)
"""


@pytest.mark.slow
def test_ctrl_c_reaches_a_worker_once_and_it_says_how_to_go_on(flags, tmp_path):
    """With a stand-in for scripts/train.py, whose first point fails and whose second one waits."""
    scripts, workdir, log = tmp_path / "scripts", tmp_path / "sweep", tmp_path / "log"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "sweep.py", scripts)
    (scripts / "train.py").write_text(STAND_IN)
    command = [sys.executable, str(scripts / "sweep.py"), *flags(workdir)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, process_group=0)
    while not list(workdir.glob("runs/*/ready")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(timeout=60) == 130, log.read_text()
    assert len(list(workdir.glob("runs/*/saved"))) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith("stopped by SIGINT with 1 failed, 1 waiting; to go on, the same command: python ")
    assert f"--workdir={workdir}" in last and "failed: no space left; 0 of 2 done" in log.read_text()
    assert [row["status"] for row in table(workdir)] == ["failed", "waiting"]


def test_exit_code_and_last_lines(sweep, flags, tmp_path, monkeypatch):
    """1 where a point has failed."""
    fails = [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: popen(fails))
    code, out, err = sweep(*flags(tmp_path / "sweep"))
    assert code == 1 and "failed" in err
    assert out == f"2 points: 2 failed; table: {tmp_path}/sweep/table.csv\n"


def test_points_that_are_trained_together(sweep, flags, tmp_path, monkeypatch):
    """By the other script, in one process; asked for by one of them."""
    commands, fails = [], [sys.executable, "-c", "raise SystemExit(1)"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command) or popen(fails))
    code, out, err = sweep(*flags(tmp_path / "sweep"), "--together=2", "--index=1")
    assert code == 1 and "2 points in 1 groups" in err and out.startswith("2 points: 2 failed; table: ")
    (command,) = commands
    assert Path(command[1]) == ROOT / "scripts" / "train_together.py"
    given = [argument.split("=")[0] for argument in command[2:]]
    assert given == ["--config", "--workdir"] * 2 and len({*command}) == 6


def table(workdir):
    rows = [json.loads(line) for line in (workdir / "table.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in APART} for row in rows]


@pytest.fixture
def start(flags, tmp_path):
    """Starts the second point of the sweep in a session of its own."""

    def run(workdir):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *flags(workdir), "--index=1"]
        log = (tmp_path / f"{workdir.name}.log").open("a")
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    return run


def await_step(process, run, step):
    """Until a run has gone beyond a step."""
    while not any(f'"step": {step + 1}' in path.read_text() for path in run.glob("metrics/*.jsonl")):
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)


def kill_session(process):
    process.kill()
    process.wait()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == process.pid:
                os.kill(int(path.name), signal.SIGKILL)


@pytest.mark.slow
def test_killed_and_gone_on_with(start, sweep, flags, tmp_path):
    """SIGKILL to all its processes: at the end table, story and state of a sweep never stopped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait() == 0, (tmp_path / "whole.log").read_text()
    waiting, row = table(whole)
    assert waiting["status"] == "waiting" and waiting["steps"] is None and row["status"] == "finished"
    config = json.loads((whole / "runs" / row["fingerprint"] / "config.json").read_text())
    assert config["fingerprint"] == row["fingerprint"]
    assert row["steps"] == 80 and row["tokens"] == 80 * 8 * 32 and row["bits_per_byte"] > 0
    assert row["parameters"] - row["non_embedding_parameters"] == 128 * 16
    assert row["training_flops_causal"] < row["training_flops"] and row["best_loss"] <= row["loss"]

    one, other = (workdir / "runs" / row["fingerprint"] for workdir in (whole, cut))
    process = start(cut)
    await_step(process, other, 22)
    assert sweep(*flags(cut), "--list", "--index=1")[1].split()[:3] == ["1", row["fingerprint"], "running"]
    kill_session(process)
    assert start(cut).wait() == 0, (tmp_path / "cut.log").read_text()
    assert table(cut) == [waiting, row]
    stories = [metrics.without_time(metrics.read(run / "metrics")) for run in (one, other)]
    assert stories[0] == stories[1] and len(metrics.segments(other / "metrics")) == 2
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.device_get(Program.restore(run)[1]) for run in (one, other))
    )
    code, out, err = sweep(*flags(cut), "--index=1")  # there is nothing left to do
    assert (code, err) == (0, "") and "1 points: 1 finished; table: " in out
