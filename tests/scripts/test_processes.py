"""Several processes as one run, through the same script: they agree, notice a loss, and go on exactly."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.training import metrics

ROOT = Path(__file__).parents[2]
TEXT = "To be, or not to be, that is the question.\n" * 60
FLAGS = {
    "data.validation": "position",
    "steps": 60,
    "steps_per_dispatch": 5,
    "evaluation.every": 20,
    "checkpoint.every": 20,
    "samples.every": 20,
    "samples.tokens": 5,
    "model.num_layers": 1,
    "model.model_dim": 16,
    "schedule.warmup_steps": 5,
    "mesh.cpu_devices": 1,
    "mesh.tensor": 2,  # over both processes: each reads all rows
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the processes of a run; each writes to WORKDIR.INDEX.log."""
    root = tmp_path_factory.mktemp("processes")
    (root / "text.txt").write_text(TEXT)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}

    def run(workdir, count=2, **changes):
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        flags = {**FLAGS, "data.text": root / "text.txt", **changes}
        command = [sys.executable, str(ROOT / "scripts/train.py"), f"--config={ROOT}/configs/tiny_clm.py"]
        command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in flags.items())]
        place = [f"--coordinator=localhost:{port}", f"--processes={count}"] if count > 1 else []
        processes = []
        for i in range(count):
            log = workdir.with_suffix(f".{i}.log").open("w")
            own = [*place, f"--process={i}"] if place else []
            processes.append(subprocess.Popen([*command, *own], stdout=log, stderr=log, env=environment))
        return processes

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of two processes that was never stopped."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert [process.wait() for process in start(workdir)] == [0, 0], said(workdir)
    return workdir


def said(workdir):
    return [workdir.with_suffix(f".{i}.log").read_text() for i in range(2)]


def story(workdir):
    return metrics.without_time(metrics.read(workdir / "metrics"))


def losses(workdir):
    return [record["loss"] for record in story(workdir) if record["kind"] == "train"]


def await_step(workdir, processes, step):
    while not any(f'"step": {step}' in path.read_text() for path in metrics.segments(workdir / "metrics")):
        assert all(process.poll() is None for process in processes), said(workdir)
        time.sleep(0.01)


def test_process_0_speaks_and_one_process_gives_the_same_losses(start, whole, tmp_path):
    """The same mesh in one process; sums between processes may be taken in another order."""
    lead, other = said(whole)
    assert "on 2 x cpu (tensor 2)" in lead and "validation loss" in lead
    assert "step" not in other and "validation loss" not in other
    (process,) = start(tmp_path / "run", count=1, **{"mesh.cpu_devices": 2})
    assert process.wait() == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    assert (tmp_path / "run" / "data" / "header.json").read_bytes() == (
        whole / "data" / "header.json"
    ).read_bytes()


def test_a_killed_process_is_named_and_the_restart_is_exact(start, whole, tmp_path):
    """SIGKILL of the second process; then SIGTERM to it alone, which both obey; then to the end."""
    cut = tmp_path / "cut"
    processes = start(cut)
    await_step(cut, processes, 25)
    processes[1].kill()
    began = time.monotonic()
    assert processes[0].wait() == 3 and time.monotonic() - began < 60
    assert "error: process 1 of 2 ended: its connection closed" in said(cut)[0].splitlines()[-1]

    processes = start(cut)
    await_step(cut, processes, 30)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [0, 0], said(cut)
    assert "stopped by SIGTERM at step" in said(cut)[0].splitlines()[-1]

    assert [process.wait() for process in start(cut)] == [0, 0], said(cut)
    assert "resuming at step" in said(cut)[0] and story(cut) == story(whole)
    assert (cut / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()


def test_an_error_of_one_ends_all_with_the_same_words(start, tmp_path):
    """Here of process 0, which prepares the data while the other waits."""
    processes = start(tmp_path / "run", **{"model.vocab_size": 6})
    codes = [process.wait() for process in processes]
    assert codes == [2, 2], said(tmp_path / "run")
    assert all("error: config.model.vocab_size=6" in text.splitlines()[-1] for text in said(tmp_path / "run"))
