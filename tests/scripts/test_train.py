"""The training entry as a user meets it: bad input, resuming, killing."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_jax.training import metrics
from llm_jax.training.program import Program

ROOT = Path(__file__).parents[2]
TINY = [
    *("--config.model.num_layers=1", "--config.model.model_dim=16"),
    *("--config.schedule.warmup_steps=5", "--config.samples.tokens=5"),
]
TEXT = "To be, or not to be, that is the question.\n" * 60


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def train(monkeypatch, capsys):
    """Runs scripts/train.py in this process; gives its exit code, output and errors."""

    def run(*arguments, config="tiny_clm"):
        argv = ["train.py", f"--config={ROOT}/configs/{config}.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def on(text, workdir, *more):
    """Flags of a small run on the user's own text."""
    own = [f"--config.data.text={text}", "--config.data.validation=position", f"--workdir={workdir}"]
    return [
        *own,
        "--config.steps=20",
        "--config.evaluation.every=10",
        "--config.checkpoint.every=10",
        *TINY,
        *more,
    ]


BAD = {
    "misspelt key": ("--config.optimizer.learning_rat=1", "did you mean config.optimizer.learning_rate?"),
    "key in another section": (
        "--config.model.sequence_length=1",
        "did you mean config.data.sequence_length?",
    ),
    "wrong type": ("--config.model.num_layers=two", "config.model.num_layers must be int, not 'two'"),
    "float for an int": ("--config.steps=1.5", "config.steps must be int, not 1.5"),
    "unknown name": ("--config.model.norm=batch", "choose one of rmsnorm, layernorm"),
    "unknown component": ("--config.objective=rtd", "choose one of clm, mlm"),
    "indivisible heads": ("--config.model.num_heads=3", "model_dim=16 is not divisible by num_heads=3"),
    "indivisible batch": (
        "--config.accumulation=3",
        "global_batch_size=16 is not divisible by accumulation=3",
    ),
    "batch and devices": (
        "--config.global_batch_size=4",
        "4 rows cannot be shared by data = 8 devices",
    ),
    "heads and mesh": (
        ("--config.mesh.tensor=4", "--config.mesh.data=2"),
        "num_heads=2 is not divisible by mesh.tensor=4 (parameter blocks/attention/query, heads)",
    ),
    "length and mesh": (
        ("--config.data.sequence_length=36", "--config.mesh.context=4", "--config.mesh.data=2"),
        "sequence_length=36 is not divisible by 2 x context = 8",
    ),
    "mesh and devices": ("--config.mesh.fsdp=3", "does not fit 8 devices"),
    "endless warm-up": ("--config.schedule.warmup_steps=20", "must be less than steps=20"),
    "cadence": ("--config.evaluation.every=15", "not a multiple of steps_per_dispatch=10"),
    "model and objective": ("--config.model.causal=False", "clm needs True"),
    "small vocabulary": ("--config.model.vocab_size=8", "vocab_size=8 is smaller than the tokenizer's"),
    "missing text": ("--config.data.text=nowhere.txt", "nowhere.txt: no such file"),
    "unknown corpus": ("--config.data.text=python:novels", "there are python:source and python:docs"),
    "seed": ("--config.seed=-1", "config.seed must be at least 0"),
    "no text": ("--config.data.text=", "data.text is empty"),
    "a section": ("--config.model=big", "config.model is a section of keys"),
    "not a share": ("--config.data.validation_fraction=2.0", "must lie between 0 and 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, train, text, tmp_path):
    flags, message = BAD[case]
    code, out, err = train(*on(text, tmp_path / "run"), *([flags] if isinstance(flags, str) else flags))
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last and "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"caf\xe9 au lait", "is not UTF-8 (byte 0xe9 at offset 3)")]
)
def test_bad_text(content, message, train, text, tmp_path):
    text.write_bytes(content)
    code, _, err = train(*on(text, tmp_path / "run"))
    assert code == 2 and f"{text} {message}" in err


def test_bad_directories(train, text, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for workdir, message in (
        (tmp_path / "photos", "is not a run directory (it holds cat.jpg)"),
        (text, "is a file; name a directory"),
        (text / "below", "cannot write to"),
    ):
        code, _, err = train(*on(text, workdir))
        assert code == 2 and message in err.splitlines()[-1], err


def test_bad_config_file(train, text, tmp_path):
    for name, message in (
        (f"{tmp_path}/none", "no such file"),
        (f"{ROOT}/tests/conftest", "has no function"),
    ):
        code, _, err = train(*on(text, tmp_path / "run"), f"--config={name}.py")
        assert code == 2 and message in err


def story(workdir):
    return metrics.without_time(metrics.read(workdir / "metrics"))


@pytest.mark.slow
def test_own_text_resume_and_refusal(train, text, tmp_path):
    """Trains on a file with nothing prepared; resumes; refuses another identity, text or broken data."""
    run = tmp_path / "run"
    code, out, err = train(*on(text, run))
    assert code == 0, err
    assert "validation loss" in out and f"report: {run}/report.html" in out
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.json", "environment.json", "metrics", "checkpoints", "samples.txt", "report.html", "data"),
        ".lock",
    }
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["mesh"]["cpu_devices"] and config["config"]["model"]["dtype"] == "float32"
    first = story(run)
    assert [r["step"] for r in first if r["kind"] == "train"] == list(range(1, 21))

    code, _, err = train(*on(text, run))
    assert code == 0 and "resuming at step 20" in err and story(run) == first
    code, _, err = train(*on(text, run, "--config.seed=1"))
    assert code == 2 and "another experiment (seed: 0 -> 1)" in err
    code, _, err = train(*on(text, run, "--config.steps=40"))
    assert code == 2 and "--extend allows more steps" in err
    code, _, err = train(*on(text, run, "--config.steps=40", "--config.evaluation.every=20"), "--extend")
    assert code == 0 and [r["step"] for r in story(run) if r["kind"] == "train"] == list(range(1, 41))

    other = tmp_path / "other.txt"
    other.write_text(TEXT + "and more")
    code, _, err = train(*on(other, run, "--config.steps=40"))
    assert code == 2 and "other text than" in err

    tokens = run / "data" / "train.00000.tokens"
    data = bytearray(tokens.read_bytes())
    data[100] ^= 4
    tokens.write_bytes(data)
    code, _, err = train(*on(text, run, "--config.steps=60"), "--extend")
    assert code == 2 and "train.00000.tokens is corrupt in bytes 0 to" in err
    data[100] ^= 4
    tokens.write_bytes(data)

    stored = (run / "config.json").read_text()
    (run / "config.json").write_text(stored.replace('"num_layers": 1', '"num_layers": 2'))
    code, _, err = train(*on(text, run, "--config.steps=60", "--config.model.num_layers=2"))
    assert code == 2 and f"{run}/config.json is corrupt" in err.splitlines()[-1]
    (run / "config.json").write_text(stored)


@pytest.mark.slow
def test_stopped_and_resumed_in_one_process(train, text, tmp_path, monkeypatch):
    """An encoder with accumulation and dropout, stopped between and after checkpoints: bit for bit."""
    flags = ("--config.accumulation=2", "--config.model.dropout=0.1", "--config.steps_per_dispatch=5")
    assert train(*on(text, tmp_path / "whole", *flags), config="tiny_mlm")[0] == 0
    steps = Program.steps

    def stops(at):
        def counted(self, state, batches):
            if int(state.step) == at:
                raise KeyboardInterrupt
            return steps(self, state, batches)

        return counted

    for at in (5, 15):
        monkeypatch.setattr(Program, "steps", stops(at))
        assert train(*on(text, tmp_path / "cut", *flags), config="tiny_mlm")[0] == 130
    monkeypatch.setattr(Program, "steps", steps)
    assert train(*on(text, tmp_path / "cut", *flags), config="tiny_mlm")[0] == 0
    assert story(tmp_path / "whole") == story(tmp_path / "cut")
    same_state(tmp_path / "whole", tmp_path / "cut")


def same_state(*workdirs):
    """Final parameters and optimiser state, bit for bit."""
    import jax

    one, other = (jax.device_get(Program.restore(workdir)[1]) for workdir in workdirs)
    jax.tree.map(np.testing.assert_array_equal, one, other)


MORE = (
    *("--config.steps_per_dispatch=5", "--config.samples.every=25", "--config.checkpoint.keep_best=1"),
    "--config.mesh.cpu_devices=4",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a training of 60 steps in a process of its own, with samples and policies."""
    root = tmp_path_factory.mktemp("processes")
    (root / "text.txt").write_text(TEXT)

    def run(workdir):
        own = on(root / "text.txt", workdir, "--config.steps=60", *MORE)
        log = (workdir.parent / f"{workdir.name}.log").open("a")
        # Without the tests' own flags: optimised. What one process compiles the next need not.
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(root / "cache")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={ROOT}/configs/tiny_clm.py"]
        return subprocess.Popen([*command, *own], stdout=log, stderr=log, env=environment)

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """One that was never stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert start(path).wait() == 0
    assert "on 4 x cpu (data 4)" in (path.parent / "run.log").read_text()
    return path


def same_run(whole, cut):
    assert story(whole) == story(cut)
    assert (whole / "samples.txt").read_bytes() == (cut / "samples.txt").read_bytes()
    same_state(whole, cut)


@pytest.mark.slow
def test_killed_and_resumed(start, whole, tmp_path):
    """SIGKILL once before and once after the first checkpoint; then the end: bit for bit."""
    cut = tmp_path / "cut"
    for step in (0, 30):
        process = start(cut)
        await_step(process, cut, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(cut).wait() == 0
    assert len(metrics.segments(cut / "metrics")) >= 2
    same_run(whole, cut)


@pytest.mark.slow
def test_signals_save_and_the_same_command_goes_on(start, whole, tmp_path):
    """SIGTERM, Ctrl-C, and a Ctrl-C that is repeated: exit codes, one line, and the same bits at the end."""
    cut, log = tmp_path / "cut", tmp_path / "cut.log"
    for number, code, step in ((signal.SIGTERM, 0, 0), (signal.SIGINT, 130, 15)):
        process = start(cut)
        await_step(process, cut, step)
        process.send_signal(number)
        assert process.wait() == code, log.read_text()
        last = log.read_text().splitlines()[-1]
        assert last.startswith(f"stopped by {number.name} at step ") and "which is saved" in last
        assert "the same command: python " in last and f"--workdir={cut}" in last
        assert "Traceback" not in log.read_text()
    process = start(cut)
    await_step(process, cut, 30)
    while process.poll() is None:  # noted; ended a second later, or while it leaves
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    assert process.wait() in (130, -signal.SIGINT)
    assert start(cut).wait() == 0
    same_run(whole, cut)


def await_step(process, workdir, step):
    while process.poll() is None and not reached(workdir, step):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be stopped"


def reached(workdir, step):
    """Whether the run has gone beyond a step."""
    return any(f'"step": {step + 5}' in path.read_text() for path in metrics.segments(workdir / "metrics"))


def test_print_config_marks_what_differs(train):
    flags = ("--config.optimizer.learning_rate=0.5", "--config.model.norm=layernorm")
    code, out, _ = train("--print-config", *flags, config="tiny_mlm")
    lines = dict(line.split("=", 1) for line in out.splitlines())
    assert code == 0
    assert lines["--config.optimizer.learning_rate"] == "0.5  # default: 0.001"
    assert lines["--config.model.norm"] == "layernorm  # default: rmsnorm"
    assert lines["--config.objective.name"] == "mlm  # default: clm"
    assert lines["--config.seed"] == "0" and lines["--config.optimizer.name"] == "adamw"
    marked = [key for key, value in lines.items() if "# default" in value]
    assert not any(key.startswith("--config.objective.") for key in marked if not key.endswith(".name"))


def test_help_says_how_to_see_the_config_and_to_stop(train):
    code, out, _ = train("--help")
    assert code == 0 and "--print-config" in out and "differ from the defaults" in " ".join(out.split())
    assert "Ctrl-C and SIGTERM save" in out
