"""What it saves to train four horizons as one trunk with branches, in wall time, and that no bit is another.

  python -m benchmarks.scaling.trunks

A small decoder under WSD with horizons of 500 to 4,000 steps, as one sweep by one worker: as it is, where the
shorter ones branch off the longest, and with a runtime field set apart in each point, so that all are trained
alone. The times are of the whole command, of the clock and of all its processors: each point starts a process
and compiles. Exits 1 unless metrics, samples and every array of all four are the same. Writes
benchmarks/results/trunks.json.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record
from benchmarks.reliability import harness

HORIZONS = (500, 1000, 2000, 4000)
VALUES = {
    "global_batch_size": 16,
    "steps_per_dispatch": 10,
    "mesh.cpu_devices": 2,
    "data.text": ("python:docs",),
    "data.validation_fraction": 0.05,
    "data.sequence_length": 64,
    "model.num_layers": 2,
    "model.model_dim": 64,
    "model.scan_layers": False,
    "schedule.name": "wsd",
    "schedule.decay_share": 0.2,
    "evaluation.every": 500,
    "evaluation.batches": 50,
    "samples.tokens": 5,
}
CONFIG = """
from llm_jax.scaling.points import grid, zip_
from llm_jax.training import experiment

def get_config(arg=""):
    return experiment.override(experiment.default_config(), {values})

def sweep(arg=""):
    points = {{"steps": {horizons}}}
    return grid(points) if arg == "shared" else zip_(points, {{"checkpoint.keep": range(2, 6)}})
"""


def sweep(root: Path, name: str) -> tuple[dict[str, float], list[dict]]:
    """({clock: seconds}, rows of the table) of a whole sweep."""
    config, log = root / "config.py", root / f"{name}.log"
    config.write_text(CONFIG.format(values=VALUES, horizons=HORIZONS))
    command = harness.script("sweep.py", f"--config={config}:{name}", f"--workdir={root / name}")
    began, spent = time.monotonic(), processors()
    code = harness.start(command, log, root / f"{name}_cache").wait()
    seconds = {"wall": time.monotonic() - began, "processors": processors() - spent}
    if code:
        raise SystemExit(f"the sweep failed (exit code {code}):\n{log.read_text()[-3000:]}")
    print(f"{name}: {seconds}", flush=True)
    return seconds, [json.loads(line) for line in (root / name / "table.jsonl").read_text().splitlines()]


def processors() -> float:
    """Seconds that all processes which have ended had of them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="llm_jax_trunks_"))
    alone_seconds, alone = sweep(root, "alone")
    seconds, rows = sweep(root, "shared")
    names = [row["fingerprint"] for row in rows]
    assert names == [row["fingerprint"] for row in alone] and not any(row["branched_at"] for row in alone)
    runs = [(root / "alone" / "runs" / name, root / "shared" / "runs" / name) for name in names]
    found = [
        f"{name}: {what}"
        for name, pair in zip(names, runs, strict=True)
        for what in harness.differences(*pair)
    ]
    flops = sum(row["training_flops"] for row in rows)
    saved = sum(row["saved_flops"] or 0.0 for row in rows)
    content = {
        **record.environment("jax"),
        "horizons": HORIZONS,
        "branched_at": [row["branched_at"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "loss_standard_errors": [row["loss_se"] for row in rows],
        "flops": flops,
        "flops_saved": saved / flops,
        "seconds_alone": {clock: round(value, 1) for clock, value in alone_seconds.items()},
        "seconds_shared": {clock: round(value, 1) for clock, value in seconds.items()},
        "seconds_saved": {clock: 1 - value / alone_seconds[clock] for clock, value in seconds.items()},
        "identical": not found,
    }
    record.write("trunks", content)
    shares = ", ".join(f"{share:.1%} by {clock}" for clock, share in content["seconds_saved"].items())
    print(f"saved: {saved / flops:.1%} of FLOPs; time: {shares}")
    if found:
        sys.exit(f"what differs is in {root}: {', '.join(found[:4])}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
