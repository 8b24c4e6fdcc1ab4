"""The modern preset against tuned AdamW, in tokens and in seconds, and what each part of it is worth.

  python scripts/sweep.py --config=configs/sweep_modern.py:tune --workdir=runs/modern_tune --workers=2
  python scripts/sweep.py --config=configs/sweep_modern.py --workdir=runs/modern --workers=2
  python -m benchmarks.modern --tuned=runs/modern_tune --sweep=runs/modern

Reads the sweeps' tables, times steps of baseline and preset in turn on this machine, writes
benchmarks/results/modern.json and prints the table of docs/log.md. A row is a point over its seeds: mean and
standard deviation of the final validation loss. Exit code 1 when the preset, at six tenths of the tokens,
does not reach the baseline's mean loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import record
from llm_jax import cli
from llm_jax.models import flops
from llm_jax.training import experiment, muon
from llm_jax.training.program import Program

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


def step_ms(points: dict[str, dict[str, Any]], config: str, rounds: int = 5) -> dict[str, float]:
    """Milliseconds a step of each point: dispatches of 10 steps from memory, in turn; medians."""
    times: dict[str, list[float]] = {name: [] for name in points}
    with tempfile.TemporaryDirectory() as directory:
        running = {}
        for name, point in points.items():
            e = experiment.resolve(experiment.override(cli.load_config(config), point["overrides"]))
            program = Program.prepare(e, directory, say=lambda _: None)
            running[name] = program, [program.init()], program.batches[0]
        for number in range(rounds + 1):
            for name, (program, state, batch) in running.items():
                start = time.perf_counter()
                state[0], metrics = program.steps(state[0], batch)
                jax.block_until_ready(metrics)
                per_step = 1000 * (time.perf_counter() - start) / program.experiment.steps_per_dispatch
                times[name] += [per_step] if number else []  # the first compiles
    return {name: round(statistics.median(of), 1) for name, of in times.items()}


def newton_schulz_flops(config: str, point: dict[str, Any]) -> tuple[float, float]:
    """(of Muon's iterations, of forward and backward pass) of a step, from the shapes."""
    e = experiment.resolve(experiment.override(cli.load_config(config), point["overrides"]))
    e = experiment.complete(e, 128)
    c, matrices = e.model, 0.0
    d, f, h, g = c.model_dim, c.mlp_size, c.num_heads * c.head_size, c.kv_heads * c.head_size
    for rows, columns in ((d, h), (d, g), (d, g), (h, d), (d, f), (f, d)):
        short, long = sorted((rows, columns))
        matrices += (
            muon.ITERATIONS * 2 * (2 * short * short * long + short**3)
        )  # x x^T, its square, their use
    tokens = e.global_batch_size * e.data.sequence_length
    return c.num_layers * matrices, tokens * flops.training_flops_per_token(c, e.data.sequence_length)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of the two sweeps that are read."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--sweep", required=True, type=Path, help="the directory of the second sweep")
    made.add_argument("--tuned", required=True, type=Path, help="the directory of the first")
    return made


def main() -> None:
    asked = parser(__doc__)
    args = asked.parse_args()
    config = str(ROOT / "configs" / "sweep_modern.py")
    rows = read(args.sweep)
    if len(rows) != len(cli.load_sweep(config)) or any(row["status"] != "finished" for row in rows):
        asked.error(
            f"--sweep={args.sweep} is not finished: python scripts/sweep.py --config={config} goes on"
        )
    found = named(list(by_point(rows).values()))
    rates = [
        {"rate": row["overrides"]["optimizer.learning_rate"], "steps": row["steps"], "loss": row["loss"]}
        for row in read(args.tuned)
    ]
    baseline, preset = found["baseline"], found["preset, 0.6 of the tokens"]
    both = {name: found[name] for name in ("baseline", "preset, 0.6 of the tokens")}
    ms = step_ms(both, config)
    wall = ms["preset, 0.6 of the tokens"] * preset["tokens"] / (ms["baseline"] * baseline["tokens"])
    extra, model = newton_schulz_flops(config, preset)
    print("| | tokens | loss | standard deviation |\n|---|---|---|---|")
    for name, f in found.items():
        print(f"| {name} | {f['tokens'] / 1e6:.2f} M | {f['loss']:.4f} | {f['deviation']:.4f} |")
    print(f"a step takes {ms}; to the end of both runs {wall:.2f} of the wall time")
    print(f"Newton-Schulz: {extra / (extra + model):.1%} of the preset's FLOPs")
    content = record.environment("jax", "jaxlib") | {"rates": rates, "points": found, "step_ms": ms}
    content |= {"wall_ratio": round(wall, 3), "newton_schulz_share": round(extra / (extra + model), 4)}
    record.write("modern", content)
    if preset["loss"] > baseline["loss"]:
        sys.exit("the preset has not reached the baseline's loss in 0.6 of its tokens")


if __name__ == "__main__":
    main()
