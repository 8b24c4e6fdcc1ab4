"""The page of a scaling law, from a ladder whose runs follow a known surface."""

import dataclasses
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.report import law, law_charts, law_reader
from llm_jax.report.law_reader import read
from llm_jax.scaling import backtest, forecast, study
from llm_jax.scaling import runs as tables
from llm_jax.scaling.laws.surface import Surface

TRUTH = Surface(1.0, 60.0, 300.0, 0.33, 0.36)
COLUMNS = {"D": "tokens", "C": "training_flops", "loss": "loss"}
NAMES = ("tied", "frontier", "kaplan", "envelope")  # the fast ones, and one that cannot be fitted
VOID = {"meta"}


def rows_of(budgets, sizes):
    """Rows of a run table, noise 0.3%: of each budget, sizes around the true optimum."""
    noise = np.random.default_rng(0)
    for index, (flops, size) in enumerate((c, s) for c in budgets for s in sizes):
        params = size * float(TRUTH.optimum(flops)[0])
        loss = float(TRUTH.loss(params, flops / (6 * params)) * np.exp(0.003 * noise.standard_normal()))
        yield {
            "index": index,
            "status": "finished",
            "error": None,
            "overrides": {"model.model_dim": 16 * (index + 1)},
            "tokens": flops / (6 * params),
            "training_flops": flops,
            "optimizer": "muon<",
            "loss": loss,
        }


