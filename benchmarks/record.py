"""Results of benchmarks: JSON files in benchmarks/results/, with what they were measured on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _commit() -> str:
    """The full hash, with "-dirty" behind it when a tracked file differs from that commit. Results do not
    count: those of several benchmarks run one after another are all of one commit."""
    git = ["git", "-C", str(HERE)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "HEAD", "--quiet", "--", "..", ":!results"], capture_output=True)
    return (found or "unknown") + ("-dirty" if changed.returncode == 1 else "")


def _processor() -> str:
    """On Linux its name and the vendor's numbers of its kind, for clouds shorten names; else Python's."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.M))
    if len(found) < 3:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"


def environment(*packages: str) -> dict:
    """Versions, commit and machine; no paths, no host name."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
    }


def write(name: str, content: dict) -> None:
    """benchmarks/results/NAME.json."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path.relative_to(HERE.parent)}")
