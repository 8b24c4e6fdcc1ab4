"""A job as a bash script around gcloud: it queues for TPUs, runs, queues again when they are taken, deletes.

Flags are those of ``gcloud compute tpus queued-resources`` and ``tpu-vm ssh``. A reservation is named to the
alpha form of ``create`` alone (cloud.google.com/tpu/docs: queued resources, consume a reservation).
"""

from __future__ import annotations

import shlex

from llm_jax.errors import UserError
from llm_jax.planning.launch_job import BAD_INPUT, BUCKET, TIME_IS_UP, Job, attempt

POLL_SECONDS = 30


def emit(job: Job) -> str:
    """Raises UserError for what cannot be booked so."""
    check(job)
    nodes = [job.name] if job.slices == 1 else [f"{job.name}-{i}" for i in range(job.slices)]
    place = [f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else [])]
    return f"""\
#!/usr/bin/env bash
# {job}; written by scripts/launch.py
# Start it where it can stay, in tmux or on a small machine. It deletes the TPUs when the run is finished,
# when no retry would help, and when the retries are used up; Ctrl-C leaves them. Started again, it goes on.
set -u
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM
name={job.name}
nodes=({" ".join(nodes)})
place=({shlex.join(place)})

read -r -d '' attempt <<'END_OF_ATTEMPT'
{first_end_the_old(job)}{attempt(job)}END_OF_ATTEMPT

create() {{
  gcloud {"alpha " if job.reservation else ""}compute tpus queued-resources create "$name" "${{place[@]}}" \\
    {shlex.join(booking(job))}
}}

{FUNCTIONS}
for ((try = 0; try <= {job.max_retries}; try++)); do
  if ready; then
    on_all_workers "$attempt"; code=$?
    case "$code" in
      0) echo "$name is finished" >&2; finish 0 ;;
      {BAD_INPUT} | {TIME_IS_UP}) echo "$name cannot go on: exit code $code" >&2; finish "$code" ;;
    esac
    echo "try $try of $name ended with exit code $code; the next goes on from the newest checkpoint" >&2
  fi
  sleep {POLL_SECONDS}
done
finish 1
"""


def check(job: Job) -> None:
    tpu = job.topology.tpu
    if tpu is None:
        raise UserError(f"--emit=gcloud is for TPUs, not {job.topology}; --emit=slurm is for GPUs")
    if not tpu.accelerator_type:
        raise UserError(f"--topology={job.topology} is booked through GKE alone; use --emit=jobset")
    if not job.zone:
        raise UserError("--emit=gcloud needs --zone=ZONE")
    if not job.workdir.startswith((BUCKET, "/")):
        raise UserError(
            f"--workdir={job.workdir} is a path of one machine, and the job has {job.hosts}; use "
            "gs://BUCKET/..., or the absolute path of a mount that --setup makes"
        )
    if job.image:
        raise UserError("--image is for --emit=jobset; --setup=LINE says what a TPU machine needs")
    if job.queue:
        raise UserError("--queue is of Kueue and SLURM; Cloud TPU has one queue, leave it out")


def booking(job: Job) -> list[str]:
    tpu = job.topology.tpu
    nodes = [f"--node-id={job.name}"]
    if job.slices > 1:
        nodes = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    tier = ["--spot"] if job.spot else [f"--reservation={job.reservation}"] if job.reservation else []
    return [
        f"--accelerator-type={job.topology.accelerator_type}",
        f"--runtime-version={tpu.runtime}",
        *nodes,
        *tier,
        "--quiet",
    ]


def first_end_the_old(job: Job) -> str:
    """An attempt whose connection broke may go on without it: it is told to save before the next starts."""
    pid = f"/tmp/{job.name}.pid"
    return f"""\
if old=$(cat {pid} 2>/dev/null) && kill -TERM "$old" 2>/dev/null; then
  while kill -0 "$old" 2>/dev/null; do sleep 1; done
fi
echo $$ > {pid}
"""


FUNCTIONS = f"""\
state() {{
  gcloud compute tpus queued-resources describe "$name" "${{place[@]}}" \\
    --format='value(state.state)' 2>/dev/null
}}

delete() {{
  gcloud compute tpus queued-resources delete "$name" "${{place[@]}}" --force --quiet
}}

ready() {{
  while true; do
    case "$(state)" in
      ACTIVE) return 0 ;;
      "") create || return 1 ;;
      FAILED | SUSPENDED) delete ;;
    esac
    sleep {POLL_SECONDS}
  done
}}

on_all_workers() {{
  local workers=() worst=0
  for node in "${{nodes[@]}}"; do
    gcloud compute tpus tpu-vm ssh "$node" "${{place[@]}}" --worker=all --quiet --command="$1" &
    workers+=("$!")
  done
  for worker in "${{workers[@]}}"; do wait "$worker" || worst=$?; done
  return "$worst"
}}

finish() {{
  delete
  exit "$1"
}}
"""
