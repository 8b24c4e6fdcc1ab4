"""Jobs whose texts are in golden/, and what runs such a text.

After a wanted change, this writes them anew: python tests/planning/launch_jobs.py
"""

import subprocess
from pathlib import Path

from llm_jax.planning import launch
from llm_jax.planning.launch_job import Job
from llm_jax.planning.launch_slices import parse

GOLDEN = Path(__file__).parent / "golden"
QUOTED = "--config.data.text=it's $HOME/a b/*.txt"
RUN = {
    "name": "llama-8b",
    "command": (
        "python",
        "scripts/train.py",
        "--config=configs/llama_8b.py",
        "--workdir=gs://b/llama_8b",
        QUOTED,
    ),
    "workdir": "gs://b/llama_8b",
    "cache": "gs://b/compilation_cache",
}
SWEEP = {
    "name": "rates",
    "command": (
        "python",
        "scripts/sweep.py",
        "--config=configs/sweep_learning_rate.py",
        "--workdir=runs/rates",
    ),
    "workdir": "runs/rates",
    "cache": "runs/compilation_cache",
    "points": 6,
}
TPU = {"topology": parse("v5p:4x4x8"), "zone": "us-east5-a"}
JOBS = {
    "gcloud.sh": ("gcloud", Job(**RUN, **TPU, project="p", spot=True, setup=("cd llm_jax",), max_hours=24)),
    "gcloud_slices.sh": (
        "gcloud",
        Job(**RUN, **TPU | {"topology": parse("v5e:16x16")}, slices=2, reservation="r"),
    ),
    "jobset.yaml": (
        "jobset",
        Job(**RUN, topology=parse("v6e:16x16"), image="i:1", queue="q", slices=2, spot=True),
    ),
    "jobset_sweep.yaml": (
        "jobset",
        Job(**SWEEP | {"workdir": "gs://b/rates", "points": 2}, topology=parse("v5e:2x4"), image="i:1"),
    ),
    "slurm.sh": ("slurm", Job(**RUN, topology=parse("h100:8x2"), queue="gpu", setup=("module load cuda",))),
    "slurm_sweep.sh": ("slurm", Job(**SWEEP, topology=parse("gpu:1"), max_hours=0.5, max_retries=3)),
}
SCRIPTS = [name for name in JOBS if name.endswith(".sh")]


PYTHON = """\
printf '%s\\n' "$@" >> "$HERE/log"
case "$1" in
  scripts/launch.py) exit "$FINISHED" ;;
  *) exit "$CODE" ;;
esac"""


def emitted(name):
    scheduler, job = JOBS[name]
    return launch.EMITTERS[scheduler](job)


def bash(script, **options):
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, **options)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    for golden in JOBS:
        (GOLDEN / golden).write_text(emitted(golden))
