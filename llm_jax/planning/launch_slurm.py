"""A job as a batch script of SLURM, for nodes of GPUs: one process a node, a task of an array a point.

SLURM's own end of a slot, of a preemption or of ``scancel`` is SIGTERM, on which a run saves; the script
requeues the job unless it is finished, cancelled or cannot go on (sbatch(1), scancel(1), scontrol(1)).
"""

from __future__ import annotations

import math

from llm_jax.errors import UserError
from llm_jax.planning.launch_job import (
    BAD_INPUT,
    GRACE_SECONDS,
    STOPPED,
    Job,
    command,
    exports,
    finished,
    setup,
)

CPUS_PER_GPU = 8  # for the loader and the checkpoints; sbatch --cpus-per-gpu=N overrides it


def emit(job: Job) -> str:
    """Bash for sbatch. Raises UserError for what SLURM has no word for."""
    if job.topology.tpu is not None:
        raise UserError(f"--emit=slurm is for GPUs, not {job.topology}; use --emit=gcloud or --emit=jobset")
    if job.spot:
        raise UserError("--spot is of Google Cloud; under SLURM name a preemptible partition by --queue")
    parts = ["#!/bin/bash", f"# {job}; written by scripts/launch.py", *options(job)]
    return "\n".join([*parts, "", exports(job), *filter(None, [setup(job)]), body(job)])


def options(job: Job) -> list[str]:
    kind = "" if job.topology.kind == "gpu" else f"{job.topology.kind}:"
    found = {
        "job-name": job.name,
        "nodes": job.hosts,
        "ntasks-per-node": 1,
        "gpus-per-node": f"{kind}{job.topology.chips_per_host}",
        "cpus-per-gpu": CPUS_PER_GPU,
        "array": f"0-{job.points - 1}" if job.points else "",
        "partition": job.queue,
        "reservation": job.reservation,
        "time": math.ceil(job.max_hours * 60) or "",
        "signal": f"B:TERM@{GRACE_SECONDS}",
        "open-mode": "append",
        "output": f"{job.name}-{'%A_%a' if job.points else '%j'}.log",
    }
    return [*(f"#SBATCH --{name}={value}" for name, value in found.items() if value), "#SBATCH --requeue"]


def body(job: Job) -> str:
    """srun turns a SIGTERM of its own into SIGKILL for its tasks, so scancel signals them. Only a job that
    still runs is requeued: one that was cancelled, or that SLURM requeues by itself, is completing."""
    index = '"$SLURM_ARRAY_TASK_ID"' if job.points else ""
    return f"""\
srun --cpu-bind=none {command(job, index)} &
step=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a trap ends wait early
trap '' TERM
if [ "$code" -eq 0 ]; then
  {finished(job, index)} && exit 0
  code={STOPPED}
fi
[ "$code" -ne {BAD_INPUT} ] || exit "$code"
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$state" = RUNNING ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_retries} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
