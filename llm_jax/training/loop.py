"""The training loop: it owns time and files, and nothing numeric.

Evaluation, checkpoints and resumption happen only between dispatches, at absolute multiples of
``steps_per_dispatch``, so a run that was stopped makes the same dispatches as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from llm_jax import config as configs
from llm_jax import flags, hosts, storage
from llm_jax.errors import Stopped, UserError
from llm_jax.models import pipeline
from llm_jax.text import shards
from llm_jax.text.prepare import prepare
from llm_jax.training import metrics, norms, out_of_memory, sinks, warm_start
from llm_jax.training.bad_steps import BadSteps
from llm_jax.training.checkpoint import Checkpointer, Source
from llm_jax.training.early_stopping import out_of_patience
from llm_jax.training.experiment import Experiment, complete
from llm_jax.training.fitting import check_start
from llm_jax.training.policy import SavePolicy
from llm_jax.training.profiling import Profiler
from llm_jax.training.program import Program
from llm_jax.training.progress import say
from llm_jax.training.rundir import RunDirectory, carry_on
from llm_jax.training.samples import SampleFile, check_prompt, sample_text
from llm_jax.training.signals import Stop
from llm_jax.training.state import State
from llm_jax.training.step_log import StepLog

Fit = Callable[[Program, Callable[[str], None]], Program]


def run(
    experiment: Experiment,
    workdir: str | Path,
    extend: bool = False,
    say: Callable[[str], None] = say,
    stop: Stop | None = None,
    fit: Fit = lambda program, _: program,
) -> dict[str, Any]:
    """Trains, or goes on training, in ``workdir``; gives the final evaluation.

    Prepares the data at the first start. extend: allow more steps than the run began with. stop: when that of
    any process has a reason, the state is saved after the dispatch under way and Stopped is raised. Every
    process of a run calls this, with a ``workdir`` that all see. fit: asked at the first start of a run whose
    ``accumulation`` is 0 to choose it (planning/fit.py).
    """
    directory = hosts.first_alone("open", lambda: RunDirectory.open(workdir))
    with directory.held():
        return _run(experiment, directory, extend, say, stop or Stop(), fit)


def _run(
    experiment: Experiment,
    directory: RunDirectory,
    extend: bool,
    say: Callable[[str], None],
    stop: Stop,
    fit: Fit,
) -> dict[str, Any]:
    sinks.check(experiment)
    stored = directory.stored()
    shard_set = directory.data_of(experiment)
    sets = experiment.evaluation.sets
    header = hosts.first_alone(
        "data", lambda: prepare(experiment.data, experiment.tokenizer, shard_set, say, sets)
    )
    data = shards.content_id(header)
    directory.check_data(data)
    experiment = carry_on(stored, complete(experiment, header["vocab_size"]), extend)
    about = {"vocab_size": experiment.model.vocab_size, "tokenizer": header["tokenizer"]}
    checkpointer = make_checkpointer(directory, experiment, about)
    try:
        newest = checkpointer.newest(experiment.checkpoint.damaged == "skip", say)
        check_start(experiment, newest or 0)
        source = find_source(experiment.init_from, directory, newest is not None)
        program = Program.build(experiment, shard_set)
        check_prompt(program)
        if experiment.accumulation == 0:
            program = fit(program, say)
        with out_of_memory.explained(program):
            state, start = restore_or_begin(program, checkpointer, newest, source, say)
        begun = source.hash if source else directory.begun_from()
        if start and (moved := directory.moved(program.layout.mesh.shape)):
            say(moved)
        if hosts.leads():
            directory.write_config(program.experiment, program.layout.mesh.shape, data, begun)
        checkpointer.clean(say)
        say(describe_config(program))
        say(describe(program, start))
        say(flags.describe(program.layout.platform))
        with stop.deferred(), out_of_memory.explained(program):
            state = train(program, state, start, directory, checkpointer, stop)
    except BaseException as error:
        together = isinstance(error, Stopped) and error.together
        if together or not hosts.leave(error):  # others that end may no longer take part in a save
            checkpointer.close()
        raise
    checkpointer.close()
    SampleFile(directory.samples).add(int(state.step), sample_text(program, state.judged))
    hosts.gather("written", True)
    return final_evaluation(directory)


def make_checkpointer(directory: RunDirectory, experiment: Experiment, about: dict[str, Any]) -> Checkpointer:
    c = experiment.checkpoint
    return Checkpointer(directory.checkpoints, c.keep, c.keep_best, c.keep_every, about, c.verify, c.at)


def final_evaluation(directory: RunDirectory) -> dict[str, Any]:
    """The newest evaluation of a run, from its metrics."""
    return metrics.evaluations(metrics.read(directory.metrics))[-1]


def find_source(init_from: str, directory: RunDirectory, goes_on: bool) -> Source | None:
    """The checkpoint that a run begins from, or None for fresh parameters and for a run that goes on.

    Raises UserError when the run began from something else: known by the hash, but where a run goes on
    ``init_from`` is not read and may be gone.
    """
    begun = directory.begun_from()
    if goes_on and (begun or not init_from):
        return None
    source = Source.find(storage.path(init_from)) if init_from else None
    if directory.config.exists() and (source.hash if source else "") != begun:
        raise UserError(
            f"{directory.path} began from {'another checkpoint' if begun else 'fresh parameters'} than "
            f"config.init_from={init_from!r} now gives; use another --workdir"
        )
    return source


def restore_or_begin(
    program: Program,
    checkpointer: Checkpointer,
    newest: int | None,
    source: Source | None,
    say: Callable[[str], None],
) -> tuple[State, int]:
    """The newest checkpoint, or the state at step 0."""
    if newest is not None:
        return program.read(checkpointer, newest), newest
    if source:
        return program.begin(warm_start.params_from(program, source, say)), 0
    return program.init(), 0


def describe_config(program: Program) -> str:
    """What of the config differs from the defaults."""
    changed = configs.changed(Experiment, program.experiment)
    return "config: " + ", ".join(f"{key}={new}" for key, (_, new) in changed.items())


def describe(program: Program, start: int) -> str:
    """One line about what is about to run."""
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(program.abstract_state().params))
    axes = ", ".join(f"{axis} {size}" for axis, size in program.layout.mesh.shape.items() if size > 1)
    kind = jax.devices()[0].device_kind
    begun = f"resuming at step {start:,}" if start else "starting"
    if program.layout.axes("layers"):
        rows = program.experiment.micro_batch
        idle = pipeline.bubble(program.layout, rows)
        axes += f"; a pipeline of {program.layout.parts(rows)} parts, idle {idle:.0%} of its ticks"
    return (
        f"model: {params / 1e6:.2f} M parameters, {program.experiment.model.dtype}, on "
        f"{program.layout.mesh.size} x {kind} ({axes or 'one device'}); {begun}"
    )


def train(
    program: Program,
    state: State,
    start: int,
    directory: RunDirectory,
    checkpointer: Checkpointer,
    stop: Stop,
) -> State:
    """Steps ``start`` to the end, with metrics, evaluations, samples and checkpoints on the way. The end
    is also where patience with the validation loss does.

    Raises Stopped, with everything saved, when ``stop`` has a reason before the end.
    """
    e = program.experiment
    known = metrics.evaluations(metrics.read(directory.metrics))
    losses = hosts.gather("losses", [r["loss"] for r in known if r["step"] <= start])[0]
    if start == e.steps or out_of_patience(losses, e.evaluation.patience):
        return state
    per = e.steps_per_dispatch
    policy, samples = SavePolicy(e.checkpoint), SampleFile(directory.samples)
    bad_steps = BadSteps(directory, checkpointer, e.guard.patience)
    with (
        closing(Profiler(directory.profile, e.logging.profiled)) as profiler,
        closing(program.batches.iterate(start // per, e.steps // per)) as batches,
        closing(StepLog(program, directory, start, bad_steps)) as log,
    ):
        if reason := agree(stop.reason, False)[0]:
            raise Stopped(f"{reason} before it went on from step {start:,}", together=True)
        for first, batch in zip(range(start, e.steps, per), log.timed(batches), strict=True):
            profiler.at(first, state)
            state, results = program.steps(state, batch)
            log.add(first, results)
            step, last, loss = first + per, first + per == e.steps, None
            checkpointer.check()
            reason, due = agree(stop.reason, policy.due(step))
            if last or is_due(step, e.evaluation.every):
                loss = evaluate(program, state, log, step)
                losses.append(loss)
                last = last or out_of_patience(losses, e.evaluation.patience)
            if not last and is_due(step, e.samples.every):
                with log.pause("samples", step):
                    samples.add(step, sample_text(program, state.judged))
            best = loss is not None and checkpointer.is_among_best(step, loss)
            if last or reason or best or due:
                with log.pause("checkpoint", step):
                    log.sync()
                    checkpointer.save(step, state, loss)
                policy.saved()
            if reason and not last:
                checkpointer.wait()
                raise Stopped(f"{reason} at step {step:,} of {e.steps:,}, which is saved", together=True)
            if last:
                break
        checkpointer.wait()
        log.end(step, f"no better loss in {e.evaluation.patience} evaluations" if step < e.steps else "")
    return state


def agree(reason: str, due: bool) -> tuple[str, bool]:
    """What all processes do after a dispatch: stop for the first reason that one of them has, and save where
    process 0, by its clock, finds it due."""
    found = hosts.gather("dispatch", [reason, due])
    return next((reason for reason, _ in found if reason), ""), found[0][1]


def evaluate(program: Program, state: State, log: StepLog, step: int) -> float:
    """Evaluates on every set, between dispatches; gives the validation loss. The running mean of the
    parameters is what is judged where there is one."""
    with log.pause("evaluation", step):
        results = program.evaluate_all(state.judged)
        with jax.set_mesh(program.layout.mesh):
            squares = jax.jit(norms.squares)(state.params)
    results[shards.VALIDATION] |= {"param_norms": norms.by_layer(squares)}
    log.evaluation(step, results)
    return results[shards.VALIDATION]["loss"]


def is_due(step: int, every: int) -> bool:
    """Whether a cadence falls on a step; 0 = never."""
    return bool(every) and step % every == 0
