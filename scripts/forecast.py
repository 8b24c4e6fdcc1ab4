"""Foretells the loss of a larger run, in a file that is dated and sealed; later says how it came out.

  python scripts/forecast.py --law=law.json --compute=1e21 --out=forecast.json
  python scripts/forecast.py --law=law.json --params=6.9e9 --tokens=3.9e12 --out=forecast.json
  python scripts/forecast.py --score=runs/big --out=forecast.json

law.json is of scripts/fit_scaling_law.py --json. Without --method that one speaks whose backtest was best at
the question asked: the best loss of so much compute, or the loss of a run of so many parameters and tokens.
--score takes the run's directory, or its loss as a number.
"""

import argparse
from pathlib import Path

from llm_jax import cli, storage
from llm_jax.scaling import forecast
from llm_jax.scaling.shown import forecast_lines, score_line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--law", help="what fit_scaling_law.py --json wrote")
    parser.add_argument("--compute", type=float, help="FLOPs of the run")
    parser.add_argument("--params", type=float, help="N of the run, counted as the law's runs were")
    parser.add_argument("--tokens", type=float, help="D of the run")
    parser.add_argument("--method", default="", help="whose forecast; without it the backtest's choice")
    parser.add_argument("--score", help="the run that was foretold, or its loss")
    parser.add_argument(
        "--out", required=True, help="the forecast: a new file, or with --score that of before"
    )
    args = parser.parse_args()
    out = storage.path(args.out)
    if args.score:
        made = forecast.read(out)
        print("\n".join(forecast_lines(made)))
        print(score_line(forecast.score_run(made, args.score)))
        return
    if not args.law or not (args.compute or (args.params and args.tokens)):
        parser.error("give --law, and --compute or --params with --tokens; or --score")
    made = forecast.foretell(Path(args.law), args.compute, args.params, args.tokens, args.method)
    forecast.write(out, made)
    print("\n".join(forecast_lines(made)))


if __name__ == "__main__":
    cli.main(main)
