"""Where our step of a row spends its time on a GPU, kernel by kernel.

  python -m benchmarks.speed.kernels --row=bert_base --text=tinyshakespeare.txt

Times steps, and then a few by jax's profiler. Prints the kernels, the longest first: milliseconds and calls
of a step, and the name. Writes them to benchmarks/results/speed_kernels.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks import record
from benchmarks.speed import clock
from benchmarks.speed.ours import Step
from benchmarks.speed.rows import ROOT, ROWS
from benchmarks.speed.side import backend

RESULT = ROOT / "benchmarks" / "results" / "speed_kernels.json"
STEPS = 40
SHOWN = 40


def totals(events: Iterable[dict[str, Any]], steps: int) -> dict[str, tuple[float, float]]:
    """{kernel: (milliseconds a step, calls a step)}, the longest first, of a trace's events: what ran in a
    stream of a GPU."""
    events = list(events)
    named = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("name") in named:
            named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
    gpus = {pid for (pid, _), name in named["process_name"].items() if "gpu" in name.lower()}
    streams = {at for at, name in named["thread_name"].items() if at[0] in gpus and "Stream" in name}
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            found[event["name"]].append(event["dur"])
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {name: (sum(us) / 1000 / steps, len(us) / steps) for name, us in longest}


def profile(step: Step) -> dict[str, tuple[float, float]]:
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            step.group()
        (path,) = Path(directory).rglob("*.trace.json.gz")
        with gzip.open(path) as file:
            return totals(json.load(file)["traceEvents"], step.size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = [name for name, row in ROWS.items() if row.platform == "gpu"]
    parser.add_argument("--row", required=True, choices=rows)
    parser.add_argument("--text", default="python:docs", help="what the tokens are taken from")
    args = parser.parse_args()
    if backend() != "gpu":
        parser.error("jax finds no GPU here")
    with tempfile.TemporaryDirectory() as directory:
        step = Step(args.row, args.text, tiny=False, directory=directory)
        step.compile()
        ms = statistics.median(clock.milliseconds(step.group, step.size, STEPS))
        kernels = profile(step)
    print(f"{args.row}: {ms:.1f} ms a step, {sum(ms for ms, _ in kernels.values()):.1f} in kernels")
    for name, (own, calls) in list(kernels.items())[:SHOWN]:
        print(f"{own:9.3f} ms {calls:6.1f} x {name[:80]}")
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    about = record.environment("jax", "jaxlib") | {"device": jax.devices()[0].device_kind, "ms": round(ms, 2)}
    shown = {name: [round(own, 3), calls] for name, (own, calls) in kernels.items() if own >= 0.05}
    record.write("speed_kernels", known | {args.row: about | {"kernels": shown}})


if __name__ == "__main__":
    main()
