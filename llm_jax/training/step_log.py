"""What a run writes and shows about its steps, and the clocks behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from rich.console import Console

import llm_jax
from llm_jax import hardware, hosts
from llm_jax.data.batch import Batch
from llm_jax.text.shards import VALIDATION
from llm_jax.training import norms
from llm_jax.training.bad_steps import BadSteps
from llm_jax.training.metrics import MetricsWriter
from llm_jax.training.profiling import memory
from llm_jax.training.program import Program
from llm_jax.training.progress import Pace, ProgressLine
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.sinks import open_sinks
from llm_jax.training.step import Metrics


class StepLog:
    """Metrics of dispatches, fetched one late so that the device never waits for the host.

    They go to metrics/, to the sinks and to the progress line, from process 0. ``time.at`` is when a record
    was written, in seconds since 1970; a pause between two dispatches took ``time.seconds``.
    """

    def __init__(
        self,
        program: Program,
        directory: RunDirectory,
        start: int,
        bad_steps: BadSteps,
        console: Console | None = None,
    ) -> None:
        """console: where the progress line goes, standard error if not given."""
        e = program.experiment
        self._bad_steps = bad_steps
        self._writer = MetricsWriter(directory.metrics) if hosts.leads() else None
        self._sinks = open_sinks(e, directory, start) if hosts.leads() else []
        self._write("start", start, {}, {"process": llm_jax.BEGAN}, shown=False)
        sections = {"evaluation": e.evaluation, "samples": e.samples, "checkpoint": e.checkpoint}
        pauses = {what: section.every for what, section in sections.items()}
        self._line = ProgressLine(start, Pace(e.steps, pauses), console)
        self._pending: tuple[int, Metrics] | None = None
        self._grad_norms: dict[str, float] = {}  # of the newest step written
        self._waited = 0.0
        self._tokens = e.global_batch_size * e.data.sequence_length * e.steps_per_dispatch
        self._flops = [
            e.flops_per_token(causal) / program.layout.mesh.size
            for causal in ([False, True] if e.model.causal else [False])
        ]
        self._chip = hardware.lookup(jax.devices()[0].device_kind)
        self._began = time.monotonic(), hardware.gpu_joules() if self._chip else None
        self._clock: float | None = None  # starts when the first dispatch, with its compilation, is done

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long was waited for them since the record before is ``data_wait``."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, first: int, results: Metrics) -> None:
        """The metrics [steps] of the dispatch that began at step ``first``."""
        self.drain()
        self._pending = first, results

    def drain(self) -> None:
        """Waits for the dispatch before and writes it."""
        if self._pending is None:
            return
        (first, results), self._pending = self._pending, None
        values = jax.device_get(results)
        squares = values.pop("grad_squares")
        self._grad_norms = norms.by_layer({name: part[-1] for name, part in squares.items()})
        count = len(values["loss"])
        rates = self._rates()
        for i in range(count):
            step_values = {name: float(series[i]) for name, series in values.items()}
            last = i == count - 1
            timed = {**rates, "data_wait": self._waited, **memory()} if last else None
            # Sinks get the last of the dispatch: one point is enough there.
            self._write("train", first + i + 1, step_values, timed, shown=last)
            squares_here = {name: part[i] for name, part in squares.items()}
            if notice := self._bad_steps.see(first + i + 1, step_values, squares_here):
                self._line.say(notice)
        self._waited = 0.0
        self._line.update(first + count, float(np.mean(values["loss"])), rates, count)

    @contextmanager
    def pause(self, what: str, step: int) -> Iterator[None]:
        """Around work between dispatches: the dispatch before is written, the one after is not timed."""
        self.drain()
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._write("pause", step, {"of": what}, {"seconds": seconds}, shown=False)
        self._line.paused(what, seconds)
        self._clock = None

    def evaluation(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        """Writes and shows an evaluation: {set: its numbers}. The gradients' norms by layer are those of the
        step before it."""
        results[VALIDATION] |= {"grad_norms": self._grad_norms}
        shown = []
        for name, result in results.items():
            self._write("evaluation", step, {"set": name, **result})
            shown.append(f"{name} loss {result['loss']:.4f}, accuracy {result['accuracy']:.3f}")
        self._line.say(f"step {step:,}: {'; '.join(shown)}")

    def sync(self) -> None:
        """All metrics so far to the disk, for a checkpoint to rely on."""
        if self._writer:
            self._writer.sync()

    def end(self, step: int, early: str = "") -> None:
        """The run is complete. early: why before its last step."""
        self._write("end", step, {"early": early} if early else {}, {}, shown=False)
        if early:
            self._line.say(f"step {step:,}: ends early, {early}")

    def close(self) -> None:
        self.drain()
        self._line.close()
        if self._writer:
            self._writer.close()
        for sink in self._sinks:
            sink.close()

    def _write(
        self,
        kind: str,
        step: int,
        values: Mapping[str, Any],
        timed: Mapping[str, float] | None = None,
        shown: bool = True,
    ) -> None:
        """shown: to the sinks, too. timed: None where the moment does not matter."""
        if self._writer is None:
            return
        timed = None if timed is None else {"at": time.time(), **timed}
        record = self._writer.write(kind, step, values, timed)
        for sink in self._sinks if shown else ():
            sink.write(record)

    def _rates(self) -> dict[str, float]:
        """Speed of the dispatch just finished: nothing for the first, which compiled, and for one that
        a pause stood in front of. MFU is given twice, by full and by causal attention FLOPs; watts are of a
        GPU."""
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
        began, joules = self._began
        if joules is not None:  # the mean since the run began: the driver's counter moves ten times a second
            rates["watts"] = (hardware.gpu_joules() - joules) / (now - began)
        return rates
