"""What each part of the modern preset costs in time: a step with it and without, in turn on this machine.

  python -m benchmarks.modern_parts

The points of configs/sweep_modern.py, dispatches of 10 steps from memory, 3 rounds; medians. What a part is
worth in loss is in benchmarks/results/modern.json. Writes benchmarks/results/modern_parts.json.
"""

from __future__ import annotations

import argparse

from benchmarks import record
from benchmarks.modern import ROOT, named, step_ms
from llm_jax import cli

ROUNDS = 3
PRESET, BASELINE = "preset, 0.3", "baseline"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    config = str(ROOT / "configs" / "sweep_modern.py")
    points = [{"overrides": point} for point in cli.load_sweep(config) if point.pop("seed") == 0]
    found = named(points)
    found.pop("preset, 0.6 of the tokens")  # the same step
    ms = step_ms(found, config, ROUNDS)
    for name, one in ms.items():
        of_baseline, of_preset = one / ms[BASELINE], one / ms[PRESET]
        print(f"{name}: {one} ms, {of_baseline:.2f} of the baseline, {of_preset:.2f} of the preset")
    record.write("modern_parts", record.environment("jax", "jaxlib") | {"step_ms": ms})


if __name__ == "__main__":
    main()
