"""Every optimiser and every schedule, once, at a small size: nothing diverges, no two are the same.

  python benchmarks/choices_optimizers.py [--text=tinyshakespeare.txt]

A decoder of two layers on characters, one seed, in one process; a few minutes on two cores. Learning rates
are sensible, not tuned, so the order of the table says little about the optimisers. Writes
benchmarks/results/choices_optimizers.json; exit code 1 when a run diverges (its loss is not finite, or not
below that of the untrained model) or two runs end with the same validation loss.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import record

from llm_jax.training import experiment
from llm_jax.training.optimizers import OPTIMIZERS
from llm_jax.training.program import Program
from llm_jax.training.schedules import SCHEDULES

COMMON = {
    "steps": 300,
    "steps_per_dispatch": 10,
    "global_batch_size": 16,
    "data.validation": "position",
    "data.sequence_length": 64,
    "model.model_dim": 64,
    "model.scan_layers": False,
    "optimizer.learning_rate": 3e-3,
    "evaluation.batches": 20,
    "evaluation.batch_size": 64,
}
RATES = {"sgd": 0.3, "lion": 1e-3, "adafactor": 3e-2, "muon": 1e-2}
WITHOUT_MATCH = {  # Muon at Jordan's scale: its own rate, and AdamW's as a share of it
    "optimizer.name": "muon",
    "optimizer.match_adamw": False,
    "optimizer.learning_rate": 0.02,
    "optimizer.rules": (
        {"match": ".*scale", "weight_decay": 0.0, "optimizer": "adamw", "learning_rate": 0.15},
        {"match": "blocks/(attention|mlp)/.*"},
        {"match": ".*", "optimizer": "adamw", "learning_rate": 0.15},
    ),
}


def cases() -> dict[str, dict[str, Any]]:
    """{name: what differs from COMMON}. The rest is AdamW with cosine."""
    optimizers = {
        f"optimizer {name}": {"optimizer.name": name, "optimizer.learning_rate": RATES.get(name, 3e-3)}
        for name in OPTIMIZERS
    }
    schedules = {f"schedule {name}": {"schedule.name": name} for name in SCHEDULES if name != "cosine"}
    return {
        **optimizers,
        "optimizer sgd, nesterov": optimizers["optimizer sgd"] | {"optimizer.nesterov": True},
        "optimizer muon, own scale": WITHOUT_MATCH,
        **schedules,
        "schedule wsd, linear": {"schedule.name": "wsd", "schedule.decay": "linear"},
        "schedule triangular2": {"schedule.name": "triangular", "schedule.decay": 0.5},
        "ema 0.98": {"ema_decay": 0.98},
        "float16": {"model.dtype": "float16"},
    }


def run(text: str, changes: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Trains one; validation losses before and after, whether it diverged, seconds with compilation."""
    config = experiment.override(experiment.default_config(), COMMON | {"data.text": (text,)} | changes)
    began = time.perf_counter()
    program = Program.prepare(experiment.resolve(config), data, say=lambda line: None)
    state, skipped = program.init(), 0.0
    untrained = program.evaluate(state.judged)["loss"]
    for i in range(program.experiment.steps // program.experiment.steps_per_dispatch):
        state, metrics = program.steps(state, program.batches[i])
        skipped += float(np.sum(metrics["skipped"]))
    loss = program.evaluate(state.judged)["loss"]
    return {
        "validation_loss": loss,
        "untrained_loss": untrained,
        "diverged": not (math.isfinite(loss) and loss < untrained),
        "skipped_steps": int(skipped),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="python:docs", help="a file, or what every Python carries")
    args = parser.parse_args()
    results = {}
    print(f"{'':<28}{'validation loss':>16}{'skipped':>9}{'diverged':>10}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as data:
        for name, changes in cases().items():
            r = results[name] = run(args.text, changes, f"{data}/tokens")
            row = f"{name:<28}{r['validation_loss']:>16.4f}{r['skipped_steps']:>9}"
            print(f"{row}{'yes' if r['diverged'] else 'no':>10}{r['seconds']:>9.1f}", flush=True)
    same = [
        list(pair)
        for pair in combinations(results, 2)
        if results[pair[0]]["validation_loss"] == results[pair[1]]["validation_loss"]
    ]
    for one, other in same:
        print(f"the same loss: {one} and {other}")
    diverged = any(r["diverged"] for r in results.values())
    versions = record.environment("jax", "jaxlib", "flax", "optax", "numpy")
    text = args.text.rpartition("/")[2]
    record.write(
        "choices_optimizers", {**versions, "text": text, "common": COMMON, "runs": results, "same": same}
    )
    sys.exit(1 if diverged or same else 0)


if __name__ == "__main__":
    main()
