"""Seconds for the whole grid of 4,500 starts and 4,000 resamples of each kind, on a table of 240 runs.

  python -m benchmarks.scaling.fit_speed [--rounds=3]

The table is made by a seed: 16 budgets of 15 sizes, a law like Chinchilla's, noise of 0.5%. ``reached``: how
many starts end within a millionth of the lowest objective. Best of --rounds, since what else runs on the
machine can only add; ``cpu`` is the processor time of both threads in that round. Writes
benchmarks/results/fit_speed.json.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks import record
from llm_jax.scaling.laws import resample, solver, surface
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import Runs

TRUTH = Surface(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
RESAMPLES = 4000


def table(seed: int = 0) -> Runs:
    flops = np.repeat(np.geomspace(1e18, 1e21, 16), 15)
    params = TRUTH.optimum(flops)[0] * np.tile(np.geomspace(1 / 8, 8, 15), 16)
    tokens = flops / (6 * params)
    noise = 0.005 * np.random.default_rng(seed).standard_normal(len(flops))
    return Runs(params, tokens, flops, TRUTH.loss(params, tokens) * np.exp(noise))


def timed(rounds: int, work):
    """Seconds and processor seconds of the fastest, and what it gave."""
    taken = []
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        found = work()
        taken.append((round(time.perf_counter() - start, 2), round(time.process_time() - cpu, 2)))
    return dict(zip(("seconds", "cpu"), min(taken), strict=True)), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    runs = table()
    times = {}
    times["grid"], (_, values) = timed(rounds, lambda: surface.solve_grid(runs))
    times["projection"], law = timed(rounds, lambda: surface.fit_projected(runs))
    for kind in (resample.CASE, resample.PARAMETRIC):
        drawn = (law, runs, surface.refit, kind, RESAMPLES)
        times[kind], _ = timed(rounds, lambda drawn=drawn: resample.resample(*drawn))
    result = {
        "runs": len(runs),
        "starts": len(values),
        "resamples": RESAMPLES,
        "threads": solver.THREADS,
        **times,
        "grid_and_case_seconds": round(times["grid"]["seconds"] + times[resample.CASE]["seconds"], 2),
        "reached": int(np.sum(values < values.min() * (1 + 1e-6))),
        "objective": float(values.min()),
        "projection_above": surface.objective(law, runs) / float(values.min()) - 1,
    }
    print(result)
    record.write("fit_speed", {"environment": record.environment("numpy", "scipy"), **result})


if __name__ == "__main__":
    main()
