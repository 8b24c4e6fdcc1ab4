"""Tables of runs by a known law."""

import numpy as np

from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import Runs

TRUTH = Surface(E=1.7, A=400.0, B=800.0, alpha=0.35, beta=0.37)
BUDGETS = np.array([1e15, 3e15, 1e16, 3e16])


def isoflop_runs(law=TRUTH, budgets=BUDGETS, sizes=(0.4, 0.65, 1.0, 1.6, 2.5), noise=0.0, seed=0):
    """Each budget spent on sizes around its optimum; log losses with normal noise."""
    flops = np.repeat(budgets, len(sizes))
    params = law.optimum(flops)[0] * np.tile(sizes, len(budgets))
    tokens = flops / (6 * params)
    draw = np.random.default_rng(seed).standard_normal(len(flops))
    return Runs(params, tokens, flops, law.loss(params, tokens) * np.exp(noise * draw))
