"""What the pages say, from stories written by hand."""

import json
import re

import pytest

from llm_jax import config as configs
from llm_jax.report import compare, html, reader, svg
from llm_jax.training.experiment import Experiment
from llm_jax.training.metrics import MetricsWriter

POINTS = re.compile(r'<polyline points="([^"]*)"')


@pytest.fixture
def make_run(tmp_path):
    def make(name, steps=40, drop=0.05, **changes):
        """A run whose training loss falls by ``drop`` a step from 4; validation is 0.5 above it."""
        path = tmp_path / name
        path.mkdir(parents=True)
        config = json.loads(configs.dumps(configs.to_dict(Experiment()))) | {"steps": steps} | changes
        content = {"fingerprint": "f" * 16, "data": "d" * 64, "config": config}
        (path / "config.json").write_text(json.dumps(content))
        (path / "samples.txt").write_text("<b>sample</b>")
        writer = MetricsWriter(path / "metrics")
        writer.write("start", 0)
        for step in range(1, steps + 1):
            timed = {"data_wait": 0.25, "process_bytes_peak": 2**30}
            timed |= {"seconds": 1.0, "tokens_per_second": 100.0} if step % 10 else {}
            values = {"loss": 4 - drop * step, "learning_rate": 1e-3}
            writer.write("train", step, values, timed if step % 5 == 0 else None)
            if step % 10 == 0:
                norms = {"blocks/0": 1.0 + step, "blocks/1": 2.0 + step, "embedding": 9.0}
                judged = {"loss": 4.5 - drop * step, "accuracy": 0.25, "param_norms": norms}
                writer.write("evaluation", step, {"set": "validation", **judged})
                writer.write("evaluation", step, {"set": "wiki", "loss": 7.0, "accuracy": 0.125})
        writer.close()
        return path

    return make


def test_sets_are_kept_apart(make_run):
    run = reader.read(make_run("a"))
    assert run.sets() == ["validation", "wiki"]
    assert run.series("evaluation", "loss")[1] == pytest.approx([4.0, 3.5, 3.0, 2.5])
    assert run.series("evaluation", "loss", "wiki")[1] == [7.0] * 4


def test_gap(make_run):
    """Against the mean of the 20 steps before, of which the line's is at their middle."""
    steps, gaps = reader.read(make_run("a")).gap()
    assert steps == [10, 20, 30, 40]
    assert gaps == pytest.approx([0.5 - 0.05 * 4.5, *[0.5 - 0.05 * 9.5] * 3])


def test_block_norms(make_run):
    run = reader.read(make_run("a"))
    assert run.block_norms("param_norms") == {s: [1.0 + s, 2.0 + s] for s in (10, 20, 30, 40)}
    lines = html.layer_lines(run, "param_norms", most=3)
    assert [line.name for line in lines] == ["step 10", "step 30", "step 40"]
    assert list(lines[0].x) == [0, 1] and list(lines[-1].y) == [41.0, 42.0]


def test_resources(make_run):
    assert html.resources(reader.read(make_run("a"))) == {
        "memory, peak": "1.00 GiB",
        "waited for data": "25.0%",
    }


def test_the_page_of_a_run(make_run):
    page = html.page(reader.read(make_run("a")))
    for part in ("generalisation gap", "parameter norm by layer", "learning rate", "wiki", "25.0%"):
        assert part in page
    assert "&lt;b&gt;sample" in page and "<b>sample" not in page
    alone(page)


def alone(page):
    for outside in ("<script", "http://", "https://", "<link", "<img", "src="):
        assert outside not in page


def test_runs_side_by_side(make_run, tmp_path):
    paths = [make_run("a"), make_run("b", steps=20, global_batch_size=64), make_run("more/a", seed=5)]
    page = compare.write(paths, tmp_path / "out.html").read_text()
    alone(page)
    named = compare.names([reader.read(path) for path in paths])
    assert list(named) == [str(paths[0]), "b", str(paths[2])]
    for column in ("validation loss", "wiki loss", "tokens", "2.5000", "3.5000"):
        assert column in page
    config = named["b"].config["config"]
    tokens = 20 * 64 * config["data"]["sequence_length"]
    assert compare.final(named["b"])["tokens"] == f"{tokens:,}" and f"<td>{tokens:,}</td>" in page
    assert page.count("<svg") == 4 and page.count(">tokens</text>") == 2
    flat = {name: html.flatten(run.config["config"]) for name, run in named.items()}
    keys = {key for column in compare.differing(flat).values() for key in column}
    assert keys == {"steps", "global_batch_size", "seed"}


def test_curves_over_tokens(make_run):
    """The same steps with four times the batch reach four times as far."""
    small, large = (reader.read(make_run(n, global_batch_size=b)) for n, b in (("s", 8), ("l", 32)))
    assert large.tokens_per_step == 4 * small.tokens_per_step == 32 * 64
    drawn = compare.charts({"s": small, "l": large}).split("</svg>")
    ends = [[float(p.split()[-1].split(",")[0]) - svg.LEFT for p in POINTS.findall(one)] for one in drawn]
    assert ends[0][0] == ends[0][1]  # over steps
    assert ends[1][1] == pytest.approx(4 * ends[1][0], abs=0.5)  # over tokens, from 0 on


def test_a_run_without_an_evaluation(make_run):
    run = reader.read(make_run("a", steps=5))
    assert compare.final(run)["validation loss"] == "-" and run.gap() == ([], [])
    assert "<svg" in html.page(run) and "<svg" in compare.page([run])


def test_long_legends_do_not_meet_the_title():
    lines = [svg.Series("a long name of a run", [0, 1], [i, i]) for i in range(6)]
    assert svg.chart("title", lines).count('y="18"') == 1  # the title alone
    assert svg.chart("title", lines[:1]).count('y="18"') == 2
