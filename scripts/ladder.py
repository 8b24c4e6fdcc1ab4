"""A scaling law in one command: trains a ladder of small runs, fits, backtests, and foretells a larger one.

  python scripts/ladder.py --tier=cpu                                # the plan: runs, FLOPs, time
  python scripts/ladder.py --tier=cpu --run --workdir=runs/ladder    # all of it; the same command goes on
  python scripts/ladder.py --tier=gpu --run --workdir=runs/ladder
  python scripts/ladder.py --tier=pod --price=4.2

Tiers are configs/ladder_NAME.py, NAME or NAME:ARGUMENT (cpu:mlm: masked models), or a file of yours:
get_config() is what all runs share, ladder() the shapes, the budgets and the recipe. --config.KEY=VALUE sets
a key in all runs; another ladder for error bars is --config.seed=1. The forecast of the held-out run is
written before it starts, and scored when it ends. WORKDIR/report.html shows all of it.
"""

import argparse
import dataclasses
from pathlib import Path

from llm_jax import cli, storage
from llm_jax.report import law as report
from llm_jax.scaling import forecast, ladder
from llm_jax.scaling.climb import Climb
from llm_jax.scaling.recipes import RECIPES
from llm_jax.scaling.shown import forecast_lines, plan_lines, score_line
from llm_jax.training import experiment, signals
from llm_jax.training.progress import say

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", required=True, help="cpu, cpu:mlm, gpu, pod, or a file of your own")
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="rates, batches, warm-up; else the tier's")
    parser.add_argument("--run", action="store_true", help="make the runs; without it the plan is printed")
    parser.add_argument("--workdir", help="where all of it goes, with --run")
    parser.add_argument("--price", type=float, help="dollars a chip-hour, for the plan")
    parser.add_argument("--max-seconds", type=float, help="save and stop so long after the start")
    args, overrides = cli.parse(parser)
    name, colon, argument = args.tier.partition(":")
    spec = (name if name.endswith(".py") else str(CONFIGS / f"ladder_{name}.py")) + colon + argument
    config, steps = cli.load_config(spec), cli.load_ladder(spec)
    if args.recipe:
        steps = dataclasses.replace(steps, recipe=RECIPES[args.recipe])
    config = experiment.override(config, overrides)
    base = experiment.resolve(config, find_text=args.run)
    planned = ladder.describe(steps, base, ladder.plan(steps, base))
    print("\n".join(plan_lines(planned, steps, args.price)))
    if not args.run:
        return
    if not args.workdir:
        parser.error("--run needs --workdir")
    directory = storage.path(args.workdir)
    with signals.stopping(args.max_seconds) as stop:
        scored = Climb(steps, config, directory, HERE / "train.py", stop, say).run()
    print("\n".join(forecast_lines(forecast.read(directory / "forecast.json"))))
    print(score_line(scored))
    print(f"report: {report.write(directory)}")


if __name__ == "__main__":
    cli.main(main)
