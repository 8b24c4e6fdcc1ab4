"""Does the best learning rate stay where it is as a model grows? By transfer, and by the standard
parameterisation.

  python -m benchmarks.scaling.transfer [--workers=2] [--keep]

Decoders on the characters of Python's own source, from 32 wide (2 heads of 16) with 2 layers: wider, to 64
times the parameters of the blocks' matrices, by muP; and deeper, to 4 times, by CompleteP. Horizon rule: all
runs have the same steps, batches and schedule. Of each model the rates are a grid in steps of sqrt 2, which
grows until the lowest mean loss has SIDE rates on both sides; the best is the minimum of a parabola in the
log rate through these 2 * SIDE + 1, with a height for each seed. Intervals: 95%, from REPEATS resamples of
the residuals. Writes benchmarks/results/transfer.json; exit code 1 if muP's best rate moves by LIMIT or more.
--keep takes the models that are in that file already from it; "commit" of each says where it was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import record
from llm_jax.models.transformer import init_params
from llm_jax.training import experiment, optimizers, step
from llm_jax.training.program import Program
from llm_jax.training.transfer import transfer

HEAD, BASE = 16, (32, 2)  # width, layers
GROWTH = {"wider": (BASE, (64, 2), (144, 2), (256, 2)), "deeper": (BASE, (32, 4), (32, 8))}
RECIPES = {"wider": ("standard", "mup"), "deeper": ("standard", "completep")}
SEEDS = (0, 1, 2)
START = -12  # the first rates tried are 2^(START / 2) and SIDE on both sides; by "standard" 1 / width of it
SIDE = 3
REPEATS = 4000
LIMIT = 1.4
COMMON = {
    "steps": 300,
    "steps_per_dispatch": 20,
    "global_batch_size": 16,
    "data.text": ("python:source",),
    "data.sequence_length": 64,
    "data.validation_fraction": 0.02,
    "model.scan_layers": False,
    "mesh.cpu_devices": 1,
    "schedule.warmup_steps": 30,
    "evaluation.batches": 40,
    "evaluation.batch_size": 64,
}

SETTINGS = {"common": COMMON, "head_dim": HEAD, "seeds": SEEDS}


class Group(NamedTuple):
    """Runs that differ in rate and seed alone, and so share what is compiled."""

    recipe: str
    width: int
    layers: int


def shape(width: int, layers: int) -> dict[str, Any]:
    return {"model.model_dim": width, "model.num_heads": width // HEAD, "model.num_layers": layers}


def program(group: Group, data: str) -> Program:
    def resolved(changes: dict[str, Any]) -> experiment.Experiment:
        config = experiment.override(experiment.default_config(), COMMON | changes)
        return experiment.resolve(config)

    own = shape(group.width, group.layers)
    changes = transfer(group.recipe, resolved(own).model, resolved(shape(*BASE)).model)
    return Program.prepare(resolved(own | changes), data, say=lambda line: None)


class Trainer:
    """Trains any rate and seed of a group with one compiled program: the rate is an argument."""

    def __init__(self, group: Group, data: str) -> None:
        self.program = program(group, data)
        self._train = jax.jit(self._dispatch, donate_argnums=1)
        self._fresh = jax.jit(lambda key: init_params(self.program.model, key))

    def _dispatch(self, rate: jax.Array, state: Any, batches: Any) -> Any:
        e = self.program.experiment
        optimizer = optimizers.build(e.optimizer, e.schedule.build(rate, e.steps))
        one = step.make_step(self.program.model, e.objective, optimizer, e.seed)
        return step.make_steps(one)(state, batches)[0]

    @functools.cache  # noqa: B019 (lives as long as its process)
    def _batches(self, seed: int) -> list[Any]:
        e = dataclasses.replace(self.program.experiment, seed=seed)
        seeded = dataclasses.replace(self.program, experiment=e)
        return [seeded.batches[i] for i in range(e.steps // e.steps_per_dispatch)]

    def loss(self, rate: float, seed: int) -> float:
        """Validation loss, nats a character. The seed is of initial values and of the order of the data."""
        with jax.set_mesh(self.program.layout.mesh):
            state = self.program.begin(self._fresh(jax.random.key(seed)))
            for batches in self._batches(seed):
                state = self._train(rate, state, batches)
        return self.program.evaluate(state.params)["loss"]


def sweep(group: Group, data: str) -> dict[str, Any]:
    """Losses by rate on a grid that grows until the lowest mean has SIDE rates on both sides."""
    began, trainer, losses = time.process_time(), Trainer(group, data), {}
    start = START - (round(2 * math.log2(group.width / BASE[0])) if group.recipe == "standard" else 0)
    wanted = range(start - SIDE, start + SIDE + 1)
    while missing := [k for k in wanted if k not in losses]:
        for k in missing:
            losses[k] = [trainer.loss(2.0 ** (k / 2), seed) for seed in SEEDS]
            print(*group, f"{2.0 ** (k / 2):.5f}", *(f"{x:.4f}" for x in losses[k]), flush=True)
        means = {k: np.mean(x) if np.isfinite(x).all() else math.inf for k, x in losses.items()}
        lowest = min(means, key=means.get)
        wanted = range(lowest - SIDE, lowest + SIDE + 1)
    params = trainer.program.abstract_state().params
    return {
        **group._asdict(),
        "non_embedding": sum(math.prod(x.shape) for x in jax.tree.leaves(params["blocks"])),
        "losses": {f"{2.0 ** (k / 2):.6g}": losses[k] for k in sorted(losses)},
        "log2_rates": [k / 2 for k in wanted],
        "fitted": [losses[k] for k in wanted],
        "cpu_seconds": round(time.process_time() - began),
        "commit": record.environment()["commit"],
    }


def optima(log2_rates: list[float], losses: list[list[float]], draw: np.random.Generator) -> np.ndarray:
    """[1 + REPEATS] log2 of the best rate: of the losses [rates, seeds], then with resampled residuals."""
    x, y = np.asarray(log2_rates) - np.mean(log2_rates), np.asarray(losses)
    seeds = np.tile(np.eye(y.shape[1]), (len(x), 1))
    columns = np.column_stack([np.repeat(x**2, y.shape[1]), np.repeat(x, y.shape[1]), seeds])
    fit = np.linalg.lstsq(columns, y.ravel())[0]
    residuals = y.ravel() - columns @ fit
    residuals *= math.sqrt(len(residuals) / (len(residuals) - columns.shape[1]))
    again = columns @ fit + draw.choice(residuals, (REPEATS, len(residuals)))
    fits = np.column_stack([fit, np.linalg.lstsq(columns, again.T)[0]])
    return np.mean(log2_rates) - fits[1] / (2 * fits[0])


def judge(swept: dict[Group, dict[str, Any]]) -> dict[str, Any]:
    """Of each way to grow and recipe: the best rate by size, and by how much it moves over all of them."""
    draw, judged = np.random.default_rng(0), {}
    log2 = {group: optima(found["log2_rates"], found["fitted"], draw) for group, found in swept.items()}
    for way, sizes in GROWTH.items():
        for recipe in RECIPES[way]:
            rows = np.array([log2[group_of(recipe, size)] for size in sizes])
            judged[f"{way}, {recipe}"] = {
                "best_rates": [_interval(2.0**row) for row in rows],
                "last_over_first": _interval(2.0 ** (rows[-1] - rows[0])),
                "moves_by": _interval(2.0 ** np.ptp(rows, axis=0)),
            }
    return judged


def group_of(recipe: str, size: tuple[int, int]) -> Group:
    """At the base all recipes are one."""
    return Group("standard" if size == BASE else recipe, *size)


def _interval(values: np.ndarray) -> list[float]:
    """[value, 2.5% and 97.5% of its repeats]."""
    return [float(f"{x:.4g}") for x in (values[0], *np.percentile(values[1:], (2.5, 97.5)))]


def kept_runs() -> dict[Group, dict[str, Any]]:
    """What the file of results has, if it is of the same settings."""
    before = json.loads((record.HERE / "results" / "transfer.json").read_text())
    if {key: before[key] for key in SETTINGS} != json.loads(json.dumps(SETTINGS)):
        raise SystemExit("transfer.json is of other settings; leave --keep out")
    return {Group(*(run[name] for name in Group._fields)): run for run in before["runs"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--keep", action="store_true", help="train only what the results have not")
    args = parser.parse_args()
    kept = kept_runs() if args.keep else {}
    groups = {group_of(r, size) for way, sizes in GROWTH.items() for r in RECIPES[way] for size in sizes}
    groups = sorted(groups, key=lambda group: -group.layers * group.width**2)  # the longest first
    with tempfile.TemporaryDirectory() as directory:
        data = f"{directory}/tokens"
        program(groups[-1], data)  # makes the data, once
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            missing = [group for group in groups if group not in kept]
            swept = pool.starmap(sweep, [(group, data) for group in missing], chunksize=1)
    swept = kept | dict(zip(missing, swept, strict=True))
    judged = judge(swept)
    for name, found in judged.items():
        print(f"{name:<18} best rates {found['best_rates']} move by {found['moves_by']}")
    versions = record.environment("jax", "jaxlib", "flax", "optax", "numpy")
    runs = [swept[group] for group in groups]
    record.write("transfer", {**versions, **SETTINGS, "repeats": REPEATS, "judged": judged, "runs": runs})
    sys.exit(judged["wider, mup"]["moves_by"][0] >= LIMIT)


if __name__ == "__main__":
    main()
