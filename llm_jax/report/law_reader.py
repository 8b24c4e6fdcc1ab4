"""Reads what is known of a scaling law: a law.json, alone or in the directory of its ladder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.scaling import backtest, forecast, study
from llm_jax.scaling import runs as tables
from llm_jax.scaling.forecast import Forecast
from llm_jax.scaling.laws.isoflop import TOLERANCE, Budget, Frontier
from llm_jax.scaling.laws.methods import Law
from llm_jax.scaling.runs import Runs

ARRAYS = ("params", "tokens", "flops", "loss")


@dataclass(frozen=True)
class Findings:
    """content: of law.json; sha256: of that file; runs: those fitted; budgets: with a parabola.

    laws: by method, the law and the same of its resamples, None without any. rows: of the run table, "of"
    saying what each is part of. forecast, score: None where there is none yet. ladder: whether there is
    more than a law.json.
    """

    name: str
    content: Mapping[str, Any]
    sha256: str
    runs: Runs
    budgets: list[Budget]
    laws: dict[str, tuple[Law, Law | None]]
    rows: list[dict[str, Any]]
    ladder: bool = False
    forecast: Forecast | None = None
    score: Mapping[str, Any] | None = None

    def method(self, kind: str) -> str | None:
        """That the backtest chose for a question, or else the first that can answer it, None if none can.
        For the best of a budget one chosen for all runs goes before the first, as it does in a forecast."""
        if kind == backtest.RUNS:
            able = [name for name, (law, _) in self.laws.items() if hasattr(law, "loss")]
        else:
            able = [self.content["chosen"].get(backtest.RUNS), *self.laws]
        return self.content["chosen"].get(kind) or next(filter(None, able), None)

    def lines(self) -> list[str]:
        """Methods to draw over compute: the one for the best loss of a budget, and beside it one of the other
        kind, a surface beside a frontier."""
        chosen = self.method(backtest.FRONTIER)
        frontiers = [name for name, (law, _) in self.laws.items() if isinstance(law, Frontier)]
        other = self.method(backtest.RUNS) if chosen in frontiers else next(iter(frontiers), None)
        return [chosen, other] if other else [chosen]

    def at(self, budget: Budget) -> Runs:
        """The runs of one budget."""
        return self.runs.take(np.abs(np.log(self.runs.flops / budget.flops)) <= 2 * TOLERANCE)


def read(directory: Path) -> Findings:
    """Of a ladder's directory. Raises UserError where it has no law.json, and for damaged files."""
    found = read_law(directory / "law.json", directory.name)
    parts = {"ladder": directory / "runs", "held out": directory / "held_out"}
    rows = [{"of": part} | row for part, place in parts.items() for row in _rows(place / "table.jsonl")]
    made, scored = directory / "forecast.json", directory / "score.json"
    return Findings(
        **vars(found)
        | {
            "rows": rows or found.rows,
            "ladder": True,
            "forecast": forecast.read(made) if made.exists() else None,
            "score": json.loads(scored.read_text()) if scored.exists() else None,
        }
    )


def read_law(path: Path, name: str = "") -> Findings:
    """Of a law.json alone. Raises UserError for a file that is none, or that says nothing of its runs."""
    content = study.read(path)
    table = content.get("table", {})
    if missing := [name for name in ARRAYS if name not in table]:
        raise UserError(
            f"{path} has no {missing[0]} of its runs; write it again by scripts/fit_scaling_law.py --json"
        )
    runs = Runs(*(np.array(table[name], float) for name in ARRAYS))
    rows = [dict(zip(ARRAYS, row, strict=True)) for row in zip(*(table[a] for a in ARRAYS), strict=True)]
    return Findings(
        name=name or path.stem,
        content=content,
        sha256=storage.content_hash(path),
        runs=runs,
        budgets=[Budget(**b) for b in content["budgets"] if b["points"] >= 3],
        laws={method: study.law_of(entry) for method, entry in content["methods"].items()},
        rows=rows,
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return tables.read_rows(path) if path.exists() else []
