"""The training loop: it owns time and files, and nothing numeric.

Evaluation, checkpoints and resumption happen only between dispatches, at absolute multiples of
``steps_per_dispatch``, so a run that was stopped makes the same dispatches as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from llm_jax import config as configs
from llm_jax import hardware
from llm_jax.models.flops import training_flops_per_token
from llm_jax.storage import write_text
from llm_jax.text import shards
from llm_jax.text.prepare import prepare
from llm_jax.training import metrics
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.experiment import Experiment, complete
from llm_jax.training.metrics import MetricsWriter
from llm_jax.training.program import Program
from llm_jax.training.progress import ProgressLine, say
from llm_jax.training.rundir import RunDirectory, carry_on
from llm_jax.training.samples import sample_text
from llm_jax.training.state import State


def run(
    experiment: Experiment, workdir: str | Path, extend: bool = False, say: Callable[[str], None] = say
) -> dict[str, float]:
    """Trains, or goes on training, in ``workdir``; gives the final evaluation.

    Prepares the data at the first start. extend: allow more steps than the run began with.
    """
    directory = RunDirectory.open(workdir)
    stored = directory.stored()
    shard_set = directory.data_of(experiment)
    header = prepare(experiment.data, experiment.tokenizer, shard_set, say)
    data = shards.content_id(header)
    directory.check_data(data)
    experiment = carry_on(stored, complete(experiment, header["vocab_size"]), extend)
    program = Program.build(experiment, shard_set)
    directory.write_config(program.experiment, data)
    checkpointer = Checkpointer(directory.checkpoints, experiment.checkpoint.keep)
    checkpointer.clean()
    try:
        state, start = restore_or_init(program, checkpointer)
        say(describe_config(program))
        say(describe(program, start))
        state = train(program, state, start, directory, checkpointer)
    finally:
        checkpointer.close()
    write_text(directory.samples, sample_text(program, state.params))
    return final_evaluation(directory)


def final_evaluation(directory: RunDirectory) -> dict[str, float]:
    """The newest evaluation of a run, from its metrics."""
    return [record for record in metrics.read(directory.metrics) if record["kind"] == "evaluation"][-1]


def restore_or_init(program: Program, checkpointer: Checkpointer) -> tuple[State, int]:
    """The newest checkpoint, or the state at step 0."""
    steps = checkpointer.steps()
    if not steps:
        return program.init(), 0
    return checkpointer.restore(steps[-1], program.abstract_state()), steps[-1]


def describe_config(program: Program) -> str:
    """What of the config differs from the defaults."""
    changed = configs.differences(Experiment(), program.experiment)
    return "config: " + ", ".join(f"{key}={new}" for key, (_, new) in changed.items() if new is not None)


def describe(program: Program, start: int) -> str:
    """One line about what is about to run."""
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(program.abstract_state().params))
    axes = ", ".join(f"{axis} {size}" for axis, size in program.layout.mesh.shape.items() if size > 1)
    kind = jax.devices()[0].device_kind
    begun = f"resuming at step {start:,}" if start else "starting"
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
) -> State:
    """Steps ``start`` to the end, with metrics, evaluations and checkpoints on the way."""
    e = program.experiment
    if start == e.steps:
        return state
    per = e.steps_per_dispatch
    writer = MetricsWriter(directory.metrics, start)
    log = StepLog(program, writer, ProgressLine(e.steps, start))
    try:
        for index, batches in enumerate(program.batches.iterate(start // per, e.steps // per), start // per):
            state, results = program.steps(state, batches)
            log.add(index * per, results)
            step, last = (index + 1) * per, (index + 1) * per == e.steps
            if last or _due(step, e.evaluation.every):
                log.drain()
                log.evaluation(step, program.evaluate(state.params))
            if last or _due(step, e.checkpoint.every):
                log.drain()
                writer.sync()
                checkpointer.save(step, state)
        checkpointer.wait()
        writer.write("end", e.steps)
    finally:
        log.close()
        writer.close()
    return state


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


class StepLog:
    """Metrics of dispatches, fetched one late so that the device never waits for the host."""

    def __init__(self, program: Program, writer: MetricsWriter, line: ProgressLine) -> None:
        e = program.experiment
        self._writer, self._line = writer, line
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._tokens = e.global_batch_size * e.data.sequence_length * e.steps_per_dispatch
        self._flops = [
            training_flops_per_token(e.model, e.data.sequence_length, causal) / program.layout.mesh.size
            for causal in ([False, True] if e.model.causal else [False])
        ]
        self._chip = hardware.lookup(jax.devices()[0].device_kind)
        self._clock: float | None = None  # starts when the first dispatch, with its compilation, is done

    def add(self, first: int, results: dict[str, jax.Array]) -> None:
        """The metrics [steps] of the dispatch that began at step ``first``."""
        self.drain()
        self._pending = first, results

    def drain(self) -> None:
        """Waits for the dispatch before and writes it."""
        if self._pending is None:
            return
        (first, results), self._pending = self._pending, None
        values = jax.device_get(results)
        count = len(values["loss"])
        time_values = self._rates()
        for i in range(count):
            step_values = {name: float(series[i]) for name, series in values.items()}
            last = i == count - 1
            self._writer.write("train", first + i + 1, step_values, time_values if last else None)
        self._line.update(first + count, float(np.mean(values["loss"])), time_values)

    def evaluation(self, step: int, result: dict[str, float]) -> None:
        """Writes and shows an evaluation; the dispatch after it is not timed."""
        self._clock = None
        self._writer.write("evaluation", step, result)
        self._line.say(
            f"step {step:,}: validation loss {result['loss']:.4f}, accuracy {result['accuracy']:.3f}"
        )

    def close(self) -> None:
        self.drain()
        self._line.close()

    def _rates(self) -> dict[str, float]:
        """Speed of the dispatch just finished: nothing for the first, which compiled, and for one that
        an evaluation stood in front of. MFU is given twice, by full and by causal attention FLOPs."""
        now, before = time.monotonic(), self._clock
        self._clock = now
        if before is None:
            return {}
        rate = self._tokens / (now - before)
        rates = {"seconds": now - before, "tokens_per_second": rate}
        if self._chip:
            names = ("mfu", "mfu_causal")
            for name, flops in zip(names, self._flops, strict=False):
                rates[name] = rate * flops / self._chip.flops
        return rates
