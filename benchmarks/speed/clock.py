"""How a step is timed, the same on every side."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 2  # groups after the first, which compiles


def measure(group: Callable[[], Any], size: int, steps: int) -> dict[str, Any]:
    """Times ``steps`` steps in groups of ``size``; a group returns when the last of its steps is done.

    {first_seconds: of the first group, compilation in it; ms: milliseconds a step, one number a group}.
    """
    start = time.perf_counter()
    group()
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        group()
    ms = []
    for _ in range(max(steps // size, 1)):
        start = time.perf_counter()
        group()
        ms.append(1000 * (time.perf_counter() - start) / size)
    return {"first_seconds": first, "ms": ms}


def peak_memory() -> int:
    """Bytes of main memory that this process has had at once."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give(result: dict[str, Any]) -> None:
    """To the process that started this one: the last line of its output."""
    print(json.dumps(result), flush=True)
