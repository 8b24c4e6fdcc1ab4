"""A step of a run once more: reached by the run's own dispatches, then made with its insides visible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import storage
from llm_jax.data.batch import Batch
from llm_jax.errors import UserError
from llm_jax.training import bad_steps, insides, metrics, norms, warm_start
from llm_jax.training.bad_steps import BadStep
from llm_jax.training.checkpoint import Checkpointer, Source
from llm_jax.training.findings import Finding, LayerNorms, Row, judge, usual_norms
from llm_jax.training.insides import Insides
from llm_jax.training.program import Program
from llm_jax.training.rundir import RunDirectory, environment
from llm_jax.training.state import State


def replay(workdir: str | Path, step: int | None, say: Callable[[str], None]) -> Finding:
    """Replays a step, by default the newest that a bad one is known of. Raises UserError without a run."""
    run = RunDirectory(storage.path(workdir))
    experiment = run.stored()
    if experiment is None:
        raise UserError(f"--workdir={workdir} holds no run")
    known = bad_steps.steps(run.bad_steps)
    if step is None and not known:
        raise UserError(f"no bad step is known of {workdir}; name one with --step")
    step = known[-1] if step is None else step
    if not 1 <= step <= experiment.steps:
        raise UserError(f"--step={step}: the run has steps 1 to {experiment.steps}")
    program = Program.build(experiment, run.data_of(experiment))
    state, begin = _begin(program, run, step, say)
    say(f"replaying steps {begin + 1:,} to {step:,}")
    state, seen = advance(program, state, begin, step - 1)
    batch = batch_of(program, step)
    inside = insides.look(program, state, batch)
    limit = float(experiment.guard.limit(state.guard))
    loss, grad_norm = once_more(program, state, step)
    bad = BadStep.read(run.bad_steps, step)
    recorded = _recorded(run, step, bad)
    usual = usual_norms(seen + _evaluated(run, step))
    where, verdict = judge(inside, loss, grad_norm, limit, usual, bad is not None)
    same = recorded and bool(np.array_equal(recorded, (loss, grad_norm), equal_nan=True))
    rows, changed = _rows(program, batch, inside, step), _changed(run, program.layout.mesh.shape)
    numbers = loss, grad_norm, limit, recorded, same
    return Finding(step, begin, where, verdict, *numbers, inside, usual, rows, changed)


# ---- to the step --------------------------------------------------------------------------------


def _begin(program: Program, run: RunDirectory, step: int, say: Callable[[str], None]) -> tuple[State, int]:
    """The newest state that is kept from before a step, and how many steps it has seen."""
    per, found = program.experiment.steps_per_dispatch, []
    for directory in (run.bad_steps / f"{step:08d}", run.checkpoints):
        checkpointer = Checkpointer(directory, keep=1)
        found += [(s, checkpointer) for s in checkpointer.steps() if s < step and s % per == 0]
    if found:
        begin, checkpointer = max(found, key=lambda pair: pair[0])
        return program.read(checkpointer, begin), begin
    if not run.begun_from():
        return program.init(), 0
    source = Source.find(storage.path(program.experiment.init_from))
    if source.hash != run.begun_from():
        raise UserError(f"{source.path} is not what {run.path} began from; restore it to replay from step 0")
    return program.begin(warm_start.params_from(program, source, say)), 0


def advance(program: Program, state: State, start: int, stop: int) -> tuple[State, LayerNorms]:
    """The state after ``stop`` steps from the one after ``start``, which is used up, and the gradient norms
    by layer of the steps that were applied on the way.

    A dispatch that would go beyond gets weights that are no numbers there: the guard leaves such steps
    out, so that the very program that the run used ends in its middle, with the same bits.
    """
    per, seen = program.experiment.steps_per_dispatch, []
    for first in range(start, stop, per):
        count = min(per, stop - first)
        batch = _first_steps(program, program.batches[first // per], count)
        state, results = program.steps(state, batch)
        values = jax.device_get(results)
        squares = values["grad_squares"]
        for i in np.flatnonzero(values["skipped"][:count] == 0):
            seen.append(norms.by_layer({name: part[i] for name, part in squares.items()}))
        if count < per:
            state = _rewound(state, stop, values, count)
    return state, seen


def _first_steps(program: Program, batch: Batch, count: int) -> Batch:
    """A dispatch whose steps from ``count`` on have no finite loss."""
    if count == len(batch.weights):
        return batch
    keep = np.arange(len(batch.weights))[:, None, None, None] < count
    with jax.set_mesh(program.layout.mesh):
        return batch.replace(weights=jnp.where(keep, batch.weights, jnp.nan))


def _rewound(state: State, step: int, values: Mapping[str, np.ndarray], count: int) -> State:
    """The counters as they were before the steps that were left out. The norm of the streak is lost: a step
    is replayed as the first of its own."""

    def put(value: float, like: jax.Array) -> jax.Array:
        return jax.device_put(np.asarray(value, like.dtype), like.sharding)

    guard = state.guard.replace(in_row=put(0, state.guard.in_row))
    scale = state.loss_scale
    if scale is not None:
        before = values["loss_scale"][count]
        scale = scale.replace(scale=put(before, scale.scale), good=put(0, scale.good))
    return state.replace(step=put(step, state.step), guard=guard, loss_scale=scale)


def batch_of(program: Program, step: int) -> Batch:
    """What one step trains on, [accumulation, rows, length]."""
    dispatch, i = divmod(step - 1, program.experiment.steps_per_dispatch)
    return jax.tree.map(lambda x: x[i], program.batches[dispatch])


def once_more(program: Program, state: State, step: int) -> tuple[float, float]:
    """(loss, norm of the gradient) of a step by the run's own dispatch, in which it comes first and alone.
    The state is used up."""
    dispatch, i = divmod(step - 1, program.experiment.steps_per_dispatch)
    with jax.set_mesh(program.layout.mesh):
        batch = jax.tree.map(lambda x: jnp.roll(x, -i, axis=0), program.batches[dispatch])
    _, results = program.steps(state, _first_steps(program, batch, 1))
    return float(results["loss"][0]), float(results["grad_norm"][0])


# ---- what the run knows of it ---------------------------------------------------------------------


def _evaluated(run: RunDirectory, step: int) -> LayerNorms:
    """Gradient norms by layer that the run wrote with its evaluations before a step."""
    found = metrics.evaluations(metrics.read(run.metrics))
    layers = [record["grad_norms"] for record in found if record["step"] < step and "grad_norms" in record]
    return [one for one in layers if None not in one.values()]


def _recorded(run: RunDirectory, step: int, bad: BadStep | None) -> tuple[float, float] | None:
    if bad:
        return bad.loss, bad.grad_norm
    for record in metrics.read(run.metrics):
        if record["kind"] == "train" and record["step"] == step:
            pair = (record["loss"], record["grad_norm"])
            return tuple(math.nan if x is None else x for x in pair)
    return None


def _rows(program: Program, batch: Batch, inside: Insides, step: int) -> list[Row]:
    """Every row of the batch: those that are not finite first, then by loss, the largest first."""
    host = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(batch))
    finite_bl = inside.finite_nbl.all(axis=0)
    draws = (step - 1) * len(finite_bl) + np.arange(len(finite_bl))
    rows = []
    for i, draw in enumerate(draws.tolist()):
        weight = max(float(host.weights[i].sum()), 1.0)
        token = None if finite_bl[i].all() else int(np.argmin(finite_bl[i]))
        text = program.tokenizer.decode(host.inputs[i][host.segments[i] > 0])
        rows.append(Row(draw, float(inside.losses_bl[i].sum()) / weight, token, text))
    return sorted(rows, key=lambda row: (row.token is None, -row.loss if row.token is None else row.draw))


def _changed(run: RunDirectory, mesh: Mapping[str, int]) -> dict[str, str]:
    """{what: "old -> new"} of the machine and its packages since the run last began."""
    then, now = json.loads(run.environment.read_text()), json.loads(json.dumps(environment(mesh)))
    names = ("python", "platform", "devices", "mesh", "processes")
    pairs = {name: (then.get(name), now[name]) for name in names}
    packages = then.get("packages", {})
    pairs |= {name: (packages.get(name), version) for name, version in now["packages"].items()}
    return {name: f"{old} -> {new}" for name, (old, new) in pairs.items() if old != new}
