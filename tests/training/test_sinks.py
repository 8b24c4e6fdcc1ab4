"""TensorBoard and W&B get the records of metrics/; without them there is a line that installs them."""

import sys
from types import SimpleNamespace

import pytest

from llm_jax.errors import UserError
from llm_jax.training import experiment, loop
from llm_jax.training.experiment import Experiment, LoggingConfig
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.sinks import open_sinks, scalars

TRAIN = {
    "attempt": 1,
    "kind": "train",
    "step": 20,
    "loss": 1.5,
    "grad_norm": None,
    "time": {"seconds": 0.5},
}
EVALUATION = {
    "attempt": 1,
    "kind": "evaluation",
    "step": 20,
    "set": "wiki",
    "loss": 2.5,
    "param_norms": {"blocks/0": 3.0},
}


class Recorder:
    """What a library was told, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def called(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return called


@pytest.fixture
def library(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=recorder.SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=recorder.init))
    return recorder


def with_logging(**values):
    return Experiment(logging=LoggingConfig(**values))


def test_scalars():
    assert dict(scalars(TRAIN)) == {"train/loss": 1.5, "train/time/seconds": 0.5}
    assert dict(scalars(EVALUATION)) == {
        "evaluation/wiki/loss": 2.5,
        "evaluation/wiki/param_norms/blocks/0": 3.0,
    }


def test_tensorboard(library, tmp_path):
    (sink,) = open_sinks(with_logging(tensorboard=True), RunDirectory(tmp_path), start=10)
    sink.write(TRAIN)
    sink.close()
    assert library.calls == [
        ("SummaryWriter", (str(tmp_path / "tensorboard"),), {"purge_step": 11}),
        ("add_scalar", ("train/loss", 1.5, 20), {}),
        ("add_scalar", ("train/time/seconds", 0.5, 20), {}),
        ("close", (), {}),
    ]


def test_wandb_is_one_run_over_attempts(library, tmp_path):
    for _ in range(2):
        (sink,) = open_sinks(with_logging(wandb_project="llm"), RunDirectory(tmp_path), start=0)
        sink.write(EVALUATION)
        sink.close()
    first, second = (kwargs for name, _, kwargs in library.calls if name == "init")
    assert first == second and first["project"] == "llm" and first["resume"] == "allow"
    open_sinks(with_logging(wandb_project="llm"), RunDirectory(tmp_path / "other"), start=0)
    assert library.calls[-2][2]["id"] != first["id"]
    logged = next(args for name, args, _ in library.calls if name == "log")
    assert logged[0]["step"] == 20 and logged[0]["evaluation/wiki/loss"] == 2.5


def test_nothing_is_imported_unasked(library, tmp_path):
    assert open_sinks(Experiment(), RunDirectory(tmp_path), start=0) == [] and library.calls == []


@pytest.mark.parametrize(
    ("key", "value", "module"), [("tensorboard", True, "tensorboardX"), ("wandb_project", "llm", "wandb")]
)
def test_missing_library(key, value, module, tmp_path, monkeypatch):
    """Said before the run begins: nothing of it is there."""
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"config.logging.{key} needs {module}: pip install {module}"):
        loop.run(with_logging(**{key: value}), tmp_path)
    assert not RunDirectory(tmp_path).config.exists() and not RunDirectory(tmp_path).metrics.exists()


def test_they_are_runtime_fields():
    plain, logged = Experiment(), with_logging(tensorboard=True, wandb_project="llm", profile="2:4")
    assert experiment.configs.fingerprint(plain) == experiment.configs.fingerprint(logged)
