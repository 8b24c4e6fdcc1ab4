"""The modern preset against tuned AdamW, in tokens and in seconds, and what each part of it is worth.

  python scripts/sweep.py --config=configs/sweep_modern.py:tune --workdir=runs/modern_tune --workers=2
  python scripts/sweep.py --config=configs/sweep_modern.py --workdir=runs/modern --workers=2
  python -m benchmarks.modern --tuned=runs/modern_tune --sweep=runs/modern

Reads the sweeps' tables, writes benchmarks/results/modern.json and prints the table of docs/log.md. A row is
a point over its seeds: mean and standard deviation of the final validation loss. Exit code 1 when the preset,
at six tenths of the tokens, does not reach the baseline's mean loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from llm_jax import cli

ROOT = Path(__file__).resolve().parents[1]


def read(sweep: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (sweep / "table.jsonl").read_text().splitlines()]


def by_point(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{overrides but for the seed, in words: the figures of all its seeds}, in the order of the table."""
    groups: dict[str, list] = {}
    for row in rows:
        point = {key: value for key, value in row["overrides"].items() if key != "seed"}
        groups.setdefault(json.dumps(point), []).append(row)
    return {name: figures(json.loads(name), group) for name, group in groups.items()}


def figures(point: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [row["loss"] for row in rows]
    return {
        "overrides": point,
        "seeds": len(rows),
        "tokens": rows[0]["tokens"],
        "loss": round(statistics.mean(losses), 4),
        "deviation": round(statistics.stdev(losses), 4) if len(losses) > 1 else None,
        "losses": losses,
        "seconds": round(statistics.median(row["time"]["seconds"] for row in rows), 1),
    }


def named(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Names to the sweep's points, which are in the order of the config file."""
    names = ["baseline", "preset, 0.6 of the tokens", "preset, 0.3", "0.3, AdamW"]
    parts = [p["overrides"] for p in points[len(names) :]]
    preset = points[2]["overrides"]
    changes = [{k: v for k, v in part.items() if preset.get(k) != v} for part in parts]
    names += [
        "0.3, " + ", ".join(f"{k.split('.', 1)[1]}={v}" for k, v in change.items()) for change in changes
    ]
    return dict(zip(names, points, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", required=True, type=Path, help="the directory of the second sweep")
    parser.add_argument("--tuned", required=True, type=Path, help="the directory of the first")
    args = parser.parse_args()
    config = str(ROOT / "configs" / "sweep_modern.py")
    rows = read(args.sweep)
    if len(rows) != len(cli.load_sweep(config)) or any(row["status"] != "finished" for row in rows):
        parser.error(
            f"--sweep={args.sweep} is not finished: python scripts/sweep.py --config={config} goes on"
        )
    found = named(list(by_point(rows).values()))
    rates = [
        {"rate": row["overrides"]["optimizer.learning_rate"], "steps": row["steps"], "loss": row["loss"]}
        for row in read(args.tuned)
    ]
    baseline, preset = found["baseline"], found["preset, 0.6 of the tokens"]
    wall = preset["seconds"] / baseline["seconds"]
    print("| | tokens | loss | standard deviation | seconds |\n|---|---|---|---|---|")
    for name, f in found.items():
        tokens = f["tokens"] / 1e6
        print(f"| {name} | {tokens:.2f} M | {f['loss']:.4f} | {f['deviation']:.4f} | {f['seconds']:.0f} |")
    content = record.environment("jax", "jaxlib") | {
        "rates": rates,
        "wall_ratio": round(wall, 3),
        "points": found,
    }
    record.write("modern", content)
    print(f"wall: {wall:.2f} of the baseline's")
    if preset["loss"] > baseline["loss"]:
        sys.exit("the preset has not reached the baseline's loss in 0.6 of its tokens")


if __name__ == "__main__":
    main()
