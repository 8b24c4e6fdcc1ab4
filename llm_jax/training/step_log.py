"""What a run writes and shows about its steps, and the clocks behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from llm_jax import hardware
from llm_jax.data.batch import Batch
from llm_jax.models.flops import training_flops_per_token
from llm_jax.training import norms
from llm_jax.training.metrics import VALIDATION, MetricsWriter
from llm_jax.training.profiling import memory
from llm_jax.training.program import Program
from llm_jax.training.progress import Pace, ProgressLine
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.sinks import open_sinks
from llm_jax.training.step import Metrics


class StepLog:
    """Metrics of dispatches, fetched one late so that the device never waits for the host.

    They go to metrics/, to the sinks and to the progress line.
    """

    def __init__(self, program: Program, directory: RunDirectory, start: int) -> None:
        e = program.experiment
        self._sinks = open_sinks(e, directory, start)
        self._writer = MetricsWriter(directory.metrics, start)
        pauses = {"evaluation": e.evaluation.every, "samples": e.samples.every}
        self._line = ProgressLine(start, Pace(e.steps, pauses))
        self._pending: tuple[int, Metrics, float] | None = None
        self._grad_norms: dict[str, float] = {}  # of the newest step written
        self._waited = 0.0
        self._tokens = e.global_batch_size * e.data.sequence_length * e.steps_per_dispatch
        self._flops = [
            training_flops_per_token(e.model, e.data.sequence_length, causal) / program.layout.mesh.size
            for causal in ([False, True] if e.model.causal else [False])
        ]
        self._chip = hardware.lookup(jax.devices()[0].device_kind)
        self._clock: float | None = None  # starts when the first dispatch, with its compilation, is done

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each was waited for is ``data_wait`` of its dispatch."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self._waited = time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, first: int, results: Metrics) -> None:
        """The metrics [steps] of the dispatch that began at step ``first``."""
        self.drain()
        self._pending = first, results, self._waited

    def drain(self) -> None:
        """Waits for the dispatch before and writes it."""
        if self._pending is None:
            return
        (first, results, waited), self._pending = self._pending, None
        values = jax.device_get(results)
        squares = values.pop("grad_squares")
        self._grad_norms = norms.by_layer({name: part[-1] for name, part in squares.items()})
        count = len(values["loss"])
        rates = self._rates()
        for i in range(count):
            step_values = {name: float(series[i]) for name, series in values.items()}
            last = i == count - 1
            timed = {**rates, "data_wait": waited, **memory()} if last else None
            record = self._writer.write("train", first + i + 1, step_values, timed)
        for sink in self._sinks:
            sink.write(record)  # the last of the dispatch: one point is enough there
        self._line.update(first + count, float(np.mean(values["loss"])), rates, count)

    @contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Around work between dispatches: the dispatch before is written, the one after is not timed."""
        self.drain()
        began = time.monotonic()
        yield
        self._line.paused(what, time.monotonic() - began)
        self._clock = None

    def evaluation(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        """Writes and shows an evaluation: {set: its numbers}. The gradients' norms by layer are those of the
        step before it."""
        results[VALIDATION] |= {"grad_norms": self._grad_norms}
        shown = []
        for name, result in results.items():
            record = self._writer.write("evaluation", step, {"set": name, **result})
            for sink in self._sinks:
                sink.write(record)
            shown.append(f"{name} loss {result['loss']:.4f}, accuracy {result['accuracy']:.3f}")
        self._line.say(f"step {step:,}: {'; '.join(shown)}")

    def sync(self) -> None:
        """All metrics so far to the disk, for a checkpoint to rely on."""
        self.drain()
        self._writer.sync()

    def end(self, step: int, early: str = "") -> None:
        """The run is complete. early: why before its last step."""
        self._writer.write("end", step, {"early": early} if early else {})
        if early:
            self._line.say(f"step {step:,}: ends early, {early}")

    def close(self) -> None:
        self.drain()
        self._line.close()
        self._writer.close()
        for sink in self._sinks:
            sink.close()

    def _rates(self) -> dict[str, float]:
        """Speed of the dispatch just finished: nothing for the first, which compiled, and for one that
        a pause stood in front of. MFU is given twice, by full and by causal attention FLOPs."""
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