def write_law(directory, rows, names=NAMES):
    """runs/table.jsonl and law.json."""
    table = directory / "runs" / "table.jsonl"
    table.parent.mkdir(parents=True)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tables.read(table, COLUMNS)
    content = {"table": study.describe_table(table, found, COLUMNS, "all")}
    content |= study.study(found, names, repeats=30, horizon=3.5)
    if "tied" in content["methods"]:  # as fitted otherwise, which takes seconds
        tied = {
            key: value
            for key, value in content["methods"]["tied"].items()
            if key in (*"EABa", "alpha", "beta")
        }
        content["sensitivity"] = [
            {"what": w, **tied, "ahead": x} for w, x in (("as fitted", 2.0), ("delta 1", 2.1))
        ]
    (directory / "law.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A ladder from its runs to its score."""
    directory = tmp_path_factory.mktemp("ladders") / "steps"
    write_law(directory, rows_of((3e11, 1e12, 3e12), (0.35, 0.6, 1.0, 1.7, 3.0)))
    forecast.write(directory / "forecast.json", forecast.foretell(directory / "law.json", 9e12))
    held_out = next(rows_of((9e12,), (1.0,))) | {"loss": 3.070123}
    (directory / "held_out").mkdir()
    (directory / "held_out" / "table.jsonl").write_text(json.dumps(held_out) + "\n")
    scored = forecast.score(forecast.read(directory / "forecast.json"), held_out["loss"])
    (directory / "score.json").write_text(json.dumps(scored))
    return directory


@pytest.fixture
def ladder(whole, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(whole, tmp_path / "copy")


def test_the_page_is_whole_and_alone(whole):
    before = {path for path in whole.rglob("*") if path.is_file()}
    path = law.write(whole)
    assert {p for p in whole.rglob("*") if p.is_file()} - before == {path} == {whole / "report.html"}
    page = path.read_text()
    Balanced().check(page)
    for outside in ("<script", "http://", "https://", "<link", "<img", "src=", "url("):
        assert outside not in page
    assert page.count("<svg") == 7 and page.count('</svg><p class="sub">') == 7  # a sentence below each
    assert "muon&lt;" in page and "muon<" not in page
    assert "nan" not in page.split("<svg", 1)[1].split("<h2>Forecast")[0]  # of no coordinate


def test_it_holds_the_numbers(whole):
    page, found = law.page(read(whole)), read(whole)
    for entry in found.content["methods"].values():
        assert f"{entry['residual']:.3%}" in page
        for name in entry["intervals"]:
            for value in (entry[name], *entry["intervals"][name]):
                assert f"<td>{law.digits(value)}</td>" in page
    assert float(law.digits(1 / 3)) == pytest.approx(1 / 3, rel=1e-6) and law.digits(1.5e15) == "1.500000e+15"
    for number in (found.forecast.loss, found.forecast.low, found.forecast.high, 3.070123):
        assert f"{number:.6f}" in page
    assert f"{found.forecast.loss / 3.070123 - 1:+.3%}" in page
    for budget in found.budgets:
        assert law.digits(budget.params) in page
    assert "+5.00%" in page  # of the surface with another delta
    assert "not fitted: an envelope needs a column" in page
    assert page.count("<td>ladder</td>") == 15 and page.count("<td>held out</td>") == 1
    assert "status = finished" in page and "<th>overrides.model.model_dim</th>" in page


def test_the_verdict_names_the_least_miss(whole):
    content = read(whole).content
    first, second = law.verdict(read(whole)).split(". ")
    for sentence, kind in ((first, backtest.FRONTIER), (second, backtest.RUNS)):
        scores = {entry["backtest"].get(kind, 1.0): name for name, entry in content["methods"].items()}
        assert f"chose {scores[min(scores)]}:" in sentence and f"missed by {min(scores):.2%}" in sentence


def test_before_the_held_out_run(ladder):
    (ladder / "score.json").unlink()
    shutil.rmtree(ladder / "held_out")
    page = law.page(read(ladder))
    assert "still to come" in page and "<td>held out</td>" not in page and ">seen</text>" not in page
    (ladder / "forecast.json").unlink()
    assert "No forecast has been made" in law.page(read(ladder))


def test_a_law_that_was_changed_after_the_forecast(ladder):
    assert "NOT as it is now" not in law.page(read(ladder))
    (ladder / "law.json").write_text((ladder / "law.json").read_text() + "\n")
    assert "NOT as it is now" in law.page(read(ladder))


def test_a_law_alone(ladder):
    path = law.write_law(ladder / "law.json")
    assert path == ladder / "law.html"
    page = path.read_text()
    Balanced().check(page)
    assert "Forecast and score" not in page and "<th>params</th>" in page


def test_runs_without_budgets_or_trials(tmp_path):
    """Each of its own compute, too few to backtest: nothing to draw a parabola through, nothing chosen."""
    rows = [row for i in range(6) for row in rows_of((1e12 * 1.5**i,), (1 + 2 * (i % 2),))]
    write_law(tmp_path, rows, ("tied", "kaplan"))
    found = read(tmp_path)
    page = law.page(found)
    Balanced().check(page)
    assert found.budgets == [] and "by budget" not in page and "IsoFLOP minima" not in page
    assert "tied is shown without a judgement" in page and "None was possible" in page


def test_long_run_tables_are_cut():
    page = law.runs([{"index": i} for i in range(law.MOST_ROWS + 7)])
    assert page.count("<tr>") == law.MOST_ROWS + 1 and "7 more" in page


def test_what_is_no_law(ladder):
    content = json.loads((ladder / "law.json").read_text())
    del content["table"]["loss"]
    (ladder / "law.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no loss of its runs"):
        law.write(ladder)
    with pytest.raises(UserError, match="No such file"):
        law.write(ladder / "runs")


class Balanced(HTMLParser):
    """Every element is closed, in order."""

    def check(self, page):
        self.open = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# the charts' lines and points


def test_a_minimum_outside_the_sizes_is_a_ring(tmp_path):
    """Two budgets around the optimum, and one whose sizes are all larger."""
    rows = [*rows_of((3e11, 1e12), (0.35, 0.6, 1.0, 1.7, 3.0)), *rows_of((3e12,), (2.0, 3.0, 4.5, 7.0))]
    write_law(tmp_path, rows, ("frontier",))
    found = read(tmp_path)
    assert [b.interior for b in found.budgets] == [True, True, False]
    dots = [law_charts.lowest(found, budget, "red") for budget in found.budgets]
    assert [dot.hollow for dot in dots] == [False, False, True]
    for budget, dot in zip(found.budgets[:2], dots, strict=False):
        assert (dot.x, dot.y) == ([budget.params], [budget.loss])
    last = found.at(found.budgets[2])
    assert (*dots[2].x, *dots[2].y) == (last.params.min(), last.loss.min())  # a run, no extrapolation
    assert len(law_charts.minima(found, lambda dot: dot.y)) == 3
    page = law.page(found)
    assert page.split("</svg>")[0].count("<polyline") == 2  # no parabola
    assert "<td>NO</td>" in page and "no minimum among the sizes tried" in page


def test_lines_and_bands_reach_the_forecast(whole):
    found = read(whole)
    lines, bands = law_charts.laws(found, lambda law, flops: law.frontier(flops))
    assert {line.name for line in lines} == {*found.lines()} and len(bands) == 2
    for line, band in zip(lines, bands, strict=True):
        assert line.x[-1] > found.forecast.flops and line.colour == band.colour
        assert np.all(band.low < band.high)
        there = found.laws[line.name][1].frontier(line.x)
        assert np.mean((band.low <= there) & (there <= band.high)) == pytest.approx(0.9, abs=0.1)


def test_a_surface_stands_beside_a_frontier(whole):
    """Whichever is chosen."""
    found = read(whole)
    for chosen, other in (("tied", "frontier"), ("frontier", "tied"), ("kaplan", "frontier")):
        content = dict(found.content) | {"chosen": {backtest.FRONTIER: chosen, backtest.RUNS: "tied"}}
        assert dataclasses.replace(found, content=content).lines() == [chosen, other]


def test_without_a_choice_the_forecasts_method_is_drawn(whole):
    """One chosen for the loss of runs speaks for the best of a budget, as in forecast.foretell."""
    found = read(whole)
    only_runs = dataclasses.replace(
        found, content=dict(found.content) | {"chosen": {backtest.RUNS: "kaplan"}}
    )
    assert only_runs.method(backtest.FRONTIER) == "kaplan"
    none = dataclasses.replace(found, content=dict(found.content) | {"chosen": {}})
    assert none.method(backtest.FRONTIER) == none.method(backtest.RUNS) == "tied"


def test_trials_are_drawn_where_they_were(whole, monkeypatch):
    """In times of the compute fitted, in percent, methods a little beside each other."""
    seen = {}
    monkeypatch.setattr(law_charts.svg, "chart", lambda title, series, *_, **__: seen.update({title: series}))
    found = read(whole)
    law_charts.trials(found, backtest.RUNS)
    (series,) = seen.values()
    for name in ("tied", "kaplan"):
        line = next(line for line in series if line.name == name)
        own = [t for t in found.content["backtest"] if (t["method"], t["kind"]) == (name, backtest.RUNS)]
        assert line.y == pytest.approx([100 * (t["predicted"] / t["seen"] - 1) for t in own])
        assert line.x == pytest.approx([t["flops"] / t["origin"] for t in own], rel=0.05)
    assert not next(line for line in series if line.name == "frontier").x  # says nothing of single runs


def test_every_method_has_one_colour(whole):
    found = read(whole)
    assert len({law_charts.colour_of(found, name) for name in found.laws}) == len(found.laws) == 3


def test_a_reader_keeps_resamples_apart(whole):
    once, drawn = law_reader.read(whole).laws["tied"]
    assert np.ndim(once.E) == 0 and drawn.E.shape == (30,)
