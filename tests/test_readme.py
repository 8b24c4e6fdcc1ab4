"""The README is run: its research script, and the places it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_research_script_runs(tmp_path):
    """As a user would: in a directory of its own, in a fresh process."""
    script = re.search(r"```python\n(import jax\n.*?)```", README, re.DOTALL).group(1)
    assert 15 <= len([line for line in script.splitlines() if line]) <= 25
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines() if re.match(r"\d+ ", line)]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5


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
