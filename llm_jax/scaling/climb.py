"""Runs a ladder from its first run to the score of its forecast, and goes on where it was stopped.

    runs/           the sweep of all budgets, as scripts/sweep.py would have it
    law.json        what the runs say (study.py)
    forecast.json   of the held-out run, written before it starts
    held_out/       a sweep of that one run
    score.json      what came of the forecast

Each budget's sizes are chosen when those before it are done, around the optimum that they show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_collections

from llm_jax import storage
from llm_jax.errors import Stopped, UserError
from llm_jax.scaling import forecast, study, workers
from llm_jax.scaling import ladder as ladders
from llm_jax.scaling import runs as tables
from llm_jax.scaling.board import Board
from llm_jax.scaling.ladder import Ladder
from llm_jax.scaling.points import Overrides
from llm_jax.scaling.runs import Runs
from llm_jax.scaling.sweep import FINISHED, SETTLED, Sweep, resolve
from llm_jax.training import experiment as experiments
from llm_jax.training.signals import Stop

# N = C / 6D counts attention, too, and makes C = 6 N D exact, as the surface's optimum takes it to be.
COLUMNS = {"D": "tokens", "C": "training_flops", "loss": "loss"}


@dataclass(frozen=True)
class Climb:
    """config: what all runs share; program: scripts/train.py."""

    ladder: Ladder
    config: ml_collections.ConfigDict
    directory: Path
    program: Path
    stop: Stop
    say: Callable[[str], None]

    def run(self) -> dict[str, Any]:
        """All of it; gives what came of the forecast. Raises Stopped where ``stop`` asks for it, UserError
        where a run fails."""
        made = self.directory / "forecast.json"
        runs = self.train()
        if not made.exists():  # a law that was written again would not be the one that the forecast names
            self.foretell(runs, made)
        return self.check(made)

    def train(self) -> Runs:
        """The runs of every budget."""
        base = experiments.resolve(self.config)
        points: list[Overrides] = []
        runs = None
        for budget in self.ladder.budgets:
            params = ladders.optimum_at(self.ladder, runs, budget)
            rungs = ladders.at_budget(self.ladder, base, budget, params)
            shapes = ", ".join(f"{r.shape.model_dim}x{r.shape.num_layers}" for r in rungs)
            self.say(f"budget {budget:.3g} FLOPs: {shapes}, around N = {params:.3g}")
            points += [r.overrides for r in ladders.with_repeats(self.ladder, base, rungs, params)]
            runs = self.sweep(self.directory / "runs", points, self.ladder.workers)
        return runs

    def sweep(self, directory: Path, points: Sequence[Overrides], count: int) -> Runs:
        """Trains what of ``points`` is not trained yet."""
        sweep = Sweep(directory, resolve(self.config, points, {}))
        sweep.prepare(sweep.points, self.say)
        if any(sweep.status(point) not in SETTLED for point in sweep.points):
            with self.stop.deferred(), closing(Board(sweep, sweep.points)) as board:
                workers.run(sweep, sweep.points, count, self.program, self.stop, board)
        states = [sweep.status(point) for point in sweep.points]
        if self.stop.reason and {*states} - {*SETTLED}:
            raise Stopped(f"{self.stop.reason}; {states.count(FINISHED)} of {len(states)} runs are done")
        if other := [f"{p} {s}" for p, s in zip(sweep.points, states, strict=True) if s != FINISHED]:
            raise UserError(f"{directory}: {other[0]}; the same command tries again what has failed")
        return tables.read(directory / "table.jsonl", COLUMNS)

    def foretell(self, runs: Runs, made: Path) -> None:
        """Fits every law, and writes what the best of them says of the held-out run."""
        ladder, path = self.ladder, self.directory / "law.json"
        steps = [after / before for before, after in pairwise((*ladder.budgets, ladder.held_out))]
        found = study.study(runs, horizon=1.1 * max(steps), say=self.say)
        table = study.describe_table(self.directory / "runs" / "table.jsonl", runs, COLUMNS, "all")
        storage.write_text(path, json.dumps({"table": table} | found, indent=1) + "\n")
        whole = forecast.foretell(path, ladder.held_out)
        base = experiments.resolve(self.config)
        rung = ladders.held_out(ladder, base, whole.params)
        storage.write_text(self.directory / "held_out.json", json.dumps(rung.overrides, indent=1) + "\n")
        forecast.write(made, forecast.foretell(path, rung.flops, rung.params, rung.tokens))

    def check(self, made: Path) -> dict[str, Any]:
        """Trains the held-out run, and scores the forecast by it."""
        overrides = json.loads((self.directory / "held_out.json").read_text())
        runs = self.sweep(self.directory / "held_out", [overrides], 1)
        scored = forecast.score(forecast.read(made), float(runs.loss[0]), float(runs.flops[0]))
        storage.write_text(self.directory / "score.json", json.dumps(scored, indent=1) + "\n")
        return scored
