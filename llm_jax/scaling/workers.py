"""Runs the points of a sweep: each by scripts/train.py in a process of its own, or the points of a group
(groups.py) by scripts/train_together.py in one.

Processes share nothing but their data, so that one which fails, is killed or runs out of memory ends alone. A
point is run by one process at a time, whoever started the sweep and how often: its lock is held by the
training process too, which inherits it, and the kernel frees it however that ends. While one point of a group
is not settled, all of them are started: they must stay the same program.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling import groups, trunks
from llm_jax.scaling.board import Board
from llm_jax.scaling.groups import Group
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
from llm_jax.training.together_loop import has_given_up

TOGETHER = "train_together.py"
POLL_SECONDS = 0.1
GRACE_SECONDS = 2.0  # for the last process of a sweep that was killed to be gone
RELAY_SECONDS = 1.0  # for training processes that a scheduler signals, too, to say so
LOG_TAIL = 4096  # bytes, enough for the last line


def run(
    sweep: Sweep, points: Sequence[Point], count: int, program: Path, stop: Stop, board: Board
) -> list[Row]:
    """Runs what of ``points`` is neither settled nor being run elsewhere, ``count`` processes at a time, each
    point with those that it is recorded to be with; writes the table after each, and gives its rows.
    program: scripts/train.py, beside which is the one for several.

    When ``stop`` has a reason, the training processes are told to save and end, and no other is started.
    """
    waiting, workers = groups.settle(sweep, points, largest=1), dict[int, Worker]()
    table = Table(sweep)
    rows, patience, stopping = table.write(), time.monotonic() + GRACE_SECONDS, False
    try:
        while True:
            for slot in sorted({*range(count)} - {*workers}):
                if not stop.reason and (worker := start_next(sweep, waiting, share(slot, count), program)):
                    workers[slot] = worker
                    board.started(worker.group, worker.log)
            if workers or any(must_wait(sweep, group, waiting) for group in waiting):
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
                    for point in worker.group:
                        board.ended(point, rows)
            board.show([worker.group for worker in workers.values()])
    finally:
        for worker in workers.values():  # only after an error here, such as a full disk
            worker.tell(signal.SIGTERM)
            worker.process.wait()


def start_next(sweep: Sweep, waiting: list[Group], cores: set[int], program: Path) -> Worker | None:
    """A worker on the first group that is free; it leaves ``waiting``, as those do that are settled. One that
    is being run elsewhere stays, so that it is taken over should the process there end."""
    for group in list(waiting):
        members = () if must_wait(sweep, group, waiting) else claim(sweep, group)
        if not members:
            continue
        waiting.remove(group)
        if all(member.directory.status() in SETTLED for member in members):
            for member in members:
                member.lock.close()
            continue
        branch_off(sweep, group)
        for member in members:
            sweep.write_config(member.point, member.directory)
        return Worker(members, program, cores)
    return None


@dataclass(frozen=True)
class Member:
    """A point of a group. lock: taken, until it is settled."""

    point: Point
    directory: PointDirectory
    lock: IO[bytes]


def claim(sweep: Sweep, group: Group) -> tuple[Member, ...]:
    """All of a group, locked; () and no lock where one of them is being run elsewhere."""
    members = []
    with ExitStack() as locks:
        for point in group:
            directory = sweep.directory(point)
            directory.make()
            lock = storage.lock(directory.lock)
            if lock is None:
                return ()
            members.append(Member(point, directory, locks.enter_context(lock)))
        locks.pop_all()
    return tuple(members)


def must_wait(sweep: Sweep, group: Group, waiting: Sequence[Group]) -> bool:
    """Whether a point that has not begun is to branch off a run that is on its way to there, or will be: it
    trains here or elsewhere, or is among ``waiting``. Once it has ended, or where nobody runs it, the point
    starts without it."""
    branch = branch_of(sweep, group)
    if branch is None:
        return False
    trunk = sweep.points[branch.trunk]
    if trunks.is_there(sweep.directory(trunk).run, branch.step) or sweep.status(trunk) in SETTLED:
        return False
    among = any(point.index == trunk.index for other in waiting for point in other)
    return among or sweep.status_now(trunk) == RUNNING


def branch_of(sweep: Sweep, group: Group) -> trunks.Branch | None:
    """Where a point by itself is to begin, if it has not. Those of a group begin with step 0, also where a
    longer point was added to the sweep since."""
    first, *others = group
    begun = sweep.directory(first).run.path.exists()
    return None if others or begun else sweep.branches.get(first.index)


def branch_off(sweep: Sweep, group: Group) -> None:
    """Gives a point that has not begun the beginning of its trunk, if that is there. For the process that
    holds its lock."""
    branch = branch_of(sweep, group)
    if branch is None:
        return
    trunk = sweep.directory(sweep.points[branch.trunk]).run
    if trunks.is_there(trunk, branch.step):
        with suppress(UserError):  # a trunk that is damaged: the point is trained alone
            trunks.graft(trunk, branch.step, sweep.directory(group[0]).run, group[0].experiment.steps)


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

    def __init__(self, members: tuple[Member, ...], program: Path, cores: set[int]) -> None:
        """members: their locks are freed when they are settled or, should this process not live to see it,
        when the training process ends. Its log is the first one's; the others say so in theirs."""
        self.members, self._told = members, False
        several = len(members) > 1
        flags = [f"--{key}={path}" for member in members for key, path in paths(member.directory).items()]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, str(program.with_name(TOGETHER) if several else program), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[member.lock.fileno() for member in members],
                process_group=0,
            )
        for member in members[1:]:
            with member.directory.log.open("a") as log:
                log.write(f"trained together with {members[0].point}; the log is {self.log}\n")
        if cores:
            with suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(self.process.pid, cores)  # long before it counts them: it is starting

    @property
    def group(self) -> Group:
        return tuple(member.point for member in self.members)

    @property
    def log(self) -> Path:
        return self.members[0].directory.log

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal, once, and not where a scheduler sent it to every process by itself: a second one
        would end the training before it has saved."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            knows = self._told or NOTICE.encode() in log.read()
        if not knows:
            self.process.send_signal(number)
        self._told = True

    def settle(self, stopping: bool) -> None:
        """Notes how the process ended for each point, then frees it. stopping: it was told to."""
        code, alone = self.process.returncode, len(self.members) == 1
        said = last_error(code, self.log) if code else ""
        for member in self.members:
            try:
                story = metrics.read(member.directory.run.metrics)
                status, error = outcome(code, story, member.point.experiment, said, alone)
            except UserError as damage:
                status, error = FAILED, str(damage)
            if status != UNFINISHED and not (stopping and status == FAILED):
                member.directory.write_outcome(status, error)
            member.lock.close()


def paths(directory: PointDirectory) -> dict[str, Path]:
    return {"config": directory.config, "workdir": directory.run.path}


def outcome(code: int, story: list[metrics.Record], e: Experiment, said: str, alone: bool) -> tuple[str, str]:
    """(status, error) of a run whose process ended with an exit code, below 0 for a signal. said: what went
    wrong, by the process; where the run was not alone, that may have been another's end."""
    losses = [record["loss"] for record in metrics.evaluations(story)]
    given_up = has_given_up(story, e.guard.patience)
    complete = at_the_end(story, e.steps, e.evaluation.patience)
    if code >= 0 and (given_up or (complete and losses[-1:] == [None])):
        return DIVERGED, said if alone else given_up
    if code == 0 and complete:
        return FINISHED, ""
    if code in CODES.values():  # a signal that came to it alone: it has saved
        return UNFINISHED, ""
    return FAILED, said


def last_error(code: int, log: Path) -> str:
    """What a process said last, or which signal ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
