"""Shards made ahead of a run, and every byte of them checked."""

import runpy
import sys
from pathlib import Path

import pytest

from llm_jax import cli
from llm_jax.data.source import damage
from llm_jax.training import experiment
from llm_jax.training.program import Program

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "tiny_clm.py"


@pytest.fixture
def prepare_data(monkeypatch, capsys):
    """Runs scripts/prepare_data.py in this process; gives its exit code, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def made(tmp_path, prepare_data):
    """Two sources and a set."""
    for i, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        for j in range(20):
            (tmp_path / name / f"{j}.txt").write_text(f"text {i} {j}, " * 9)
    sources = ", ".join(f"{{'name': '{name}', 'text': ('{tmp_path / name}',)}}" for name in "ab")
    flags = [
        f"--config.data.sources=({sources})",
        "--config.data.validation_fraction=0.3",
        f"--config.evaluation.sets=({{'name': 'c', 'text': ('{tmp_path / 'c'}',)}},)",
    ]
    code, out, err = prepare_data(f"--config={CONFIG}", f"--output={tmp_path / 'data'}", *flags)
    assert code == 0, err
    return flags, out


def test_made_ahead_and_trained_on(made, tmp_path):
    flags, out = made
    assert "test.c: 20 documents" in out
    changes = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
    changes |= {"data.shards": str(tmp_path / "data")}
    config = experiment.resolve(experiment.override(cli.load_config(str(CONFIG)), changes))
    program = Program.prepare(config, tmp_path / "data", say=lambda _: None)
    assert program.batches[0].inputs.shape[-1] == config.data.sequence_length
    assert list(program.evaluate_all(program.init().params)) == [
        *("validation", "validation.a", "validation.b", "test.c")
    ]


def test_a_second_call_makes_nothing_but_missing_sets(made, tmp_path, prepare_data):
    flags, out = made
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    again = prepare_data(f"--config={CONFIG}", f"--output={tmp_path / 'data'}", *flags)
    assert again == (0, out, "")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == before
    more = f"--config.evaluation.sets=({{'name': 'd', 'text': ('{tmp_path / 'c'}',)}},)"
    code, new, _ = prepare_data(f"--config={CONFIG}", f"--output={tmp_path / 'data'}", *flags[:2], more)
    assert code == 0 and "test.d: 20 documents" in new and new.endswith(out.splitlines()[-1] + "\n")


def test_verify_says_that_all_is_well(made, tmp_path, prepare_data):
    code, out, err = prepare_data(f"--verify={tmp_path / 'data'}")
    assert code == 0 and err == "" and out == made[1] + "every byte is as it was written\n"


def test_verify_names_every_damaged_file(made, tmp_path, prepare_data):
    """Each file of the set alone, a bit flipped or the file gone; then all of them in one line."""
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert len(names) == 2 + 5 * 3
    for name in names:
        path = tmp_path / "data" / name
        good = path.read_bytes()
        path.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:] if len(good) > 20 else good[:-1])
        for _ in range(2):
            code, out, err = prepare_data(f"--verify={tmp_path / 'data'}")
            assert code == 2 and out == "" and name in err and err.count("\n") == 1
            path.unlink(missing_ok=True)
        path.write_bytes(good)
    assert damage(tmp_path / "data") == []
    for name in ("test.c.ends", "train.b.00000.tokens", "tokenizer.json"):
        (tmp_path / "data" / name).unlink()
    found = damage(tmp_path / "data")
    assert len(found) == 3
    assert prepare_data(f"--verify={tmp_path / 'data'}")[2] == f"error: {'; '.join(found)}\n"


def test_says_what_is_wrong(prepare_data, tmp_path):
    config, output = f"--config={CONFIG}", f"--output={tmp_path / 'data'}"
    for flags, message in (
        ([f"--verify={tmp_path}"], "header.json is missing"),
        ([config, output, "--config.data.text=gone"], "data.text=gone: no such file"),
        ([config, output, "--config.data.shards=elsewhere"], "leave --config.data.shards out"),
        ([config], "--config and --output are required"),
    ):
        code, out, err = prepare_data(*flags)
        assert code == 2 and message in err and out == "" and "Traceback" not in err
    assert not (tmp_path / "data").exists()


def test_help_teaches(prepare_data):
    code, out, _ = prepare_data("--help")
    assert code == 0 and "python scripts/prepare_data.py --config=" in out and "--verify=" in out
