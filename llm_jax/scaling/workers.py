"""Runs the points of a sweep, each by scripts/train.py in a process of its own.

Points share nothing but their data, so that one which fails, is killed or runs out of memory ends alone. A
point is run by one process at a time, whoever started the sweep and how often: its lock is held by the
training process too, which inherits it, and the kernel frees it however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling import trunks
from llm_jax.scaling.board import Board
from llm_jax.scaling.sweep import (
    DIVERGED,
    FAILED,
    FINISHED,
    RUNNING,
    SETTLED,
    UNFINISHED,
    Point,
    PointDirectory,
    Sweep,
)
from llm_jax.scaling.table import Row, Table
from llm_jax.training import metrics
from llm_jax.training.early_stopping import at_the_end
from llm_jax.training.experiment import Experiment
from llm_jax.training.signals import CODES, NOTICE, Stop

POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0  # for the last process of a sweep that was killed to be gone
RELAY_SECONDS = 1.0  # for training processes that a scheduler signals, too, to say so
LOG_TAIL = 4096  # bytes, enough for the last line


def run(
    sweep: Sweep, points: Sequence[Point], count: int, program: Path, stop: Stop, board: Board
) -> list[Row]:
    """Runs what of ``points`` is neither settled nor being run elsewhere, ``count`` at a time; writes the
    table after each, and gives its rows. program: scripts/train.py.

    When ``stop`` has a reason, the training processes are told to save and end, and no other is started.
    """
    waiting, workers, table = list(points), dict[int, Worker](), Table(sweep)
    rows, patience, stopping = table.write(), time.monotonic() + GRACE_SECONDS, False
    try:
        while True:
            for slot in sorted({*range(count)} - {*workers}):
                if not stop.reason and (worker := start_next(sweep, waiting, share(slot, count), program)):
                    workers[slot] = worker
                    board.started(worker.point, worker.directory)
            if workers or any(must_wait(sweep, point, waiting) for point in waiting):
                patience = time.monotonic() + GRACE_SECONDS
            if not workers and (not waiting or stop.reason or time.monotonic() > patience):
                return rows
            time.sleep(POLL_SECONDS)
            if stop.reason and not stopping:
                time.sleep(RELAY_SECONDS)
                stopping = True
            for slot, worker in list(workers.items()):
                if stopping:
                    worker.tell(stop.signal or signal.SIGTERM)
                if worker.process.poll() is not None:
                    del workers[slot]
                    worker.settle(stopping=bool(stop.reason))
                    rows = table.write()
                    board.ended(worker.point, rows)
            board.show([worker.point for worker in workers.values()])
    finally:
        for worker in workers.values():  # only after an error here, such as a full disk
            worker.tell(signal.SIGTERM)
            worker.process.wait()


def start_next(sweep: Sweep, waiting: list[Point], cores: set[int], program: Path) -> Worker | None:
    """A worker on the first point that is free; it leaves ``waiting``, as those do that are settled. One that
    is being run elsewhere stays, so that it is taken over should the process there end."""
    for point in list(waiting):
        if must_wait(sweep, point, waiting):
            continue
        directory = sweep.directory(point)
        directory.make()
        lock = storage.lock(directory.lock)
        if lock is None:
            continue
        waiting.remove(point)
        if directory.status() in SETTLED:
            lock.close()
            continue
        branch_off(sweep, point)
        sweep.write_config(point, directory)
        return Worker(point, directory, lock, program, cores)
    return None


def must_wait(sweep: Sweep, point: Point, waiting: Sequence[Point]) -> bool:
    """Whether a point that has not begun is to branch off a run that is on its way to there, or will be: it
    trains here or elsewhere, or is among ``waiting``. Once it has ended, or where nobody runs it, the point
    starts without it."""
    branch = sweep.branches.get(point.index)
    if branch is None or sweep.directory(point).run.path.exists():
        return False
    trunk = sweep.points[branch.trunk]
    if trunks.is_there(sweep.directory(trunk).run, branch.step) or sweep.status(trunk) in SETTLED:
        return False
    return any(other.index == trunk.index for other in waiting) or sweep.status_now(trunk) == RUNNING


def branch_off(sweep: Sweep, point: Point) -> None:
    """Gives a point that has not begun the beginning of its trunk, if that is there. For the process that
    holds its lock."""
    branch, run = sweep.branches.get(point.index), sweep.directory(point).run
    if branch is None or run.path.exists():
        return
    trunk = sweep.directory(sweep.points[branch.trunk]).run
    if trunks.is_there(trunk, branch.step):
        with suppress(UserError):  # a trunk that is damaged: the point is trained alone
            trunks.graft(trunk, branch.step, run, point.experiment.steps)


def share(slot: int, count: int) -> set[int]:
    """The cores of one worker of ``count``: as many for each, since their number is how many devices a CPU is
    divided into, which decides the last bits of a run. Empty where a process cannot be tied to cores."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    cores = sorted(os.sched_getaffinity(0))
    size = max(1, len(cores) // count)
    return {cores[i % len(cores)] for i in range(slot * size, (slot + 1) * size)}


class Worker:
    """A training process. It has a process group of its own, so that Ctrl-C in a terminal reaches it by the
    sweep alone, once: a second signal would end it before it has saved."""

    def __init__(
        self, point: Point, directory: PointDirectory, lock: IO[bytes], program: Path, cores: set[int]
    ) -> None:
        """lock: taken; freed when the point is settled or, should this process not live to see it, when the
        training process ends."""
        self.point, self.directory, self._lock, self._told = point, directory, lock, False
        flags = [f"--config={directory.config}", f"--workdir={directory.run.path}"]
        with directory.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, str(program), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                process_group=0,
            )
        if cores:
            with suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(self.process.pid, cores)  # long before it counts them: it is starting

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal, once, and not where a scheduler sent it to every process by itself: a second one
        would end the training before it has saved."""
        with self.directory.log.open("rb") as log:
            log.seek(self._log_start)
            knows = self._told or NOTICE.encode() in log.read()
        if not knows:
            self.process.send_signal(number)
        self._told = True

    def settle(self, stopping: bool) -> None:
        """Notes how the process ended, then frees the point. stopping: it was told to."""
        code, e = self.process.returncode, self.point.experiment
        try:
            story = metrics.read(self.directory.run.metrics)
            status, error = outcome(code, story, e, self.directory.log)
        except UserError as damage:
            status, error = FAILED, str(damage)
        if status != UNFINISHED and not (stopping and status == FAILED):
            self.directory.write_outcome(status, error)
        self._lock.close()


def outcome(code: int, story: list[metrics.Record], e: Experiment, log: Path) -> tuple[str, str]:
    """(status, error) of a run whose process ended with an exit code, below 0 for a signal."""
    losses = [record["loss"] for record in metrics.evaluations(story)]
    newest = next((record for record in reversed(story) if record["kind"] == "train"), {})
    complete = at_the_end(story, e.steps, e.evaluation.patience)
    given_up = newest.get("bad_in_row", 0) >= e.guard.patience
    error = last_error(code, log) if code else ""
    if code >= 0 and (given_up or (complete and losses[-1:] == [None])):
        return DIVERGED, error
    if code == 0 and complete:
        return FINISHED, ""
    if code in CODES.values():  # a signal that came to it alone: it has saved
        return UNFINISHED, ""
    return FAILED, error


def last_error(code: int, log: Path) -> str:
    """What a process said last, or which signal ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
