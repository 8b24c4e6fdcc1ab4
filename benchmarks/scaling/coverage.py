"""Whether 95% bootstrap intervals hold the truth in 95 of 100 cases, and what they give away for it.

  python -m benchmarks.scaling.coverage [--repeats=1000] [--draws=200]

The truth is E + A/N^alpha + B/D^beta, the table 30 runs: 5 budgets of 1e18 to 1e20 FLOPs, 6 sizes each in
steps of 2 about the best one, normal noise on log losses. Six designs:

  centred    noise of 0.5%
  off        sizes 3x too large
  ratio      alpha / beta = 3
  outliers   2% of the runs have 5 sigma, either way
  noise_1    noise of 1%
  noise_03   noise of 0.3%

Of the exponent a and the frontier's loss at 10x the largest budget: the share of tables whose interval holds
the truth, and the median width of the interval over that of an oracle. ``ratio``: the central 95% of the same
fit's answers over all these tables, which is the true spread. ``efficient``: that of least squares on tables
without outliers, which no fit of such noise can better by much.

Fits start at the truth, not on the grid; ``global`` counts tables, of 5 a design, where a whole search (by
projection) finds the same objective. Writes benchmarks/results/coverage.json.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks import record
from llm_jax.scaling.laws import resample, surface
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import Runs

CHINCHILLA = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
# The same best run at 1e19 FLOPs, and the same slopes there, with other exponents
STEEP = Surface(E=1.69, A=12011.8, B=65.919, alpha=0.54, beta=0.18)
BUDGETS, SIZES = np.geomspace(1e18, 1e20, 5), 2.0 ** np.arange(-2.5, 3)
AHEAD = 10 * BUDGETS.max()
QUANTITIES = ("a", "forecast")
SEARCHED = 5  # tables a design


@dataclass(frozen=True)
class Design:
    truth: Surface = CHINCHILLA
    offset: float = 1.0
    noise: float = 0.005
    outliers: float = 0.0

    def table(self) -> Runs:
        """Without noise."""
        flops = np.repeat(BUDGETS, len(SIZES))
        params = self.truth.optimum(flops)[0] * np.tile(SIZES, len(BUDGETS)) * self.offset
        tokens = flops / (6 * params)
        return Runs(params, tokens, flops, self.truth.loss(params, tokens))

    def losses(self, repeats: int, seed: int, outliers: float) -> np.ndarray:
        """[repeats, runs]"""
        draw = np.random.default_rng(seed)
        noise = draw.standard_normal((repeats, len(BUDGETS) * len(SIZES)))
        far = draw.random(noise.shape) < outliers
        noise = np.where(far, 5 * np.sign(noise), noise)
        return self.table().loss * np.exp(self.noise * noise)


DESIGNS = {
    "centred": Design(),
    "off": Design(offset=3.0),
    "ratio": Design(truth=STEEP),
    "outliers": Design(outliers=0.02),
    "noise_1": Design(noise=0.01),
    "noise_03": Design(noise=0.003),
}


def quantities(law: Surface) -> np.ndarray:
    """[repeats, 2], or [2]: a and the forecast."""
    return np.stack([law.a, law.frontier(AHEAD)], -1)


def spread(laws: Surface) -> np.ndarray:
    low, high = resample.interval(quantities(laws))
    return high - low


def measure(name: str, repeats: int, draws: int, seed: int) -> dict:
    design = DESIGNS[name]
    table, losses = design.table(), design.losses(repeats, seed, design.outliers)
    once = np.ones_like(losses)
    fits = surface.refit(design.truth, table, once, losses)
    clean = design.losses(repeats, seed, 0.0)
    efficient = surface.refit(design.truth, table, once, clean, delta=1.0)
    held, width = ({kind: [] for kind in (resample.PARAMETRIC, resample.CASE)} for _ in range(2))
    searched = 0
    for index in range(repeats):
        runs = Runs(table.params, table.tokens, table.flops, losses[index])
        law = Surface(*(float(x[index]) for x in (fits.E, fits.A, fits.B, fits.alpha, fits.beta)))
        if index < SEARCHED:
            best = surface.objective(surface.fit_projected(runs), runs)
            searched += abs(surface.objective(law, runs) / best - 1) < 1e-6
        for kind in held:
            drawn = resample.resample(law, runs, surface.refit, kind, draws, seed=index)
            low, high = resample.interval(quantities(drawn))
            truth = quantities(design.truth)
            held[kind].append((low <= truth) & (truth <= high))
            width[kind].append(high - low)
    result = {"global": f"{searched} of {SEARCHED}"}
    for kind in held:
        middle = np.median(width[kind], 0)
        rows = {
            "coverage": np.mean(held[kind], 0),
            "width": middle,
            "ratio": middle / spread(fits),
            "efficient": middle / spread(efficient),
        }
        result[kind] = {
            quantity: {key: round(float(values[i]), 4) for key, values in rows.items()}
            for i, quantity in enumerate(QUANTITIES)
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    start = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        jobs = {
            name: pool.submit(measure, name, flags.repeats, flags.draws, flags.seed + i)
            for i, name in enumerate(DESIGNS)
        }
        designs = {name: job.result() for name, job in jobs.items()}
    for name, found in designs.items():
        for kind in (resample.PARAMETRIC, resample.CASE):
            for quantity, row in found[kind].items():
                print(f"{name:9} {kind:10} {quantity:8}", *(f"{k} {v:.3f}" for k, v in row.items()))
    record.write(
        "coverage",
        {
            "environment": record.environment("numpy", "scipy"),
            "repeats": flags.repeats,
            "draws": flags.draws,
            "seed": flags.seed,
            "delta": surface.DELTA,
            "runs": len(BUDGETS) * len(SIZES),
            "seconds": round(time.perf_counter() - start, 1),
            "designs": designs,
        },
    )


if __name__ == "__main__":
    main()
