"""A module of this folder in a process of its own: it compiles when it starts, and is timed when asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.speed.rows import ROOT


class Side:
    """cache: a directory for what the module compiles; memory: {module: the share of a GPU's that its jax may
    take}, little where it is not said."""

    def __init__(self, module: str, *arguments: str, cache: str, memory: Mapping[str, float]) -> None:
        self._command = [sys.executable, "-m", f"benchmarks.speed.{module}", *arguments]
        share = str(memory.get(module, 0.05))
        own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": share, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
        # Programs for little memory are others, which jax does not tell apart.
        own |= {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax {share}"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=os.environ | own, **pipes)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process: it reads lines until there are no more."""
        self._process.stdin.close()
        self._process.stdout.read()
        self._process.wait()
        self._errors.close()

    def answer(self) -> dict[str, Any]:
        """What the module says next: first, when it has compiled; then after each ``ask``.

        Raises RuntimeError with the end of its standard error where it ends instead.
        """
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        raise RuntimeError(f"{' '.join(self._command)} failed:\n{self._errors.read()[-2000:]}")

    def ask(self) -> dict[str, Any]:
        """Lets it measure once."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()
