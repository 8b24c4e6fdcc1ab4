"""What came of some ladders: forecasts, scores, minima; for docs/log.md and the README.

  python scripts/ladder.py --tier=cpu --run --workdir=runs/ladder0
  python scripts/ladder.py --tier=cpu --run --workdir=runs/ladder1 --config.seed=1
  python scripts/ladder.py --tier=cpu --run --workdir=runs/ladder2 --config.seed=2
  python -m benchmarks.scaling.ladders --name=ladder_cpu runs/ladder0 runs/ladder1 runs/ladder2

Writes benchmarks/results/NAME.json; trains nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import median

from benchmarks import record
from llm_jax.scaling import forecast

SHOWN = ("index", "seed", "rest_parameters", "head_parameters", "tokens", "training_flops", "loss", "loss_se")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("directories", nargs="+", type=Path)
    args = parser.parse_args()
    found = [ladder(directory) for directory in args.directories]
    errors = [abs(one["score"]["error"]) for one in found]
    summary = {
        "median_absolute_error": median(errors),
        "inside": f"{sum(one['score']['inside'] for one in found)} of {len(found)}",
        "interior_minima": [
            f"{sum(b['interior'] for b in one['budgets'])} of {len(one['budgets'])}" for one in found
        ],
    }
    print(json.dumps(summary, indent=1))
    record.write(args.name, record.environment("jax", "numpy") | summary | {"ladders": found})


def ladder(directory: Path) -> dict:
    """One of them: what was foretold, what was seen, the runs and what they cost."""
    law = json.loads((directory / "law.json").read_text())
    rows = [json.loads(line) for line in (directory / "runs" / "table.jsonl").read_text().splitlines()]
    held = json.loads((directory / "held_out" / "table.jsonl").read_text().splitlines()[0])
    made = forecast.read(directory / "forecast.json")
    return {
        "chosen": law["chosen"],
        "backtest": {name: entry["backtest"] for name, entry in law["methods"].items()},
        "a": {name: entry["a"] for name, entry in law["methods"].items()},
        "budgets": law["budgets"],
        "forecast": dataclasses.asdict(made),
        "score": json.loads((directory / "score.json").read_text()),
        "seconds_of_steps": sum(row["time"]["seconds"] for row in rows) + held["time"]["seconds"],
        "runs": [{key: row[key] for key in SHOWN} for row in [*rows, held]],
    }


if __name__ == "__main__":
    main()
