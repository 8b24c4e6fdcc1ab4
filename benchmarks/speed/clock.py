"""How a step is timed, the same on every side."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 2  # groups


def serve(measure: Callable[[], dict[str, Any]], first: Callable[[], Any]) -> None:
    """Says that it is there. At the first line that comes in it calls ``first``, which compiles, and says how
    long it took; it measures at every other."""
    give({"ready": True})
    sys.stdin.readline()
    start = time.perf_counter()
    first()
    give({"first_seconds": time.perf_counter() - start})
    for _ in sys.stdin:
        give(measure())


def milliseconds(group: Callable[[], Any], size: int, steps: int) -> list[float]:
    """Those of a step, one number a group, of ``steps`` steps in groups of ``size``; a group returns when the
    last of its steps is done."""
    for _ in range(WARM_UP):
        group()
    ms = []
    for _ in range(max(steps // size, 1)):
        start = time.perf_counter()
        group()
        ms.append(1000 * (time.perf_counter() - start) / size)
    return ms


def peak_memory() -> int:
    """Bytes of main memory that this process has had at once."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give(result: dict[str, Any]) -> None:
    """To the process that started this one: a line of its output."""
    print(json.dumps(result), flush=True)
