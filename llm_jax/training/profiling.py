"""A trace of some steps, and how much memory they take."""

from __future__ import annotations

import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

from llm_jax import storage


class Profiler:
    """Traces the dispatches from one step to another with jax.profiler (XProf and TensorBoard read it)."""

    def __init__(self, directory: Path, steps: tuple[int, int]) -> None:
        """steps: the first, and the one to stop before; (0, 0) traces nothing."""
        self._directory, (self._start, self._stop) = directory, steps
        self._running, self._files = False, ExitStack()

    def at(self, step: int, state: Any) -> None:
        """To be called before every dispatch, with the state that it will change."""
        wanted = self._start <= step < self._stop
        if wanted == self._running:
            return
        jax.block_until_ready(state)  # what was dispatched before belongs on the other side of the edge
        if wanted:
            jax.profiler.start_trace(self._files.enter_context(storage.written_locally(self._directory)))
            self._running = True
        else:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._files.close()
            self._running = False


def memory() -> dict[str, float]:
    """Bytes in use and at most in use on the fullest device; where a backend does not tell, as on a CPU,
    the most that the process has had resident."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        names = {"device_bytes": "bytes_in_use", "device_bytes_peak": "peak_bytes_in_use"}
        return {name: max(float(s.get(key, 0)) for s in stats) for name, key in names.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_bytes_peak": float(peak if sys.platform == "darwin" else peak * 1024)}
