"""Generating, reporting and the configs that ship."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from llm_jax import cli
from llm_jax.report import reader
from llm_jax.training import experiment, loop
from llm_jax.training.experiment import resolve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A decoder and an encoder after 40 steps."""
    root = tmp_path_factory.mktemp("runs")
    changes = {"steps": 40, "evaluation.every": 20, "checkpoint.every": 40, "samples.tokens": 5}
    for name in ("tiny_clm", "tiny_mlm"):
        config = experiment.override(cli.load_config(str(ROOT / "configs" / f"{name}.py")), changes)
        loop.run(resolve(config), root / name)
    return root


@pytest.fixture
def script(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_generate(runs, script):
    flags = ["--tokens=20", "--count=2", "--prompt=The "]
    code, out, _ = script("generate", f"--workdir={runs}/tiny_clm", *flags)
    assert code == 0 and out.count("--- sample") == 2 and out.count("\nThe ") == 2
    again = script("generate", f"--workdir={runs}/tiny_clm", *flags)[1]
    assert out == again
    assert out != script("generate", f"--workdir={runs}/tiny_clm", *flags, "--seed=1")[1]
    greedy = ["--temperature=0", "--tokens=80"]
    samples = script("generate", f"--workdir={runs}/tiny_clm", *flags[1:], *greedy)[1].split(
        "--- sample 2 ---"
    )
    assert samples[0].replace("--- sample 1 ---", "").strip("\n") == samples[1].strip("\n")


def test_fill_in(runs, script):
    code, out, _ = script(
        "generate", f"--workdir={runs}/tiny_mlm", "--prompt=th<mask> val<mask>e", "--best=2"
    )
    lines = out.splitlines()
    assert code == 0 and lines[0] == "th<mask> val<mask>e" and len(lines) == 4
    assert lines[1].startswith("th") and len(lines[1]) == len("the value")


def test_generate_says_what_is_wrong(runs, script, tmp_path):
    for flags, message in (
        ([f"--workdir={tmp_path}"], "holds no run with a checkpoint"),
        ([f"--workdir={runs}/tiny_mlm", "--prompt=the"], "has no blank; write <mask>"),
        ([f"--workdir={runs}/tiny_clm", "--prompt=t<mask>e"], "this model is a decoder"),
        ([f"--workdir={runs}/tiny_clm", "--top-p=2"], "top_p=2.0"),
    ):
        code, _, err = script("generate", *flags)
        assert code == 2 and message in err and "Traceback" not in err


def test_report(runs, script, tmp_path):
    code, out, _ = script("report", f"--workdir={runs}/tiny_clm", f"--jsonl={tmp_path}/story.jsonl")
    page = (runs / "tiny_clm" / "report.html").read_text()
    assert code == 0 and out.strip() == f"report: {runs}/tiny_clm/report.html"
    for part in ("<svg", "validation loss", "learning rate", "--- sample 1 ---", "model.model_dim"):
        assert part in page
    for outside in ("<script", "http://", "https://", "<link", "<img"):
        assert outside not in page
    story = [json.loads(line) for line in (tmp_path / "story.jsonl").read_text().splitlines()]
    assert story == reader.read(runs / "tiny_clm").story_without_time()
    assert {record["kind"] for record in story} == {"train", "evaluation"}
    assert not any("time" in record for record in story)
    code, out, _ = script("report", f"--workdir={runs}/tiny_clm", "--jsonl=-")
    assert [json.loads(line) for line in out.splitlines()] == story
    assert script("report", f"--workdir={tmp_path}")[0] == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_resolve_and_say_how_to_run(name, tmp_path):
    path = ROOT / "configs" / f"{name}.py"
    config = cli.load_config(str(path))
    (tmp_path / "text.txt").write_text("x")
    resolve(experiment.override(config, {"data.text": str(tmp_path / "text.txt")}))
    assert config.is_locked
    ways = f"configs/{name}.py", f"make {name}", f"--tier={name.removeprefix('ladder_')}"
    assert any(way in path.read_text() for way in ways)


def test_help_teaches(script):
    for name in ("train", "generate", "report"):
        code, out, _ = script(name, "--help")
        assert code == 0 and f"python scripts/{name}.py --" in out


def test_evaluate(runs, script, tmp_path):
    """The validation set as the run itself judged it; any text; one JSON object."""
    code, out, _ = script("evaluate", f"--workdir={runs}/tiny_clm", "--json")
    result = json.loads(out)["validation"]
    own = [r for r in reader.read(runs / "tiny_clm").story if r["kind"] == "evaluation"][-1]
    assert code == 0 and all(result[key] == own[key] for key in result)
    assert result["bits_per_byte"] > 0 and result["accuracy"] < result["top5_accuracy"] < 1
    (tmp_path / "easy.txt").write_text("e" * 2000)
    (tmp_path / "hard.txt").write_text("qxzj" * 500)
    losses = []
    for name in ("easy", "hard"):
        code, out, _ = script(
            "evaluate", f"--workdir={runs}/tiny_clm", f"--text={tmp_path}/{name}.txt", "--json"
        )
        values = json.loads(out)["text"]
        losses.append(values["loss"])
        assert code == 0 and values["targets"] == 2001  # EOS among them
        assert values["bits_per_byte"] == pytest.approx(values["loss"] / 0.6931472 * 2001 / 2000, rel=1e-6)
    assert losses[0] < losses[1]


def test_evaluate_an_encoder(runs, script):
    code, out, _ = script("evaluate", f"--workdir={runs}/tiny_mlm")
    assert code == 0 and out.startswith("validation: loss") and "top5_accuracy" in out
    assert "bits_per_byte" not in out
    assert script("evaluate", f"--workdir={runs}/tiny_mlm", "--set=test.nothing")[0] == 2


def test_compare(runs, script, tmp_path):
    flags = [f"--workdir={runs}/tiny_clm", f"--compare={runs}/tiny_mlm", f"--out={tmp_path}/both.html"]
    code, out, _ = script("report", *flags)
    page = (tmp_path / "both.html").read_text()
    assert code == 0 and out.strip() == f"report: {tmp_path}/both.html"
    assert "tiny_clm" in page and "tiny_mlm" in page and "objective.name" in page and page.count("<svg") == 4
    assert script("report", *flags[:2])[0] == 2
    assert script("report", flags[0], f"--out={tmp_path}/one.html")[1].strip().endswith("one.html")
    assert (tmp_path / "one.html").exists()
    assert script("report", flags[0], f"--compare={tmp_path}", flags[2])[0] == 2
