"""A ladder: runs of rising compute, from which a law foretells one that is larger than all of them.

Every budget is spent on several sizes of model (isoFLOP, Hoffmann et al. 2022, arXiv 2203.15556, approach 2),
around the size that is best so far: where a grid is wide or off its centre a parabola through it is biased
(arXiv 2603.22339). What a size is trained with comes from a named recipe (recipes.py). A ladder is written in
a config file, ``ladder(arg)`` beside ``get_config(arg)``, which gives what all of its runs share.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.flops import training_flops_per_token
from llm_jax.scaling.laws import isoflop
from llm_jax.scaling.points import Overrides
from llm_jax.scaling.recipes import Recipe
from llm_jax.scaling.runs import FLOPS_PER, Runs
from llm_jax.training.experiment import Experiment

OPTIMUM_EXPONENT = 0.5  # of N* ~ C^a, where no minima say otherwise (Hoffmann et al. 2022)


@dataclass(frozen=True)
class Shape:
    model_dim: int
    num_layers: int


@dataclass(frozen=True)
class Ladder:
    """shapes: what may be trained, smallest first. head_dim: of all. budgets: FLOPs, ascending; held_out: of
    the run that is foretold. sizes: how many each budget is spent on. fewest_steps: a shape that would have
    less at a budget is not trained there. first_params: N where the first budget's optimum is looked for.
    repeats: seeds of the middle size of the middle budget, for the noise. recipe: rates, batches, warm-up.

    machine: what it is made for, "v5p:4x4x8" (planning/machine.py), or "cpu". workers: runs at a time.
    speed: FLOP/s of one worker, overhead: seconds of a run beside its steps; both for the plan alone.
    """

    shapes: tuple[Shape, ...]
    head_dim: int
    budgets: tuple[float, ...]
    held_out: float
    first_params: float
    recipe: Recipe
    machine: str
    speed: float
    overhead: float
    workers: int = 1
    sizes: int = 5
    fewest_steps: int = 300
    repeats: int = 1


@dataclass(frozen=True)
class Rung:
    """One run of a ladder. params: N = C / 6D, so that attention counts (DeepSeek-AI 2024, arXiv 2401.02954,
    have it so); flops: of ``steps`` whole steps, close to the budget."""

    budget: float
    shape: Shape
    params: float
    tokens: int
    flops: float
    overrides: Overrides


def rung(ladder: Ladder, base: Experiment, budget: float, shape: Shape) -> Rung:
    """The run of one shape at one budget. base: what all runs share.

    Raises UserError where the vocabulary is not known, which FLOPs depend on.
    """
    if not base.model.vocab_size:
        raise UserError("a ladder needs config.model.vocab_size: its runs' FLOPs are planned before any data")
    model = shaped(base.model, ladder, shape)
    length = base.data.sequence_length
    a_token = training_flops_per_token(model, length, scored=base.scored)
    tokens = budget / a_token
    chosen = ladder.recipe.overrides(base, model, tokens)
    rows, per = chosen.get("global_batch_size", base.global_batch_size), base.steps_per_dispatch
    steps = max(1, round(tokens / (rows * length) / per)) * per
    sizes = {"model_dim": model.model_dim, "num_layers": model.num_layers, "num_heads": model.num_heads}
    overrides = {f"model.{key}": value for key, value in sizes.items()} | chosen | {"steps": steps}
    tokens = steps * rows * length
    return Rung(budget, shape, a_token / FLOPS_PER, tokens, a_token * tokens, overrides)


def shaped(model: ModelConfig, ladder: Ladder, shape: Shape) -> ModelConfig:
    heads = max(1, shape.model_dim // ladder.head_dim)
    return dataclasses.replace(model, model_dim=shape.model_dim, num_layers=shape.num_layers, num_heads=heads)


def at_budget(ladder: Ladder, base: Experiment, budget: float, params: float) -> list[Rung]:
    """The runs of one budget: of the shapes that have steps enough, those nearest to ``params``, as many
    below as above. Raises UserError where fewer than three are left, which no parabola goes through."""
    rungs = [rung(ladder, base, budget, shape) for shape in ladder.shapes]
    possible = [r for r in rungs if r.overrides["steps"] >= ladder.fewest_steps]
    if len(possible) < 3:
        raise UserError(
            f"at {budget:.0e} FLOPs {len(possible)} shapes have {ladder.fewest_steps} steps; "
            "a budget needs three: raise it, or name smaller shapes"
        )
    middle = nearest(possible, params)
    first = min(max(0, middle - ladder.sizes // 2), max(0, len(possible) - ladder.sizes))
    return possible[first : first + ladder.sizes]


def nearest(rungs: list[Rung], params: float) -> int:
    return min(range(len(rungs)), key=lambda i: abs(math.log(rungs[i].params / params)))


def with_repeats(ladder: Ladder, base: Experiment, rungs: list[Rung], params: float) -> list[Rung]:
    """The runs of one budget, and the middle one's other seeds if the budget is the middle one."""
    if rungs[0].budget != ladder.budgets[len(ladder.budgets) // 2]:
        return rungs
    middle = rungs[nearest(rungs, params)]
    seeds = range(base.seed + 1, base.seed + ladder.repeats)
    return rungs + [dataclasses.replace(middle, overrides=middle.overrides | {"seed": s}) for s in seeds]


def optimum_at(ladder: Ladder, runs: Runs | None, budget: float) -> float:
    """Where the best N of ``budget`` is expected: by the first guess, then through the minima found.

    A budget whose minimum is not among its sizes pulls towards its best run.
    """
    if runs is None:
        return ladder.first_params * (budget / ladder.budgets[0]) ** OPTIMUM_EXPONENT
    found = isoflop.budgets(runs)
    if sum(b.interior for b in found) >= 2:
        return float(isoflop.fit(runs).optimum(budget)[0])
    last = found[-1]
    if last.interior:
        best = last.params
    else:
        at = runs.take(np.abs(np.log(runs.flops / last.flops)) < 0.1)
        best = at.params[np.argmin(at.loss)]
    return float(best * (budget / last.flops) ** OPTIMUM_EXPONENT)


def plan(ladder: Ladder, base: Experiment) -> list[Rung]:
    """What would be run, budget by budget, the held-out run last, were the first guess right."""
    rungs = []
    for budget in ladder.budgets:
        params = optimum_at(ladder, None, budget)
        rungs += with_repeats(ladder, base, at_budget(ladder, base, budget, params), params)
    return [*rungs, held_out(ladder, base, None)]


def held_out(ladder: Ladder, base: Experiment, params: float | None) -> Rung:
    """The run that is foretold: the shape nearest to ``params``, or to the first guess."""
    wanted = params or optimum_at(ladder, None, ladder.held_out)
    rungs = [rung(ladder, base, ladder.held_out, shape) for shape in ladder.shapes]
    return rungs[nearest(rungs, wanted)]


def describe(ladder: Ladder, base: Experiment, planned: list[Rung]) -> list[dict[str, Any]]:
    """A row a run: params, tokens, batch (tokens), steps, rate (of learning), flops, and seconds by the
    ladder's stated speed."""
    rows = []
    for r in planned:
        batch = r.overrides.get("global_batch_size", base.global_batch_size) * base.data.sequence_length
        rate = r.overrides.get("optimizer.learning_rate", base.optimizer.learning_rate)
        row = {"budget": r.budget, "shape": f"{r.shape.model_dim}x{r.shape.num_layers}", "params": r.params}
        row |= {"tokens": r.tokens, "batch": batch, "steps": r.overrides["steps"], "rate": rate}
        row |= {"flops": r.flops, "seconds": ladder.overhead + r.flops / ladder.speed}
        rows.append(row)
    return rows
