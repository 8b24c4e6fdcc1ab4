"""Jobs for the schedulers there are: a script around gcloud, a JobSet for GKE, a batch script for SLURM.

Only text is written; nothing is submitted, and nothing stays running. launch_job.py has what they share.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.planning import launch_gcloud, launch_jobset, launch_slurm
from llm_jax.planning.launch_job import Job
from llm_jax.planning.launch_slices import parse
from llm_jax.training import metrics
from llm_jax.training.early_stopping import at_the_end
from llm_jax.training.rundir import RunDirectory

EMITTERS: dict[str, Callable[[Job], str]] = {
    "gcloud": launch_gcloud.emit,
    "jobset": launch_jobset.emit,
    "slurm": launch_slurm.emit,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a job is beside its command."""
    job = parser.add_argument_group("the job that is written")
    job.add_argument("--emit", choices=sorted(EMITTERS), help="for which scheduler; nothing is submitted")
    job.add_argument("--out", help="a file for it; without it, standard output")
    job.add_argument(
        "--topology", default="", help="v5p:4x4x8, v5e:4x8, ... or GPUs a node x nodes: h100:8x2"
    )
    job.add_argument("--slices", type=int, default=1, help="TPU slices that train one model")
    job.add_argument("--name", default="", help="of the job; without it, from --workdir")
    job.add_argument("--image", default="", help="of the container, llm_jax in its working directory")
    job.add_argument("--setup", action="append", default=[], help="a line of bash before it; repeat")
    job.add_argument("--project", default="", help="of Google Cloud; without it, gcloud's own")
    job.add_argument("--zone", default="", help="of Google Cloud")
    job.add_argument("--queue", default="", help="Kueue's LocalQueue, or SLURM's partition")
    job.add_argument("--reservation", default="", help="its name")
    job.add_argument("--spot", action="store_true", help="machines that may be taken back")
    job.add_argument("--cache", default="", help="of compiled programs; without it, beside --workdir")
    job.add_argument("--max-retries", type=int, default=50, help="for whatever reason (50)")
    job.add_argument("--max-hours", type=float, default=0.0, help="of one attempt")


def write(args: argparse.Namespace, script: str, overrides: Mapping[str, str], points: int = 0) -> None:
    """Writes the job of a command to ``--out`` or to standard output.

    args: of ``add_flags``, with config and workdir. script: scripts/train.py, or scripts/sweep.py and how
    many points it has. Raises UserError for a job that cannot be.
    """
    text = EMITTERS[args.emit](job_of(args, script, overrides, points))
    if args.out:
        storage.write_text(storage.path(args.out), text)
    else:
        sys.stdout.write(text)


def job_of(args: argparse.Namespace, script: str, overrides: Mapping[str, str], points: int = 0) -> Job:
    """The job that the flags describe."""
    if args.emit != "slurm" and args.config.startswith("/"):
        raise UserError(
            f"--config={args.config} is on this machine; give its path in the checkout of llm_jax"
        )
    parent, _, last = args.workdir.rstrip("/").rpartition("/")
    changes = [f"--config.{key}={value}" for key, value in overrides.items()]
    flags = ("slices", "image", "project", "zone", "queue", "reservation", "spot", "max_retries", "max_hours")
    return Job(
        name=args.name or re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-"),
        command=("python", script, f"--config={args.config}", f"--workdir={args.workdir}", *changes),
        workdir=args.workdir,
        topology=parse(args.topology),
        points=points,
        setup=tuple(args.setup),
        cache=args.cache or f"{parent or '.'}/compilation_cache",
        **{flag: getattr(args, flag) for flag in flags},
    )


def finished(workdir: str) -> bool:
    """Whether the run there has made its last step. A command that ended with 0 may have been stopped."""
    run = RunDirectory(storage.path(workdir))
    if not run.config.exists():
        return False
    e = run.stored()
    return at_the_end(metrics.read(run.metrics), e.steps, e.evaluation.patience)
