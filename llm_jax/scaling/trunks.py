"""Points that differ in their length alone share a trunk: the longest is trained, the others branch off it.

Data order does not depend on the horizon, and a schedule such as WSD (Hu et al. 2024, arXiv 2404.06395) holds
its peak until the decay: up to there a short run makes the very steps of a long one, bit for bit. So a ladder
of horizons costs one run and a cooldown for each of the others (Hägele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import config as configs
from llm_jax import storage
from llm_jax.training import metrics
from llm_jax.training.checkpoint import MANIFEST
from llm_jax.training.experiment import Experiment
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.samples import SampleFile

LENGTH = 1 << 14  # of the arrays that learning rates are computed in, a multiple


@dataclass(frozen=True)
class Branch:
    """trunk: index of the longer one; step: after which the shorter one goes on by itself."""

    trunk: int
    step: int


def plan(experiments: Sequence[Experiment]) -> dict[int, Branch]:
    """{index of an experiment: its branch}, of those that are equal to a longer one in every field but
    ``steps``: also in cadences, so that metrics are the same, and in what decides the last bits."""
    groups: dict[str, list[int]] = {}
    for index, e in enumerate(experiments):
        fields = {key: value for key, value in configs.leaves(e) if key != "steps"}
        groups.setdefault(configs.dumps(fields), []).append(index)
    branches = {}
    for group in groups.values():
        *shorter, trunk = sorted(group, key=lambda index: experiments[index].steps)
        for index in shorter:
            if step := branch_step(experiments[index], experiments[trunk]):
                branches[index] = Branch(trunk, step)
    return branches


def branch_step(short: Experiment, long: Experiment) -> int:
    """The last step between dispatches up to which both have the same learning rates, exactly in float32, and
    after which the shorter one has steps left; 0 for none."""
    differ = np.flatnonzero(rates(short, short.steps) != rates(long, short.steps))
    agree = int(differ[0]) if len(differ) else short.steps
    per = short.steps_per_dispatch
    return min(agree // per * per, short.steps - per)


def rates(e: Experiment, updates: int) -> np.ndarray:
    """float32 [updates]: the learning rates of the first of them."""
    # A sweep's process must not take an accelerator, which its points need, for a few numbers.
    jax.config.update("jax_platforms", "cpu")
    # Few lengths, since every operation is compiled for each: 12 lengths took 6.3 s of CPU, not 0.6.
    counts = jnp.arange(-(-updates // LENGTH) * LENGTH)
    return np.asarray(jax.vmap(e.schedule.build(e.optimizer.learning_rate, e.steps))(counts))[:updates]


def is_there(trunk: RunDirectory, step: int) -> bool:
    """Whether a run can be left at ``step``: its checkpoint of it is complete. The metrics up to it were on
    the disk before."""
    return (_checkpoint(trunk, step) / MANIFEST).exists()


def graft(trunk: RunDirectory, step: int, run: RunDirectory, steps: int) -> None:
    """Makes ``run``, which is not there yet, what it would be had it been trained alone for ``step`` of its
    ``steps`` and stopped: it goes on as any run does. It appears as a whole.

    The checkpoint is linked, which takes no room. Attempts of the trunk keep their numbers, but not when they
    began: their time was not spent here.
    """
    with storage.publish_directory(run.path, run.config.name) as place:
        new = RunDirectory(place)
        storage.duplicate(_checkpoint(trunk, step), _checkpoint(new, step), MANIFEST)
        storage.make_directory(new.metrics)
        for path in metrics.segments(trunk.metrics):
            records = [record for record in metrics.read_segment(path) if record["step"] <= step]
            if records:
                records[0].pop("time", None)
                text = "".join(json.dumps(record) + "\n" for record in records)
                storage.write_text(new.metrics / path.name, text)
        samples = SampleFile(new.samples)
        for at, text in SampleFile(trunk.samples).read().items():
            if at <= step:
                samples.add(at, text)
        new.branch_off(trunk, step, steps)


def _checkpoint(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"{step:08d}"
