"""How a step is timed, the same on every side."""

from __future__ import annotations

import contextlib
import fcntl
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WARM_UP = 2  # groups after the first, which compiles


def measure(group: Callable[[], Any], size: int, steps: int) -> dict[str, Any]:
    """Times ``steps`` steps in groups of ``size``; a group returns when the last of its steps is done.

    {first_seconds: of the first group, compilation in it; ms: milliseconds a step, one number a group}.
    """
    start = time.perf_counter()
    group()
    first, ms = time.perf_counter() - start, []
    with alone():
        for _ in range(WARM_UP):
            group()
        for _ in range(max(steps // size, 1)):
            start = time.perf_counter()
            group()
            ms.append(1000 * (time.perf_counter() - start) / size)
    return {"first_seconds": first, "ms": ms}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process of the machine at a time: others may compile meanwhile, and wait here with their steps."""
    with (Path(tempfile.gettempdir()) / "llm_jax_clock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def peak_memory() -> int:
    """Bytes of main memory that this process has had at once."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give(result: dict[str, Any]) -> None:
    """To the process that started this one: the last line of its output."""
    print(json.dumps(result), flush=True)
