"""Fits scaling laws to a table of runs, with intervals, and says by a backtest which to believe.

  python scripts/fit_scaling_law.py --table=runs/sweep/table.jsonl
  python scripts/fit_scaling_law.py --table=my.csv --columns=N=params,D=tokens,loss=c4_loss --json=law.json

The table is a sweep's own or any CSV or JSON lines; --columns names its N (parameters), D (tokens), C (FLOPs;
6 N D where it has none, and any two of the three give the third) and loss. unique=, lr= and batch=, accuracy=
ask for the laws of repeated text, of rates and batches, and of a task's accuracy, too. Every method is
fitted, resampled, and judged on the dearer runs by fits to the cheaper ones; a small residual alone says
nothing of extrapolation. scripts/forecast.py and scripts/allocate.py read the file of --json.
"""

import argparse
import json

from llm_jax import cli, storage
from llm_jax.errors import UserError
from llm_jax.scaling import backtest, runs, study
from llm_jax.scaling.laws import resample
from llm_jax.scaling.laws.methods import METHODS
from llm_jax.scaling.shown import study_lines
from llm_jax.training.progress import say


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", required=True, help="a sweep's table.jsonl, or any CSV or .jsonl file")
    parser.add_argument("--columns", default="", help="N=params,D=tokens,loss=c4_loss, and more")
    parser.add_argument("--drop-highest", type=int, default=0, metavar="K", help="leave the K worst runs out")
    parser.add_argument(
        "--max-compute", type=float, default=float("inf"), help="FLOPs of the dearest run fitted"
    )
    parser.add_argument(
        "--where", default="", help="COLUMN=VALUE or COLUMN<NUMBER: only these rows; several by commas"
    )
    parser.add_argument("--method", default="", help=f"only these, by commas, of {', '.join(METHODS)}")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0 for none")
    parser.add_argument(
        "--resample", choices=(resample.PARAMETRIC, resample.CASE), default=resample.PARAMETRIC
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument(
        "--horizon",
        type=float,
        default=backtest.HORIZON,
        help="how far ahead to backtest, in times of compute",
    )
    parser.add_argument("--json", help="write all of it to this file")
    args = parser.parse_args()
    path, columns = storage.path(args.table), cli.pairs("--columns", args.columns)
    names = tuple(args.method.split(",")) if args.method else tuple(METHODS)
    if unknown := {*names} - {*METHODS}:
        raise UserError(f"--method={min(unknown)}: there are {', '.join(METHODS)}")
    table = runs.read(path, columns).where(args.where).up_to(args.max_compute)
    table = table.without_highest(args.drop_highest)
    found = study.study(table, names, args.bootstrap, args.seed, args.horizon, args.resample, columns, say)
    kept = f"where={args.where!r} max_compute={args.max_compute:g} drop_highest={args.drop_highest}"
    found = {"table": study.describe_table(path, table, columns, kept)} | found
    if args.json:
        storage.write_text(storage.path(args.json), json.dumps(found, indent=1) + "\n")
    print("\n".join(study_lines(found)))


if __name__ == "__main__":
    cli.main(main)
