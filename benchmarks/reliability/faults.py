"""Injected faults: after a bad step every parameter, moment and running mean has the bits from before it.

  python -m benchmarks.reliability.faults

Two tiny models train on eight simulated devices, each with 30 faults: NaN, infinity and spikes (10 standard
deviations above the mean of the guard's window; in one device's rows far more), in the loss, in one gradient
leaf, in the rows of one device. Loss and rows are poisoned in the batch's weights, before the forward pass;
a leaf after the backward pass. Every step between two faults must be applied. Replicated numbers that change
on one device alone are another matter: to see these takes communication, which the guard has none of. Exits
1 if a bit changes. Writes benchmarks/results/reliability_faults.json.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks import record
from llm_jax.training import experiment, step
from llm_jax.training.program import Program
from tests.injection import KINDS, PLACES, Fault, faulty, leaf_names

FAULTS, WINDOW, EVERY = 30, 16, 3  # a fault every third step once the window is full
TEXT = "To be, or not to be, that is the question.\n" * 400
COMMON = {
    "steps": WINDOW + FAULTS * EVERY,
    "global_batch_size": 16,
    "mesh.cpu_devices": 8,
    "data.validation": "position",
    "data.sequence_length": 32,
    "model.num_layers": 2,
    "model.model_dim": 32,
    "model.num_heads": 4,
    "schedule.warmup_steps": 5,
    "ema_decay": 0.9,
    "guard.sigma": 6.0,
    "guard.window": WINDOW,
}
RUNS = {
    "8x1x1": {"mesh.data": 8, "optimizer": "muon", "accumulation": 2},
    "2x2x2": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "model.dropout": 0.1},
}


def faults() -> list[Fault]:
    """All pairs of a kind and a place in turn, each time at another leaf or device."""
    pairs = [(kind, place) for place in PLACES for kind in KINDS]
    return [Fault(WINDOW + EVERY * i, *pairs[i % len(pairs)], number=i) for i in range(FAULTS)]


def train(mesh: str, changes: dict, text: Path) -> tuple[list[dict], int]:
    """A row for every fault, and how many of the other steps were not applied."""
    config = experiment.override(experiment.default_config(), COMMON | changes | {"data.text": str(text)})
    program = Program.prepare(experiment.resolve(config), text.parent / mesh, say=lambda _: None)
    state, at, rows, lost = program.init(), {fault.step: fault for fault in faults()}, [], 0
    names = leaf_names(state.params)
    for number in range(program.experiment.steps):
        before = jax.device_get(state)
        state, metrics = program.steps(state, program.batches[number])
        metrics, after = jax.device_get(metrics), jax.device_get(state)
        fault = at.get(number)
        if fault is None:
            lost += int(metrics["skipped"][0]) or not changed(before, after)
            continue
        where = {"leaf": names[fault.number % len(names)], "shard": f"device {fault.number % 8}"}
        norm, usual = float(metrics["grad_norm"][0]), before.guard.norms
        rows.append(
            {
                "mesh": mesh,
                "step": number,
                "kind": fault.kind,
                "place": where.get(fault.place, "loss"),
                "loss": str(metrics["loss"][0]),
                "grad_norm": str(metrics["grad_norm"][0]),
                "sigmas": round(float((norm - usual.mean()) / usual.std()), 2) if np.isfinite(norm) else None,
                "skipped": bool(metrics["skipped"][0]),
                "leaves": len(jax.tree.leaves(kept(before))),
                "leaves_changed": changed(before, after),
            }
        )
    return rows, lost


def kept(state) -> tuple:
    """What a bad step must not change."""
    return state.params, state.opt_state, state.ema, state.guard.norms, state.guard.count


def changed(before, after) -> int:
    """How many leaves have other bits."""
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), kept(before), kept(after))
    return jax.tree.leaves(same).count(False)


def main() -> None:
    step.make_gradients = faulty(step.make_gradients, faults())
    rows, lost = [], 0
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "text.txt"
        text.write_text(TEXT)
        for mesh, changes in RUNS.items():
            more, more_lost = train(mesh, changes, text)
            rows, lost = rows + more, lost + more_lost
    for row in rows:
        print("  ".join(f"{value}" for value in row.values()))
    good = sum(row["skipped"] and not row["leaves_changed"] for row in rows)
    print(f"{good} of {len(rows)} faults changed nothing; {lost} other steps were not applied")
    content = {
        **record.environment("jax", "jaxlib", "optax"),
        "faults": len(rows),
        "changed_nothing": good,
        "other_steps_not_applied": lost,
        "passed": good == len(rows) and not lost,
        "table": rows,
    }
    record.write("reliability_faults", content)
    sys.exit(0 if content["passed"] else 1)


if __name__ == "__main__":
    main()
