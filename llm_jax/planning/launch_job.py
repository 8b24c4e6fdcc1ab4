"""A job: one command, where it runs, and how often it may be started again.

Every retry is the same command: a run goes on from its newest checkpoint with the same bits, so that a
scheduler needs to know no more than whether an attempt has ended the run. Exit codes of an attempt:

    0    the run is finished
    2    bad input, which another attempt would not change: no retry
    75   stopped with everything saved, by a signal or by a machine's notice: the command itself ends with 0
         then, so its run directory is asked whether anything is left to do
    124  its ``max_hours`` are over: no retry, except under SLURM, where they are a slot among many
    any  other, such as 3 for "another process died": retry
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass

from llm_jax.errors import UserError
from llm_jax.planning.launch_slices import Topology

BAD_INPUT, STOPPED, TIME_IS_UP = 2, 75, 124  # sysexits' EX_TEMPFAIL; timeout(1)'s own
GRACE_SECONDS = 300  # from SIGTERM to SIGKILL: the dispatch under way, and the write of a checkpoint
BUCKET = "gs://"
# Of sweep.py --list, where the third word is the status: 1 when a line is not settled, or there is none.
UNSETTLED = '$3 != "finished" && $3 != "diverged" {left = 1} END {exit !NR || left}'
OF_ONE_MACHINE = ("/tmp/", "/var/tmp/", "/dev/shm/")


@dataclass(frozen=True)
class Job:
    """command: the words of scripts/train.py or of scripts/sweep.py. points: of a sweep, 0 = one run. setup:
    lines of bash before the command, in its shell, at every attempt. queue: Kueue's LocalQueue, or SLURM's
    partition. cache: where XLA's compiled programs are kept. max_hours: of one attempt, 0 = no limit.

    Raises UserError for a job that no scheduler could run.
    """

    name: str
    command: tuple[str, ...]
    workdir: str
    topology: Topology
    slices: int = 1
    points: int = 0
    image: str = ""
    setup: tuple[str, ...] = ()
    project: str = ""
    zone: str = ""
    queue: str = ""
    reservation: str = ""
    spot: bool = False
    cache: str = ""
    max_retries: int = 50
    max_hours: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise UserError(f"--name={self.name}: use at most 40 of a-z, 0-9 and -, a letter first")
        if self.spot and self.reservation:
            raise UserError("--spot and --reservation exclude one another; leave one out")
        if self.points and self.hosts > 1:
            raise UserError(
                f"--topology={self.topology} has {self.hosts} hosts, but a point of a sweep is one process; "
                "take a topology of one host"
            )
        if self.slices < 1 or self.max_retries < 0 or self.max_hours < 0:
            raise UserError("--slices must be at least 1, --max-retries and --max-hours at least 0")
        if self.slices > 1 and (self.topology.tpu is None or self.topology.hosts == 1):
            raise UserError(
                f"--slices={self.slices} of {self.topology}: only TPU slices of several hosts are joined; "
                "take a larger topology"
            )
        if re.fullmatch(r"gs://[^/]*/*", self.workdir):
            raise UserError(f"--workdir={self.workdir} is a whole bucket; name a directory in it")
        if self.workdir.startswith(OF_ONE_MACHINE):
            raise UserError(
                f"--workdir={self.workdir} is lost with its machine; use gs://BUCKET/... or a mount"
            )

    @property
    def hosts(self) -> int:
        return self.slices * self.topology.hosts

    def __str__(self) -> str:
        many = f"{self.slices} x " if self.slices > 1 else ""
        what = f", a sweep of {self.points} points" if self.points else ""
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''}"
        return f"{self.name}{what} on {many}{self.topology}, {hosts}"


def exports(job: Job) -> str:
    """The environment of an attempt. Compiled programs outlive the machine, so that a restart does not wait
    for the compiler again."""
    return f"export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR={shlex.quote(job.cache)}"


def setup(job: Job) -> str:
    """The setup. A line that fails ends the attempt with 1, whatever its own code: that is worth a retry."""
    return "\n".join(f"{line} || exit 1" for line in job.setup)


def command(job: Job, index: str = "") -> str:
    """The command, quoted. index: of a point of a sweep, a number or a variable of the shell."""
    return shlex.join(job.command) + (f" --index={index}" if index else "")


def finished(job: Job, index: str = "") -> str:
    """A command that exits with 0 when nothing is left to do."""
    if job.points:
        return f"{command(job, index)} --list | awk '{UNSETTLED}'"
    return shlex.join(["python", "scripts/launch.py", f"--finished={job.workdir}"])


def attempt(job: Job, index: str = "") -> str:
    """Bash that makes one attempt on one host. It is process 1 of a container, and passes the signal on."""
    seconds = math.ceil(job.max_hours * 3600)
    limit = f"timeout --kill-after={GRACE_SECONDS} {seconds} " if seconds else ""
    lines = [
        exports(job),
        setup(job),
        f"{limit}{command(job, index)} &",
        "run=$!",
        "trap 'kill -TERM \"$run\"' TERM",
        'wait "$run"; code=$?',
        'while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done  # a trap ends wait early',
        '[ "$code" -eq 0 ] || exit "$code"',
        f"{finished(job, index)} || exit {STOPPED}",
    ]
    return "\n".join(filter(None, lines)) + "\n"
