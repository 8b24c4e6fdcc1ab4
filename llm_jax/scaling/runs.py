"""Finished runs as arrays: what a law is fitted to, from a sweep's own table or any CSV or JSON lines."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.errors import UserError

NAMES = {"N": "params", "D": "tokens", "C": "flops", "loss": "loss"}  # a flag's letter, a field of Runs
# Of a sweep's own table. What counts as N is a convention, which a law's exponents depend on.
OWN = {"N": "parameters", "D": "tokens", "C": "training_flops", "loss": "loss"}
FURTHER = ("unique", "lr", "batch", "accuracy")  # columns that further.py asks for by these names
FLOPS_PER = 6.0  # C = 6 N D, where C is not given (Kaplan et al. 2020, arXiv 2001.08361)


@dataclass(frozen=True)
class Runs:
    """Arrays [runs], float64. params: N; tokens: D; flops: C, of training; loss: nats a token. columns:
    every column of the table by its name, numbers as float64 (nan where there is none), text as it is."""

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, which: np.ndarray) -> Runs:
        """Some of them: a mask or indices."""
        arrays = {
            f.name: getattr(self, f.name)[which] for f in dataclasses.fields(self) if f.name != "columns"
        }
        return Runs(**arrays, columns={name: column[which] for name, column in self.columns.items()})

    def up_to(self, flops: float) -> Runs:
        """Those of at most so much compute (and a millionth, for what rounding has moved)."""
        return self.take(self.flops <= flops * (1 + 1e-6))

    def where(self, conditions: str) -> Runs:
        """Those for which all of ``COLUMN=TEXT``, ``COLUMN<NUMBER`` and ``COLUMN>NUMBER`` hold, joined by
        commas. Raises UserError for another form, an unknown column, and where none is left."""
        kept = np.ones(len(self), bool)
        for condition in filter(None, conditions.split(",")):
            kept &= self._holds(condition)
        if not kept.any():
            raise UserError(f"no run has {conditions}")
        return self.take(kept)

    def _holds(self, condition: str) -> np.ndarray:
        found = re.fullmatch(r"(.+?)([=<>])(.+)", condition)
        if not found:
            raise UserError(f"{condition!r}: write COLUMN=TEXT, COLUMN<NUMBER or COLUMN>NUMBER")
        name, sign, value = found.groups()
        if name not in self.columns:
            raise UserError(f"{condition!r}: there is no column {name!r}, but {', '.join(self.columns)}")
        column, number = self.columns[name], _number(value)
        if sign == "=":
            return column == (number if column.dtype == float else value)
        if column.dtype != float or math.isnan(number):
            raise UserError(f"{condition!r}: < and > need numbers")
        return column < number if sign == "<" else column > number

    def without_highest(self, count: int) -> Runs:
        """Without the ``count`` of highest loss, as Besiroglu et al. 2024 (arXiv 2404.10102) drop 5."""
        return self.take(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count]))


def read(path: Path, columns: Mapping[str, str] | None = None) -> Runs:
    """The runs of a table, CSV or JSON lines (.jsonl).

    columns: which of the file's are N, D, C and loss (and FURTHER); those of a sweep's table where it names
    none. Where one of N, D and C is missing it is found by C = 6 N D. Rows of a sweep that are not finished
    are left out.

    Raises UserError for a missing file or column, and for a value that is no positive number.
    """
    rows = read_rows(path)
    given = dict(columns or {})
    if unknown := given.keys() - {*NAMES, *FURTHER}:
        raise UserError(f"--columns: {min(unknown)!r} is none of {', '.join((*NAMES, *FURTHER))}")
    known = {key for row in rows for key in row}
    if missing := [column for column in given.values() if column not in known]:
        raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(sorted(known))}")
    wanted = {name: column for name, column in given.items() if name in NAMES}
    wanted = wanted or {name: column for name, column in OWN.items() if column in known}
    if "loss" not in wanted or len(wanted) < 3:
        raise UserError(f"{path}: name its columns: --columns=N=params,D=tokens,loss=final_loss")
    if "status" in known:
        rows = [row for row in rows if row["status"] == "finished"]
    arrays = {NAMES[name]: _numbers(path, rows, column) for name, column in wanted.items()}
    if "flops" not in arrays:
        arrays["flops"] = FLOPS_PER * arrays["params"] * arrays["tokens"]
    if "tokens" not in arrays:
        arrays["tokens"] = arrays["flops"] / (FLOPS_PER * arrays["params"])
    if "params" not in arrays:
        arrays["params"] = arrays["flops"] / (FLOPS_PER * arrays["tokens"])
    return Runs(**arrays, columns={key: _column([row.get(key) for row in rows]) for key in sorted(known)})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or .jsonl file as they are."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if path.suffix != ".jsonl":
        return list(csv.DictReader(text.splitlines()))
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON lines: {error}") from None


def _numbers(path: Path, rows: list[dict[str, Any]], column: str) -> np.ndarray:
    values = [_number(row.get(column)) for row in rows]
    for index, value in enumerate(values):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(
                f"{path}: {column} of row {index + 1} is {rows[index].get(column)!r}, not above 0"
            )
    return np.array(values)


def _column(values: list[Any]) -> np.ndarray:
    numbers = np.array([_number(value) for value in values])
    return numbers if np.isfinite(numbers).any() else np.array([str(value) for value in values])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
