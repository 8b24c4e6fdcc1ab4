"""TensorBoard and Weights & Biases, beside metrics/ and from the same records. Neither is needed."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

from llm_jax import config as configs
from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.training.experiment import Experiment
from llm_jax.training.metrics import Record
from llm_jax.training.rundir import RunDirectory


class Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def check(experiment: Experiment) -> None:
    """Raises UserError with the line that installs what config.logging names and is missing: before the run
    begins, in which it is opened."""
    config = experiment.logging
    asked = {
        "tensorboardX": config.tensorboard and "tensorboard",
        "wandb": config.wandb_project and "wandb_project",
    }
    for module, key in asked.items():
        if key and importlib.util.find_spec(module) is None:
            raise UserError(f"config.logging.{key} needs {module}: pip install {module}")


def open_sinks(experiment: Experiment, directory: RunDirectory, start: int) -> list[Sink]:
    """The sinks that config.logging names. start: the step at which this attempt goes on."""
    config, sinks = experiment.logging, []
    if config.tensorboard:
        sinks.append(TensorBoard(directory, start))
    if config.wandb_project:
        sinks.append(WeightsAndBiases(config.wandb_project, directory, experiment))
    return sinks


class TensorBoard:
    """Event files in ``tensorboard/``; what an earlier attempt wrote after ``start`` is hidden."""

    def __init__(self, directory: RunDirectory, start: int) -> None:
        module = importlib.import_module("tensorboardX")
        self._writer = module.SummaryWriter(str(directory.tensorboard), purge_step=start + 1)

    def write(self, record: Record) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for a run directory, over all attempts; steps done twice stand twice in its history."""

    def __init__(self, project: str, directory: RunDirectory, experiment: Experiment) -> None:
        module = importlib.import_module("wandb")
        path, self._files = storage.resolved(directory.path), ExitStack()
        self._run = module.init(
            project=project,
            name=path.name,
            id=hashlib.sha256(str(path).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(self._files.enter_context(storage.written_locally(path))),
            config=configs.to_dict(experiment),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own step may not go back, ours does

    def write(self, record: Record) -> None:
        self._run.log({"step": record["step"], **dict(scalars(record))})

    def close(self) -> None:
        self._run.finish()
        self._files.close()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """(name, value) of the numbers of a record: ``train/loss``, ``evaluation/param_norms/blocks/0``,
    ``evaluation/SET/loss``, ``train/time/seconds``."""
    prefix = "/".join([record["kind"], *([record["set"]] if "set" in record else [])])
    values = {key: value for key, value in record.items() if key not in ("attempt", "step", "kind", "set")}
    yield from _flat(values, prefix)


def _flat(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}/{key}")
        elif isinstance(value, float):
            yield f"{path}/{key}", value
