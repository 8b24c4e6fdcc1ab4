"""What the PyTorch peer is fastest with on this machine's GPU: one choice after another, each by a few steps
in a process of its own.

  python -m benchmarks.speed.tune --rows=124m

cuDNN's or the flash kernel of scaled_dot_product_attention; autocast, or weights in bfloat16 beside float32
masters; how many rows at a time; the modes of torch.compile. Writes benchmarks/results/speed_choices.json
after each trial, all that was tried in it; benchmarks/speed/run.py takes the best of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import record
from benchmarks.speed import run
from benchmarks.speed.rows import ROOT, ROWS
from benchmarks.speed.torch_peer import Choice

RESULT = ROOT / "benchmarks" / "results" / "speed_choices.json"
FIRST = Choice(attention="cudnn")
STEPS = 10


def axes(best: Choice) -> Iterator[list[Choice]]:
    """What is tried, a list for each choice; the next list follows from the best of those before."""
    yield [best]
    for name, values in (
        ("attention", ["flash"]),
        ("parts", [2, 4]),
        ("weights", ["bfloat16"]),
        ("mode", ["max-autotune-no-cudagraphs", "reduce-overhead"]),
    ):
        best = yield [dataclasses.replace(best, **{name: value}) for value in values]


def tune(name: str, text: str) -> Iterator[dict[str, Any]]:
    """All that has been tried, after each trial. One that does not run, for want of memory or of a kernel,
    has "failed" in place of its time."""
    best, taken, tried = FIRST, float("inf"), []
    order = axes(best)
    choices = next(order)
    with tempfile.TemporaryDirectory() as cache:
        while choices:
            for choice in choices:
                one = {"choice": dataclasses.asdict(choice)}
                try:
                    arguments = name, text, "whole", str(STEPS), json.dumps(one["choice"])
                    found = run.run_module("torch_peer", *arguments, cache=cache)
                    ms = statistics.median(found["ms"])
                    tried.append(one | {"ms": round(ms, 2), "peak_gb": round(found["peak_bytes"] / 1e9, 2)})
                    best, taken = (choice, ms) if ms < taken else (best, taken)
                except RuntimeError as error:
                    tried.append(one | {"failed": str(error).splitlines()[-1][:200]})
                yield {"best": dataclasses.asdict(best), "tried": tried}
            try:
                choices = order.send(best)
            except StopIteration:
                return


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
            print(f"{name}: {found['tried'][-1]}", flush=True)
            record.write("speed_choices", result)


if __name__ == "__main__":
    main()
