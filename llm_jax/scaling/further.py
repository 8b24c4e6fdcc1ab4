"""What a table says beside its losses by size and compute, where it has the columns: repeated text, learning
rates and batches, accuracies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.errors import UserError
from llm_jax.scaling.laws import downstream, repeated, surface, tuning
from llm_jax.scaling.runs import Runs


def further(runs: Runs, columns: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """{law: its constants, or ``failed``: why there are none}, for the laws whose columns are named.

    columns: ``unique`` (unique tokens) for repeated text; ``lr`` and ``batch`` (tokens a step) for their
    laws; ``accuracy`` of a task for its link to the loss, and whether the measure makes it jump.
    """
    wanted = {
        "repeated": ({"unique"}, _repeated),
        "tuning": ({"lr", "batch"}, _tuning),
        "downstream": ({"accuracy"}, _downstream),
    }
    found = {}
    for name, (needed, fit) in wanted.items():
        if needed <= columns.keys():
            try:
                found[name] = fit(runs, columns)
            except UserError as error:
                found[name] = {"failed": str(error)}
    return found


def _repeated(runs: Runs, columns: Mapping[str, str]) -> dict[str, Any]:
    """The runs that repeat nothing give the surface, the others what repetition is worth."""
    once = runs.tokens <= runs.columns[columns["unique"]]
    return vars(repeated.fit(runs, surface.fit_projected(runs.take(once)), columns["unique"]))


def _tuning(runs: Runs, columns: Mapping[str, str]) -> dict[str, Any]:
    rule = tuning.fit(runs, columns["lr"], columns["batch"])
    return dataclasses.asdict(rule)


def _downstream(runs: Runs, columns: Mapping[str, str]) -> dict[str, Any]:
    accuracy = runs.columns[columns["accuracy"]]
    link = downstream.fit(runs.loss, accuracy)
    emergence = downstream.emergence(runs.flops, runs.loss, accuracy, link.accuracy)
    return {**vars(link), "emergence": {**vars(emergence), "of_the_metric": emergence.of_the_metric}}
