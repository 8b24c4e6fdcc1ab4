"""Writes the job of a run for a scheduler that is already there; nothing is submitted.

  python scripts/launch.py --emit=gcloud --config=configs/llama_8b.py --workdir=gs://BUCKET/llama_8b \\
      --topology=v5p:4x4x8 --zone=us-east5-a --spot --out=llama_8b.sh \\
      --setup='[ -d llm_jax ] || git clone URL llm_jax' --setup='cd llm_jax && pip install -qe .[tpu]'
  python scripts/launch.py --emit=jobset ... --topology=v5e:16x16 --slices=2 --image=IMAGE --queue=QUEUE
  python scripts/launch.py --emit=slurm ... --topology=h100:8x2 --queue=PARTITION --max-hours=24

gcloud is a bash script around queued resources, jobset is YAML for GKE (and Kueue, where --queue names one of
its queues), slurm is for sbatch. --config.KEY=VALUE sets keys as for scripts/train.py. Every attempt is the
same command and goes on from the newest checkpoint: a preemption costs the steps since then. The config is
checked here, but for its text, which is where the job runs. Of a sweep: scripts/sweep.py --emit.

--finished=WORKDIR is asked by the jobs themselves: exit code 0 if the run there is at its end, else 1.
"""

import argparse
import sys

from llm_jax import cli
from llm_jax.planning import launch
from llm_jax.training import experiment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a file with get_config(), or FILE:ARGUMENT, as the job finds it")
    parser.add_argument("--workdir", help="the run's directory: on a bucket, or on a disk that all hosts see")
    parser.add_argument("--finished", metavar="WORKDIR", help="only say whether that run is at its end")
    launch.add_flags(parser)
    args, overrides = cli.parse(parser)
    if args.finished:
        sys.exit(0 if launch.finished(args.finished) else 1)
    if not (args.emit and args.config and args.workdir and args.topology):
        parser.error("--emit, --config, --workdir and --topology are required, or --finished")
    config = experiment.override(cli.load_config(args.config), overrides)
    experiment.resolve(config, find_text=False)
    launch.write(args, "scripts/train.py", overrides)


if __name__ == "__main__":
    cli.main(main)
