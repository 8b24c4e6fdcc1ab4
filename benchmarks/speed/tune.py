"""What the PyTorch peer is fastest with on this machine's GPU: one choice after another, each by a few steps
in a process of its own.

  python -m benchmarks.speed.tune --rows=124m

cuDNN's or the flash kernel of scaled_dot_product_attention; autocast, or weights in bfloat16 beside float32
masters; how many rows at a time; the modes of torch.compile. Writes benchmarks/results/speed_choices.json
all that was tried; benchmarks/speed/run.py takes the best.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import record
from benchmarks.speed.rows import ROOT, ROWS
from benchmarks.speed.side import Side
from benchmarks.speed.torch_peer import Choice

RESULT = ROOT / "benchmarks" / "results" / "speed_choices.json"
STEPS = 10
AXES = (  # one after another, from the best of those before
    ("attention", ("cudnn", "flash")),
    ("parts", (2, 4)),
    ("weights", ("bfloat16",)),
    ("mode", ("max-autotune-no-cudagraphs", "reduce-overhead")),
)


def tune(name: str, text: str) -> Iterator[dict[str, Any]]:
    """All that has been tried, after each axis. What does not run, for want of memory or of a kernel, has
    "failed" in place of its time."""
    best, taken, tried = Choice(), float("inf"), []
    with tempfile.TemporaryDirectory() as cache:
        for axis, values in AXES:
            choices = [dataclasses.replace(best, **{axis: value}) for value in values]
            for one in _trials(name, text, choices, cache):
                tried.append(one)
                if one.get("ms", taken) < taken:
                    best, taken = Choice(**one["choice"]), one["ms"]
            yield {"best": dataclasses.asdict(best), "tried": tried}


def _trials(name: str, text: str, choices: list[Choice], cache: str) -> Iterator[dict[str, Any]]:
    """Of choices that compile beside one another, and are timed one after another."""
    with contextlib.ExitStack() as stack:
        sides = []
        for choice in map(dataclasses.asdict, choices):
            arguments = name, text, "whole", str(STEPS), json.dumps(choice)
            side = stack.enter_context(Side("torch_peer", *arguments, cache=cache, memory={}))
            sides.append(({"choice": choice}, side))
        for one, side in sides:
            try:
                side.answer()
            except RuntimeError as error:
                one["failed"] = str(error).splitlines()[-1][:200]
        for one, side in sides:
            if "failed" not in one:
                found = side.ask()
                one["ms"] = round(statistics.median(found["ms"]), 2)
                one["peak_gb"] = round(found["peak_bytes"] / 1e9, 2)
            yield one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = [name for name, row in ROWS.items() if row.platform == "gpu"]
    parser.add_argument("--rows", default=",".join(own), help=f"of {', '.join(own)}; default: all")
    parser.add_argument("--text", default="python:docs", help="what the tokens are taken from")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    for name in args.rows.split(","):
        for found in tune(name, args.text):
            result["rows"][name] = record.environment("torch") | found
            print(f"{name}: the best of {len(found['tried'])} is {found['best']}", flush=True)
            record.write("speed_choices", result)


if __name__ == "__main__":
    main()
