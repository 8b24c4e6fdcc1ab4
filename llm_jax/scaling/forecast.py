"""A forecast: what a law says of a run before it starts, and later what came of it.

The file is dated, carries the hash of its own content and of the law's file, and is never written twice, so
that nobody can have looked first. Its interval joins three things, as independent: how far resampled fits
scatter, how far the method was off in the backtest (either way, whichever way that was), and how far single
runs lie from the fit. The first alone measures noise, not a wrong form.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling import backtest, study, table
from llm_jax.scaling.laws.methods import Law
from llm_jax.training import metrics
from llm_jax.training.rundir import RunDirectory

LEVEL = 0.9
DRAWS = 20_000
FEW = 3  # trials of a method, with fewer of which the misses of all methods stand in for its own


@dataclass(frozen=True)
class Forecast:
    """made: date and time, UTC; law: the sha256 of its file. loss, low, high: nats a token, of a run of so
    much compute; params and tokens: its own, or the best split. level: of the interval."""

    made: str
    law: str
    method: str
    flops: float
    params: float
    tokens: float
    loss: float
    low: float
    high: float
    level: float = LEVEL


def foretell(
    path: Path,
    flops: float | None,
    params: float | None = None,
    tokens: float | None = None,
    method: str = "",
) -> Forecast:
    """Of the best run of ``flops``, or of one of params and tokens, which need not be the best. path: a
    law.json; method: "" = whose backtest was best at this question.

    Raises UserError where no method can answer, and for one that is not in the file.
    """
    content = study.read(path)
    kinds = (backtest.RUNS,) if flops is None else (backtest.FRONTIER, backtest.RUNS)
    kind = next((kind for kind in kinds if kind in content["chosen"]), kinds[0])
    method = method or content["chosen"].get(kind, "")
    if method not in content["methods"]:
        why = f"no method {method!r}" if method else "its backtest could judge no method"
        raise UserError(f"{path}: {why}; name one by --method: {', '.join(content['methods'])}")
    entry = content["methods"][method]
    law, resampled = study.law_of(entry)
    if flops is None and not hasattr(law, "loss"):
        raise UserError(f"{method} is of the best run of a budget alone; give --compute")
    if flops is None:
        flops = law.flops_per * params * tokens
    if params is None:
        params, tokens = map(float, law.optimum(flops))
    loss = float(predict(law, flops, params, tokens))
    drawn = np.array([loss]) if resampled is None else predict(resampled, flops, params, tokens)
    spread = interval(drawn, loss, misses(content["backtest"], method, kind), entry["residual"])
    return Forecast(now(), storage.content_hash(path), method, flops, params, tokens, loss, *spread)


def predict(law: Law, flops: float, params: float, tokens: float) -> np.ndarray:
    """Nats a token, [] or [repeats], of a run: of itself where the law has losses of any, else of the best
    run of its compute."""
    return np.asarray(law.loss(params, tokens) if hasattr(law, "loss") else law.frontier(flops))


def misses(trials: list[dict[str, Any]], method: str, kind: str) -> np.ndarray:
    """Relative errors of a method's trials, or of all methods' where it has few."""
    of_kind = [trial for trial in trials if trial["kind"] == kind]
    own = [trial["error"] for trial in of_kind if trial["method"] == method]
    return np.array(own if len(own) >= FEW else [trial["error"] for trial in of_kind])


def interval(
    resampled: np.ndarray, loss: float, misses: np.ndarray, residual: float, level: float = LEVEL
) -> tuple[float, float]:
    """(low, high). resampled: forecasts [repeats] of resampled fits; misses: relative errors of the
    backtest; residual: standard deviation of a run's log loss about the fit."""
    draw = np.random.default_rng(0)
    spread = np.log(resampled[np.isfinite(resampled)] / loss)
    total = draw.choice(spread, DRAWS) + draw.normal(0.0, residual, DRAWS)
    if len(misses):
        total += draw.choice(misses, DRAWS) * draw.choice([-1.0, 1.0], DRAWS)
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    return loss * float(np.exp(low)), loss * float(np.exp(high))


def write(path: Path, forecast: Forecast) -> None:
    """Raises UserError where there is one already."""
    if path.exists():
        raise UserError(f"{path} is a forecast already, which must not change; give another --out")
    storage.write_sealed(path, dataclasses.asdict(forecast))


def read(path: Path) -> Forecast:
    """Raises UserError for a file that is missing or was changed."""
    return Forecast(**storage.read_sealed(path, "make another forecast"))


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def score(forecast: Forecast, loss: float, flops: float | None = None) -> dict[str, Any]:
    """What came of it. loss, flops: of the run. Raises UserError for a run of another size, by more than a
    twentieth of the compute: the forecast says nothing of it."""
    if flops and abs(np.log(flops / forecast.flops)) > 0.05:
        raise UserError(f"the run had {flops:.4g} FLOPs, the forecast is of {forecast.flops:.4g}")
    return {
        "predicted": forecast.loss,
        "low": forecast.low,
        "high": forecast.high,
        "seen": loss,
        "error": forecast.loss / loss - 1.0,
        "inside": bool(forecast.low <= loss <= forecast.high),
    }


def score_run(forecast: Forecast, place: str) -> dict[str, Any]:
    """place: a run's directory, or the loss itself. Raises UserError for a directory that holds no run."""
    try:
        return score(forecast, float(place))
    except ValueError:
        pass
    run = RunDirectory(storage.path(place))
    if not run.config.exists():
        raise UserError(f"--score={place} is neither a number nor a run's directory")
    story = metrics.read(run.metrics)
    loss, flops = table.losses(story)["loss"], table.work(run.stored(), story)["training_flops"]
    if loss is None:
        raise UserError(f"--score={place}: the run has no evaluation yet")
    return score(forecast, loss, flops)
