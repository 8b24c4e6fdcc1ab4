"""The speed harness: what is compared with what, what is written down, and what becomes of failures."""

import dataclasses
import json

import pytest

from benchmarks.speed import kernels, run, table, tune
from benchmarks.speed.choice import Choice
from benchmarks.speed.rows import ROWS, shape
from benchmarks.speed.side import Side
from llm_jax.training import experiment


def measured(ours, **torch):
    """What sides measured in three rounds, by the milliseconds of each; torch: {mode: milliseconds}."""
    common = {"first_seconds": 1.0, "peak_bytes": 2e9}
    own = {"devices": 2, "device": "cpu", "choice": {}, "loader_ms": [3.0]}
    found = {"llm_jax": [{"ms": [ms]} | common | own for ms in ours]}
    found |= {f"torch {mode}": [{"ms": [ms]} | common for ms in rounds] for mode, rounds in torch.items()}
    return found | {"roof of jax": [{"tflops": 0.1}] * 3, "roof of torch": [{"tflops": 0.2}] * 3}


@pytest.fixture(scope="module")
def small():
    e = ROWS["shakespeare_cpu"].experiment("python:docs", tiny=True)
    return experiment.complete(e, 256)


def test_ratios_are_of_turns_of_one_round(small):
    """The machine is four times as slow in the second round, for both; by the medians of all, 3."""
    found = measured([10, 40, 10], eager=[20, 80, 30], default=[40, 40, 40])
    report = run.report(small, found)
    assert report["best_torch"] == "torch eager" and report["ratio_of_each_round"] == [2.0, 2.0, 3.0]
    assert report["ours_over_best_torch"] == 2.0
    ours, tokens = report["sides"]["llm_jax"], small.global_batch_size * small.data.sequence_length
    assert ours["ms"] == 10 and ours["tokens_per_second"] == 100 * tokens
    flops = tokens * small.flops_per_token() / 0.01
    assert ours["tflops"] == pytest.approx(flops / 1e12, abs=1e-3)
    assert ours["share_of_roof"] == pytest.approx(ours["tflops"] / 0.2, abs=1e-3)


def test_ours_alone_has_no_ratio(small):
    report = run.report(small, measured([10, 20, 11]))
    assert (report["best_torch"], report["ours_over_best_torch"]) == (None, None)


def test_a_dry_run_does_not_replace_what_hardware_gave(small, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULT", tmp_path / "speed.json")
    monkeypatch.setattr(run.record, "environment", lambda *_: {})
    monkeypatch.setattr(run.record, "write", lambda _, content: run.RESULT.write_text(json.dumps(content)))
    report = run.report(small, measured([10, 20, 11]))
    for dry in (True, False, True):
        run.keep("124m", {"dry_run": dry} | report)
    assert json.loads(run.RESULT.read_text())["rows"]["124m"]["dry_run"] is False


def test_rows_that_fill_a_gpu_run_alone():
    for name, row in ROWS.items():
        sides = [side.split()[0] for side in run.commands(name, "python:docs", True, row.peers)]
        assert sides == ["llm_jax", *row.peers, "roof", "roof"]
        assert row.memory <= 0.5 or not row.peers


def test_the_peer_is_tuned_where_its_torch_is_another(tmp_path, monkeypatch):
    known = {"torch": "2.11.0", "best": dataclasses.asdict(Choice(parts=4))}
    written = []

    def found_now(name, _):
        written.append(name)
        again = known | {"torch": "2.13.0", "best": dataclasses.asdict(Choice())}
        tune.RESULT.write_text(json.dumps({"rows": {name: again}}))

    monkeypatch.setattr(tune, "RESULT", tmp_path / "choices.json")
    monkeypatch.setattr(tune, "write", found_now)
    tune.RESULT.write_text(json.dumps({"rows": {"124m": known}}))
    for version, parts in (("2.11.0", 4), ("2.13.0", 1), ("2.13.0", 1)):
        monkeypatch.setattr(tune.importlib.metadata, "version", lambda _, it=version: it)
        assert tune.best("124m", "text")["parts"] == parts
    assert written == ["124m"]


def test_a_side_that_ends_says_why(tmp_path):
    with Side("missing", cache=str(tmp_path)) as side:
        for say in (side.answer, side.ask):
            with pytest.raises(RuntimeError, match="No module named"):
                say()


def test_the_table_says_what_does_not_hold(small):
    report = {
        "platform": "cpu",
        "dry_run": False,
        "cpu_count": 2,
        "processor": "P",
        "parity": {"float32": {}},
    }
    report |= run.report(small, measured([10, 20, 11], eager=[20, 40, 22]))
    report["shape"] = shape(ROWS["shakespeare_cpu"].experiment("python:docs", tiny=False))
    rows = {
        "shakespeare_cpu": report,
        "124m": report | {"dry_run": True, "platform": "gpu"},
        "bert_base": report | {"parity": None},
    }
    lines = table.table(rows).splitlines()
    assert "`shakespeare_cpu` |" in lines[2] and "2.00 times as fast" in lines[2]
    assert "not run yet on a GPU" in lines[3]
    assert "`bert_base`, of an earlier shape, parity not checked on it" in lines[4]
    assert [line.split()[1] for line in lines[8:]] == ["`shakespeare_cpu`", "`bert_base`"]


def test_the_readme_has_the_table_of_the_results():
    rows = json.loads(run.RESULT.read_text())["rows"]
    assert table.table(rows) in (run.ROOT / "README.md").read_text()


def test_kernels_are_added_up_by_step():
    """Of a trace of two steps: what a GPU's streams did, no matter what the host's threads did."""
    gpu, host = {"pid": 1, "tid": 7}, {"pid": 2, "tid": 7}
    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "/device:GPU:0"}} | gpu,
        {"ph": "M", "name": "process_name", "args": {"name": "/host:CPU"}} | host,
        {"ph": "M", "name": "thread_name", "args": {"name": "Stream #7(compute)"}} | gpu,
        {"ph": "M", "name": "thread_name", "args": {"name": "Stream #7(compute)"}} | host,
        {"ph": "X", "name": "long", "dur": 4000.0} | gpu,
        {"ph": "X", "name": "short", "dur": 500.0} | gpu,
        {"ph": "X", "name": "short", "dur": 500.0} | gpu,
        {"ph": "X", "name": "python", "dur": 9000.0} | host,
    ]
    assert kernels.totals(events, 2) == {"long": (2.0, 0.5), "short": (0.5, 1.0)}
    assert list(kernels.totals(events, 2)) == ["long", "short"]
