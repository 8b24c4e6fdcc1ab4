"""Laws of further columns: only those that are asked for, each with its own reason where it fails."""

import dataclasses

import numpy as np
import pytest
from tables import TRUTH, isoflop_runs

from llm_jax.scaling.further import further
from llm_jax.scaling.laws import repeated


def with_columns(runs, **columns):
    return dataclasses.replace(runs, columns=columns)


def test_nothing_is_asked_for():
    assert further(isoflop_runs(), {"N": "params"}) == {}
    assert further(isoflop_runs(), {"lr": "lr"}) == {}  # a rate without a batch


def test_what_repetition_is_worth():
    runs = isoflop_runs()
    unique = np.where(np.arange(len(runs)) % 2, runs.tokens, runs.tokens / 20)
    truth = repeated.of(TRUTH, R_D=9.0)
    runs = with_columns(
        dataclasses.replace(runs, loss=truth.loss(runs.params, runs.tokens, unique)), u=unique
    )
    found = further(runs, {"unique": "u"})["repeated"]
    assert found["R_D"] == pytest.approx(9.0, rel=0.05)


def test_rates_and_batches():
    runs = isoflop_runs(sizes=(0.5, 1.0, 2.0))
    rates = np.array([0.5, 0.7, 1.0, 1.4, 2.0])
    best = 0.01 * (runs.params / 1e7) ** -0.4
    wide = {
        f.name: np.repeat(getattr(runs, f.name), 5) for f in dataclasses.fields(runs) if f.name != "columns"
    }
    lr = np.repeat(best, 5) * np.tile(rates, len(runs))
    wide["loss"] = wide["loss"] * np.exp(0.05 * np.log(lr / np.repeat(best, 5)) ** 2)
    table = type(runs)(**wide, columns={"lr": lr, "b": np.full(len(lr), 1e5)})
    found = further(table, {"lr": "lr", "batch": "b"})["tuning"]
    assert found["lr"]["params"] == pytest.approx(-0.4, abs=1e-3)


def test_accuracies_or_why_there_is_no_law():
    runs = isoflop_runs()
    accuracy = 0.25 + 0.7 / (1 + np.exp(4 * (runs.loss - 2.3)))
    found = further(with_columns(runs, acc=accuracy), {"accuracy": "acc"})["downstream"]
    assert found["middle"] == pytest.approx(2.3, abs=0.05) and "of_the_metric" in found["emergence"]
    flat = further(with_columns(runs, acc=np.full(len(runs), 0.5)), {"accuracy": "acc"})["downstream"]
    assert "different loss and accuracy" in flat["failed"]
