"""Ladders: which runs are made of which budget, around which optimum."""

import dataclasses

import numpy as np
import pytest
from tables import Runs

from llm_jax.errors import UserError
from llm_jax.models.flops import matmul_parameters
from llm_jax.scaling import ladder as ladders
from llm_jax.scaling.ladder import Ladder, Shape
from llm_jax.scaling.laws import tuning
from llm_jax.scaling.recipes import RECIPES, Recipe
from llm_jax.scaling.shown import plan_lines
from llm_jax.training.experiment import default_config, resolve


def base(**changes):
    config = default_config(tokenizer="byte")
    config.steps, config.global_batch_size, config.steps_per_dispatch = 1000, 4, 10
    config.data.text = ("python:source",)
    config.model.vocab_size = 261
    for key, value in changes.items():
        config.model[key] = value
    return resolve(config)


LADDER = Ladder(
    shapes=tuple(Shape(width, 2) for width in (16, 32, 48, 64, 80, 96, 128)),
    head_dim=16,
    budgets=(1e11, 4e11, 1.6e12),
    held_out=6.4e12,
    first_params=6e4,
    recipe=Recipe(),
    machine="cpu",
    speed=1e10,
    overhead=5.0,
    workers=2,
    sizes=3,
    repeats=3,
)


def test_every_run_spends_its_budget_in_whole_dispatches():
    planned = ladders.plan(LADDER, base())
    assert [r.budget for r in planned] == [1e11] * 3 + [4e11] * 5 + [1.6e12] * 3 + [6.4e12]
    for r in planned:
        assert r.flops == pytest.approx(r.budget, rel=0.02)
        assert r.flops == pytest.approx(6 * r.params * r.tokens)
        assert r.overrides["steps"] % 10 == 0 and r.overrides["steps"] >= LADDER.fewest_steps
        assert r.tokens == r.overrides["steps"] * 4 * base().data.sequence_length
    seeds = [r.overrides.get("seed", 0) for r in planned if r.budget == 4e11]
    assert seeds == [0, 0, 0, 1, 2]
    assert len({r.shape for r in planned if r.overrides.get("seed") is not None}) == 1


def test_sizes_stand_around_the_optimum_and_slide_with_it():
    for params in (3e4, 1e5, 3e5):
        rungs = ladders.at_budget(LADDER, base(), 1e13, params)
        assert len(rungs) == 3
        assert rungs[0].params < params < rungs[-1].params or rungs[0].shape == LADDER.shapes[0]
    # a shape that would have too few steps is left out, and too few shapes are refused
    assert ladders.at_budget(LADDER, base(), 1e11, 1e9)[-1].overrides["steps"] >= LADDER.fewest_steps
    with pytest.raises(UserError, match=r"at 1e\+10 FLOPs 1 shapes have 300 steps"):
        ladders.at_budget(LADDER, base(), 1e10, 6e4)
    with pytest.raises(UserError, match=r"needs config.model.vocab_size"):
        ladders.plan(LADDER, base(vocab_size=0))


def parabola(flops, centre, sizes):
    params = np.array(sizes)
    loss = 2.0 * (flops / 1e11) ** -0.1 * np.exp(0.05 * np.log(params / centre) ** 2)
    return Runs(params, flops / (6 * params), np.full(len(params), flops), loss)


def joined(*parts):
    fields = ("params", "tokens", "flops", "loss")
    return Runs(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def test_the_optimum_is_looked_for_where_the_runs_say():
    assert ladders.optimum_at(LADDER, None, 4e11) == pytest.approx(2 * LADDER.first_params)
    first = parabola(1e11, 8e4, (4e4, 6e4, 9e4, 1.4e5))
    assert ladders.optimum_at(LADDER, first, 4e11) == pytest.approx(1.6e5, rel=0.01)
    both = joined(first, parabola(4e11, 2.4e5, (1e5, 1.6e5, 2.5e5, 4e5)))
    grown = 2.4e5 * 3 ** (np.log(4) / np.log(4))
    assert ladders.optimum_at(LADDER, both, 1.6e12) == pytest.approx(grown, rel=0.02)
    outside = parabola(1e11, 1e6, (4e4, 6e4, 9e4, 1.4e5))  # its minimum lies beyond: towards the best
    assert ladders.optimum_at(LADDER, outside, 1e11) == pytest.approx(1.4e5)


def test_the_held_out_run_has_the_nearest_shape():
    rung = ladders.held_out(LADDER, base(), 1.6e5)
    assert rung.flops == pytest.approx(6.4e12, rel=0.01)
    others = [ladders.rung(LADDER, base(), 6.4e12, shape).params for shape in LADDER.shapes]
    assert rung.params == min(others, key=lambda n: abs(np.log(n / 1.6e5)))


def test_a_recipe_sets_rate_batch_and_warm_up():
    step_law = dataclasses.replace(LADDER, recipe=RECIPES["step-law"])
    small, large = (ladders.rung(step_law, base(), 1e14, Shape(w, 2)).overrides for w in (32, 128))
    assert small["optimizer.learning_rate"] > large["optimizer.learning_rate"]
    assert small["global_batch_size"] > large["global_batch_size"]  # more tokens, a larger batch
    tuned = Recipe(tuned_tokens=1e6)
    model = base().model
    assert tuned.overrides(base(), model, 1e6) == {}
    longer = tuned.overrides(base(), model, 1e7)["optimizer.learning_rate"]
    assert longer == pytest.approx(base().optimizer.learning_rate * 0.1**0.3, rel=1e-3)
    olmo = Recipe(tuning.RULES["olmo-ladder"], warmup=1.0).overrides(base(), model, 1e9)
    tokens = olmo["schedule.warmup_steps"] * olmo["global_batch_size"] * base().data.sequence_length
    assert tokens == pytest.approx(matmul_parameters(model), rel=0.01)  # N tokens
    assert Recipe().overrides(base(), model, 1e9) == {}


def test_the_plan_is_shown_with_its_price():
    gpu = dataclasses.replace(LADDER, machine="H100:8", speed=1e12)
    rows = ladders.describe(gpu, base(), ladders.plan(gpu, base()))
    text = "\n".join(plan_lines(rows, gpu, 2.0))
    seconds = sum(row["seconds"] for row in rows)
    assert f"{8 * seconds / 3600 * 2:,.2f} dollars" in text and "12 runs" in text
