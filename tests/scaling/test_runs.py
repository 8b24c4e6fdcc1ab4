"""Tables of runs: what is read, what is derived, what is refused."""

import json

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.scaling import runs

ROWS = [{"size": "s", "p": 1e6, "t": 2e7, "c4": 3.5}, {"size": "l", "p": 4e6, "t": 8e7, "c4": 3.0}]


@pytest.fixture
def table(tmp_path):
    lines = [",".join(ROWS[0]), *(",".join(str(value) for value in row.values()) for row in ROWS)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "t.csv"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_named_columns_and_the_rest(table, suffix):
    found = runs.read(table.with_suffix(suffix), {"N": "p", "D": "t", "loss": "c4"})
    np.testing.assert_allclose(found.flops, 6 * found.params * found.tokens)
    assert found.columns["size"].tolist() == ["s", "l"] and found.columns["c4"].tolist() == [3.5, 3.0]
    again = runs.read(table.with_suffix(suffix), {"N": "p", "C": "t", "loss": "c4"})
    np.testing.assert_allclose(6 * again.params * again.tokens, again.flops)


def test_parts(table):
    found = runs.read(table, {"N": "p", "D": "t", "loss": "c4"})
    assert found.without_highest(1).params.tolist() == [4e6]
    assert found.up_to(found.flops[0]).columns["size"].tolist() == ["s"]


def test_conditions(table):
    found = runs.read(table, {"N": "p", "D": "t", "loss": "c4"})
    assert found.where("size=l").params.tolist() == [4e6]
    assert found.where("p<2e6,c4>3.2").columns["size"].tolist() == ["s"]
    for bad, said in (
        ("c4>9", "no run has"),
        ("c5=1", "no column 'c5'"),
        ("c4", "write COLUMN"),
        ("size<l", "numbers"),
    ):
        with pytest.raises(UserError, match=said):
            found.where(bad)


@pytest.mark.parametrize(
    "columns, said",
    [
        ({"N": "nope", "D": "t", "loss": "c4"}, "no column 'nope'"),
        ({"N": "p", "loss": "c4"}, "name its columns"),
        ({"M": "p", "D": "t", "loss": "c4"}, "'M' is none of"),
        ({"N": "size", "D": "t", "loss": "c4"}, "size of row 1 is 's'"),
        (None, "name its columns"),
    ],
)
def test_bad_tables(table, columns, said):
    with pytest.raises(UserError, match=said):
        runs.read(table, columns)


def test_a_sweeps_own_table_leaves_out_what_is_not_finished(tmp_path):
    row = {"status": "finished", "parameters": 10, "tokens": 5, "training_flops": 350.0, "loss": 2.0}
    path = tmp_path / "table.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"status": "failed", "loss": None}) + "\n")
    assert runs.read(path).flops.tolist() == [350.0]


def test_a_missing_file_and_broken_lines(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        runs.read(tmp_path / "none.csv")
    (tmp_path / "x.jsonl").write_text("{")
    with pytest.raises(UserError, match="not JSON lines"):
        runs.read(tmp_path / "x.jsonl")
