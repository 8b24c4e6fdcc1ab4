"""All laws of one table of runs, with intervals, backtest and what they hang on: what is written as law.json.

table        file, its sha256, columns, number of runs, the largest budget
methods      by name: the law's constants, ``a``, ``objective`` where it has one, ``residual`` (standard
             deviation of log losses about it), ``intervals`` (95%), ``backtest`` (mean |error| by kind),
             ``resamples`` of the constants
failed       by name: why a method could not be fitted
backtest     every trial; ``chosen`` by kind, the method of least error
budgets      the isoFLOP minima
sensitivity  the surface under other conventions, deltas and numbers of outliers
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling import backtest
from llm_jax.scaling.further import further
from llm_jax.scaling.laws import isoflop, resample, surface
from llm_jax.scaling.laws.methods import METHODS, Law, Method
from llm_jax.scaling.laws.power import Kaplan
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.runs import Runs

LEVEL = 0.95  # of intervals
KINDS = (Surface, isoflop.Frontier, Kaplan)  # laws that a file may hold
KEPT = 400  # resamples that are written, which is enough for 90% intervals of what a law foretells
AHEAD = 10.0  # times the largest budget: where sensitivity is shown

Say = Callable[[str], None]


def study(
    runs: Runs,
    names: tuple[str, ...] = tuple(METHODS),
    repeats: int = 1000,
    seed: int = 0,
    horizon: float = backtest.HORIZON,
    kind: str = resample.PARAMETRIC,
    columns: Mapping[str, str] = MappingProxyType({}),
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """What the docstring above lists, but for ``table``. repeats: of the bootstrap, 0 = none; kind: of it;
    columns: as further.py has them.

    Raises UserError where no method can be fitted, with each one's reason.
    """
    fitted, failed = {}, {}
    for name in names:
        say(f"fitting {name}")
        try:
            fitted[name] = fit(runs, METHODS[name], repeats, seed, kind)
        except UserError as error:
            failed[name] = str(error)
    if not fitted:
        raise UserError("no law can be fitted: " + "; ".join(failed.values()))
    say("backtest")
    trials = backtest.backtest(runs, {name: METHODS[name] for name in fitted}, horizon)
    scores = {kind: backtest.scores(trials, kind) for kind in (backtest.RUNS, backtest.FRONTIER)}
    for name, entry in fitted.items():
        entry["backtest"] = {kind: found[name] for kind, found in scores.items() if name in found}
    say("sensitivity")
    surfaces = {"surface", "projected"} & fitted.keys()
    return {
        "methods": fitted,
        "failed": failed,
        "chosen": {kind: min(found, key=found.__getitem__) for kind, found in scores.items() if found},
        "horizon": horizon,
        "largest": float(runs.flops.max()),
        "backtest": [{**dataclasses.asdict(t), "error": t.error} for t in trials],
        "budgets": [dataclasses.asdict(budget) for budget in isoflop.budgets(runs)],
        "sensitivity": sensitivity(runs) if surfaces else [],
        "further": further(runs, columns),
    }


def fit(runs: Runs, method: Method, repeats: int, seed: int, kind: str) -> dict[str, Any]:
    """The entry of one method, but for its backtest."""
    chosen = method.runs(runs)
    law = method.fit(chosen)
    entry: dict[str, Any] = {"about": method.about, "runs": len(chosen), **vars(law), "a": float(law.a)}
    if isinstance(law, Surface):
        entry["objective"] = surface.objective(law, chosen)
    entry["residual"] = residual(law, chosen)
    if repeats:
        drawn = resample.resample(law, chosen, method.refit, kind, repeats, seed, method.by)
        values = {**vars(drawn), "a": drawn.a}
        arrays = {name: value for name, value in values.items() if np.ndim(value)}
        entry["intervals"] = {name: list(resample.interval(v, LEVEL)) for name, v in arrays.items()}
        entry["resamples"] = {name: vars(drawn)[name][:KEPT].tolist() for name in arrays if name in vars(law)}
    return entry


def residual(law: Law, runs: Runs) -> float:
    """Standard deviation of log losses about a law; a frontier's are about the parabolas under it."""
    there = law.loss(runs.params, runs.tokens) if hasattr(law, "loss") else isoflop.fitted(runs)
    away = np.log(runs.loss / there)
    away = away[np.isfinite(away)]
    return float(np.sqrt(np.sum(away**2) / max(1, len(away) - len(dataclasses.fields(law)))))


def sensitivity(runs: Runs) -> list[dict[str, Any]]:
    """The surface as one thing at a time is done otherwise: what N counts, what C counts, Huber's delta, how
    many of the highest losses are left out. A row has its constants, ``a``, and the loss foretold of AHEAD
    times the largest budget. What the table cannot say is left out."""
    base = {"what": "as fitted", "runs": runs, "delta": surface.DELTA}
    cases = [base]
    for column, said in CONVENTIONS.items():
        if column in runs.columns and np.isfinite(runs.columns[column]).all():
            cases.append(
                base | {"what": said, "runs": dataclasses.replace(runs, params=runs.columns[column])}
            )
    nominal = dataclasses.replace(runs, flops=6.0 * runs.params * runs.tokens)
    if not np.allclose(nominal.flops, runs.flops, rtol=1e-3):
        cases.append(base | {"what": "C = 6 N D", "runs": nominal})
    cases += [base | {"what": f"delta {delta:g}", "delta": delta} for delta in (1e-4, 1e-2, 1.0)]
    for count in (1, 2, 5):
        cases.append(base | {"what": f"without the {count} highest", "runs": runs.without_highest(count)})
    rows = []
    for case in cases:
        try:
            law = surface.fit_projected(case["runs"], case["delta"])
        except UserError:  # too few are left
            continue
        ahead = float(law.frontier(AHEAD * runs.flops.max()))
        rows.append({"what": case["what"], **vars(law), "a": float(law.a), "ahead": ahead})
    return rows


CONVENTIONS = {
    "parameters": "N: all",
    "non_embedding_parameters": "N: without embeddings",
    "matmul_parameters": "N: of products",
}


def describe_table(path: Path, runs: Runs, columns: Mapping[str, str], kept: str) -> dict[str, Any]:
    """The ``table`` of a law.json. kept: which runs of the file, in words."""
    return {
        "file": path.name,
        "sha256": storage.content_hash(path),
        "columns": dict(columns),
        "runs": len(runs),
        "kept": kept,
        "params": runs.params.tolist(),
        "tokens": runs.tokens.tolist(),
        "flops": runs.flops.tolist(),
        "loss": runs.loss.tolist(),
    }


def read(path: Path) -> dict[str, Any]:
    """A law.json. Raises UserError for a file that is none."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content["methods"], dict):
            return content
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is not of scripts/fit_scaling_law.py --json")


def law_of(entry: Mapping[str, Any]) -> tuple[Law, Law | None]:
    """The law of a method's entry, and the same with its resamples, [repeats] each, where it has some.
    Raises UserError for an entry without the constants of any law."""
    for kind in KINDS:
        fields = dataclasses.fields(kind)
        if all(f.name in entry for f in fields if f.default is dataclasses.MISSING):
            law = kind(**{f.name: entry[f.name] for f in fields if f.name in entry})
            drawn = {name: np.array(values) for name, values in entry.get("resamples", {}).items()}
            return law, dataclasses.replace(law, **drawn) if drawn else None
    raise UserError(f"no law of a best run has the constants {', '.join(sorted(entry))}")
