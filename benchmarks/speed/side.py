"""A module of this folder in a process of its own: it compiles when it is asked first, and is timed then."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.speed.rows import ROOT

PATIENCE = 20.0  # seconds that a process has to end


def backend() -> str:
    """This machine's, in jax's words. Asked in a process of its own: one that has met the device keeps its
    memory, and does not hear of flags that are set later."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


class Side:
    """cache: a directory for what the module compiles; memory: the share of a GPU's that jax may take on our
    side; on any other, the roof's, it has little."""

    def __init__(self, module: str, *arguments: str, cache: str, memory: float = 0.0) -> None:
        self._command = [sys.executable, "-m", f"benchmarks.speed.{module}", *arguments]
        share = str(memory if module == "ours" else 0.05)
        own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": share, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
        # Programs for little memory are others, which jax does not tell apart.
        own |= {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax {share}"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=os.environ | own, **pipes)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        """Ends the process, which reads lines until there are no more; by force if another has failed, or if
        it takes long: what was measured is not lost for it."""
        with contextlib.suppress(OSError):  # what it has not read
            self._process.stdin.close()
        try:
            self._process.wait(0 if failed else PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def answer(self) -> dict[str, Any]:
        """What the module says next: first that it is there; then what it has done after each ``ask``.

        Raises RuntimeError with the end of its standard error where it ends instead.
        """
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        raise RuntimeError(f"{' '.join(self._command)} failed:\n{self._errors.read()[-2000:]}")

    def ask(self) -> dict[str, Any]:
        """Lets it compile, or afterwards measure once. Raises as ``answer`` does."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; why, answer tells
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.answer()
