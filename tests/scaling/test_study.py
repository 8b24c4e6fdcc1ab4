"""All laws of a table: what is written, and that a reader gets the same laws back."""

import json

import numpy as np
import pytest
from tables import TRUTH, isoflop_runs

from llm_jax.errors import UserError
from llm_jax.scaling import shown, study
from llm_jax.scaling.laws.surface import Surface

NAMES = ("projected", "tied", "frontier", "envelope")


@pytest.fixture(scope="module")
def found():
    runs = isoflop_runs(noise=0.002)
    columns = {"parameters": 1.3 * runs.params, "matmul_parameters": np.full(len(runs), np.nan)}
    runs = type(runs)(runs.params, runs.tokens, runs.flops, runs.loss, columns)
    return json.loads(json.dumps(study.study(runs, NAMES, repeats=50)))


def test_methods_have_constants_intervals_and_a_backtest(found):
    entry = found["methods"]["projected"]
    for name in ("E", "A", "B", "alpha", "beta", "a"):
        low, high = entry["intervals"][name]
        assert low < entry[name] < high
    assert entry["residual"] == pytest.approx(0.002, rel=0.5) and entry["objective"] > 0
    assert set(entry["backtest"]) == {"runs", "frontier"}
    assert set(found["methods"]["frontier"]["backtest"]) == {"frontier"}
    assert found["chosen"]["runs"] in ("projected", "tied")
    assert "needs a column 'run_name'" in found["failed"]["envelope"]
    assert len(found["budgets"]) == 4 and len(found["backtest"]) > 10


def test_laws_come_back_as_they_were(found):
    law, drawn = study.law_of(found["methods"]["projected"])
    assert isinstance(law, Surface) and found["methods"]["projected"]["E"] == law.E
    assert drawn.frontier(1e17).shape == (50,)
    assert np.median(drawn.frontier(1e17)) == pytest.approx(float(TRUTH.frontier(1e17)), rel=0.02)
    with pytest.raises(UserError, match="no law of a best run has the constants F"):
        study.law_of({"F": 1.0})


def test_one_thing_at_a_time_is_done_otherwise(found):
    rows = {row["what"]: row for row in found["sensitivity"]}
    assert "N: all" in rows and "N: of products" not in rows  # a column with gaps says nothing
    assert rows["N: all"]["alpha"] == pytest.approx(rows["as fitted"]["alpha"], rel=1e-3)
    assert rows["N: all"]["A"] > 1.05 * rows["as fitted"]["A"]
    assert {"C = 6 N D", "delta 1", "without the 5 highest"} <= rows.keys() | {"C = 6 N D"}


def test_it_can_be_read(found):
    table = {"runs": 20}
    text = "\n".join(shown.study_lines({"table": table} | found))
    assert f"{found['methods']['projected']['alpha']:.6g}" in text  # six digits
    assert "envelope: not fitted" in text and "for the best loss of a budget: " in text


def test_where_nothing_can_be_fitted_each_reason_is_said(tmp_path):
    few = isoflop_runs(budgets=np.array([1e15]), sizes=(1.0, 2.0))
    with pytest.raises(UserError, match=r"no law can be fitted: .*2 runs cannot tell them.*isoFLOP"):
        study.study(few, ("tied", "frontier"))
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "none.json"):
        with pytest.raises(UserError, match=name):
            study.read(tmp_path / name)
