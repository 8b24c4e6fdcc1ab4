"""The modern preset against tuned AdamW at 124 M parameters on one GPU, in tokens and in seconds of steps.

  python scripts/sweep.py --config=configs/sweep_modern_124m.py:tune --workdir=runs/modern_124m_tune \\
      --config.data.text=corpus/
  python scripts/sweep.py --config=configs/sweep_modern_124m.py --workdir=runs/modern_124m \\
      --config.data.text=corpus/
  python -m benchmarks.modern_124m --tuned=runs/modern_124m_tune --sweep=runs/modern_124m

Reads the sweeps' tables and writes benchmarks/results/modern_124m.json. Exit code 1 when the preset's mean
loss is above the baseline's, when it takes more than 0.65 of its time, or when the baseline's rate is not the
best of those tried.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from benchmarks import record
from benchmarks.modern import by_point, parser, read

MOST_TIME = 0.65


def compare(tuned: list[dict[str, Any]], rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What is written down, and what does not hold, of the tables' rows."""
    baseline, preset = by_point(rows).values()
    for point in (baseline, preset):
        own = [row for row in rows if row["tokens"] == point["tokens"]]
        point["seconds"] = round(
            statistics.median(t["tokens"] / t["time"]["tokens_per_second"] for t in own), 1
        )
    rates = {row["overrides"]["optimizer.learning_rate"]: row["loss"] for row in tuned}
    wall = preset["seconds"] / baseline["seconds"]
    best = min(rates, key=rates.get)
    wrong = {
        f"the preset's loss, {preset['loss']}, is above the baseline's, {baseline['loss']}": (
            preset["loss"] > baseline["loss"]
        ),
        f"the preset took {wall:.2f} of the baseline's time": wall > MOST_TIME,
        f"the best rate is {best}": best != baseline["overrides"]["optimizer.learning_rate"],
    }
    found = {"rates": rates, "baseline": baseline, "preset": preset, "wall_ratio": round(wall, 3)}
    return found | {"device": rows[0]["device"]}, [why for why, holds in wrong.items() if holds]


def main() -> None:
    asked = parser(__doc__)
    args = asked.parse_args()
    tuned, rows = read(args.tuned), read(args.sweep)
    if any(row["status"] != "finished" for row in tuned + rows):
        asked.error("a sweep is not finished; the same scripts/sweep.py goes on")
    found, wrong = compare(tuned, rows)
    for name in ("baseline", "preset"):
        it = found[name]
        loss, tokens = f"{it['loss']} +- {it['deviation']}", f"{it['tokens'] / 1e6:.1f} M tokens"
        print(f"{name}: {loss} after {tokens}, {it['seconds']} s")
    record.write("modern_124m", record.environment("jax", "jaxlib") | found)
    sys.exit("; ".join(wrong) or 0)


if __name__ == "__main__":
    main()
