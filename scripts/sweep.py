"""Trains every point of a sweep; the same command goes on with what is not finished.

  python scripts/sweep.py --config=configs/sweep_learning_rate.py --workdir=runs/sweep
  python scripts/sweep.py --config=configs/sweep_learning_rate.py --workdir=runs/sweep --list
  sbatch --array=0-5 --wrap='python scripts/sweep.py --config=F --workdir=D --index=$SLURM_ARRAY_TASK_ID'

The config file has sweep() beside get_config(): a list of points, each a dict of what differs from the config
(llm_jax/scaling/points.py). --config.KEY=VALUE sets a key in all. Every point is checked before the first one
runs; each is trained by scripts/train.py in a process of its own, in WORKDIR/runs/FINGERPRINT. Those that
differ in ``steps`` alone share their beginning while their rates agree. With --together=8 up to eight that
differ in seed and rate alone are one program, whose last bits are its own: WORKDIR/points/groups.json keeps
who is with whom. The table of all is WORKDIR/table.csv and .jsonl. Several of these commands may run at once:
none trains a point that another is training. Ctrl-C and SIGTERM save and say how to go on. Exit code 1: a
point has failed. --emit=SCHEDULER writes a job that trains every point (scripts/launch.py).
"""

import argparse
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

from llm_jax import cli, storage
from llm_jax.errors import Stopped
from llm_jax.planning import launch
from llm_jax.scaling import groups, workers
from llm_jax.scaling.board import Board
from llm_jax.scaling.sweep import RUNNING, SETTLED, Sweep, describe, resolve
from llm_jax.scaling.table import best_of, saving
from llm_jax.training import signals
from llm_jax.training.progress import say


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file with get_config() and sweep(), or FILE:ARG")
    parser.add_argument("--workdir", required=True, help="the sweep's directory")
    parser.add_argument("--index", type=int, help="run this point only, or its group")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time; they share the cores")
    parser.add_argument("--together", type=int, default=1, help="points that are one program, at most")
    parser.add_argument("--list", action="store_true", help="print index, fingerprint, status, overrides")
    parser.add_argument("--max-seconds", type=float, help="save and stop so long after the start")
    launch.add_flags(parser)
    args, overrides = cli.parse(parser)
    if min(args.workers, args.together) < 1:
        parser.error("--workers and --together must be at least 1")
    points = resolve(cli.load_config(args.config), cli.load_sweep(args.config), overrides)
    if args.emit:
        if args.index is not None or args.list or max(args.workers, args.together) > 1:
            parser.error("--emit is for all points; leave --index, --workers, --together and --list out")
        launch.write(args, "scripts/sweep.py", overrides, len(points))
        return
    sweep = Sweep(storage.path(args.workdir), points)
    points = sweep.select(args.index)
    if args.list:
        for point in points:
            name = sweep.fingerprint(point) or "-" * 16  # known when its data are there
            print(f"{point.index:4}  {name}  {sweep.status_now(point):10}  {describe(point.overrides)}")
        return
    with signals.stopping(args.max_seconds) as stop:
        points = groups.prepare(sweep, points, args.together, args.workers, say)
        with stop.deferred(), closing(Board(sweep, points)) as board:
            rows = workers.run(sweep, points, args.workers, Path(__file__).with_name("train.py"), stop, board)
        states = Counter(sweep.status_now(point) for point in points)
        counted = ", ".join(f"{count} {status}" for status, count in states.items())
        if stop.reason and set(states) - {*SETTLED}:
            raise Stopped(f"{stop.reason} with {counted}")
    if best := best_of(rows):
        print(f"best: {sweep.points[best['index']]}: validation loss {best['loss']:.4f} nats a token")
    if saved := saving(rows):
        print(saved)
    print(f"{len(points)} points: {counted}; table: {sweep.path / 'table.csv'}")
    sys.exit(1 if set(states) - {*SETTLED, RUNNING} else 0)


if __name__ == "__main__":
    cli.main(main)
