"""The README is run: its research script, and the places it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def run(script, directory):
    """What a script prints, run as a user would: in a directory of its own, in a fresh process."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_research_script_runs(tmp_path):
    script = re.search(r"```python\n(import jax\n.*?)```", README, re.DOTALL).group(1)
    assert 15 <= len([line for line in script.splitlines() if line]) <= 25
    printed = run(script, tmp_path).splitlines()
    losses = [float(line.split()[1]) for line in printed if re.match(r"\d+ ", line)]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_a_block_is_changed_without_touching_the_package(tmp_path):
    script = re.search(r"```python\n(import jax\n[^`]*ACTIVATIONS.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in script.splitlines() if line]) <= 20
    lines = run(script, tmp_path).splitlines()[-2:]  # before them it tells of the data
    losses = {name: float(loss) for name, loss in (line.rsplit(" ", 1) for line in lines)}
    assert set(losses) == {"swiglu", "gated mish"} and len(set(losses.values())) == 2


def test_what_the_readme_names_is_there():
    rooms = "llm_jax|configs|scripts|tests|benchmarks|docs|requirements"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path


def test_no_file_names_a_machine_or_a_registry():
    """Nothing of the place where this was written is in it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in listed or []:
        path = ROOT / name
        if path.suffix in {".png", ".npz"} or name == "tests/test_readme.py" or not path.exists():
            continue
        text = path.read_text()
        for word in ("pythonhosted", "pypi.org", "/work/", "/root/", "--index-url"):
            assert word not in text, f"{name} names {word}"
