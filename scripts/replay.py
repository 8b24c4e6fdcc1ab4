"""Makes a bad step of a run once more and says which layer went wrong first.

  python scripts/replay.py --workdir=runs/mine
  python scripts/replay.py --workdir=runs/mine --step=1234 --json

Without --step: the newest in bad_steps/, where a run keeps what it knows of the first step of a bad streak.
The steps before it are made again from the checkpoint kept there, by the same program and with the same
batches, so on the same hardware its numbers come out with the same bits. The run is not changed.
"""

import argparse
import json

from llm_jax import cli
from llm_jax.training import findings, replay
from llm_jax.training.progress import say


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="a run directory")
    parser.add_argument("--step", type=int, help="any step of the run, counted from 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    finding = replay.replay(args.workdir, args.step, say)
    print(json.dumps(findings.describe(finding), indent=1) if args.json else findings.table(finding))


if __name__ == "__main__":
    cli.main(main)
