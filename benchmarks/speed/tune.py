"""What the PyTorch peer is fastest with on this machine's GPU: one choice after another, each by a few steps
in a process of its own, alone on the GPU, so that none fails for want of memory that another has.

  python -m benchmarks.speed.tune --rows=124m

cuDNN's or the flash kernel of scaled_dot_product_attention; autocast, or weights in bfloat16 beside float32
masters; how many rows at a time; the modes of torch.compile. Writes benchmarks/results/speed_choices.json
all that was tried; benchmarks/speed/run.py takes the best, and asks for it where there is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks import record
from benchmarks.speed.choice import Choice
from benchmarks.speed.rows import ROOT, ROWS
from benchmarks.speed.side import Side

RESULT = ROOT / "benchmarks" / "results" / "speed_choices.json"
STEPS = 10
AXES = (  # one after another, from the best of those before
    ("attention", ("cudnn", "flash")),
    ("parts", (2, 4)),
    ("weights", ("bfloat16",)),
    ("mode", ("max-autotune-no-cudagraphs", "reduce-overhead")),
)


def best(name: str, text: str) -> dict[str, Any]:
    """The fastest choice for a row with this version of torch; found now, if it has not been."""
    known = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    if known.get(name, {}).get("torch") != importlib.metadata.version("torch"):
        write(name, text)
        known = json.loads(RESULT.read_text())["rows"]
    return known[name]["best"]


def write(name: str, text: str) -> None:
    """Tries all choices and writes each down as soon as it is known."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    for found in tune(name, text):
        result["rows"][name] = record.environment("torch") | found
        print(f"{name}: the best of {len(found['tried'])} is {found['best']}", flush=True)
        record.write("speed_choices", result)


def tune(name: str, text: str) -> Iterator[dict[str, Any]]:
    """All that has been tried, after each axis."""
    best, taken, tried = Choice(), float("inf"), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for axis, values in AXES:
            for choice in [dataclasses.replace(best, **{axis: value}) for value in values]:
                tried.append({"choice": dataclasses.asdict(choice)} | trial(name, text, choice, cache))
                if tried[-1].get("ms", taken) < taken:
                    best, taken = choice, tried[-1]["ms"]
            yield {"best": dataclasses.asdict(best), "tried": tried}


def trial(name: str, text: str, choice: Choice, cache: str) -> dict[str, Any]:
    """Its time and memory; of one that does not run, for want of memory or of a kernel, why it "failed"."""
    arguments = name, text, "whole", str(STEPS), json.dumps(dataclasses.asdict(choice))
    try:
        with Side("torch_peer", *arguments, cache=cache) as side:
            side.answer()
            side.ask()
            found = side.ask()
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[-1][:200]}
    return {"ms": round(statistics.median(found["ms"]), 2), "peak_gb": round(found["peak_bytes"] / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = [name for name, row in ROWS.items() if row.platform == "gpu" and "torch" in row.peers]
    parser.add_argument("--rows", default=",".join(own), help=f"of {', '.join(own)}; default: all")
    parser.add_argument("--text", default="python:docs", help="what the tokens are taken from")
    args = parser.parse_args()
    for name in args.rows.split(","):
        if name not in own:
            parser.error(f"--rows: {name} is none of {', '.join(own)}")
        write(name, args.text)


if __name__ == "__main__":
    main()
