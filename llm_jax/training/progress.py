"""What a person sees while a run is under way."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 5.0  # between lines where there is no terminal to redraw


def say(text: str) -> None:
    """A line about what is going on. It goes where progress goes; results go to standard output."""
    print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """One live line on a terminal; a line every few seconds in a log."""

    def __init__(self, steps: int, start: int) -> None:
        self._steps, self._start = steps, start
        self._console = Console(file=sys.stderr, highlight=False)
        self._began = time.monotonic()
        self._last = float("-inf")
        self._speed = ""
        self._bar = Progress(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start)
        self._bar.start()

    def update(self, step: int, loss: float, rates: Mapping[str, float]) -> None:
        """rates: may be empty, where there was nothing to time; then the last speed stays."""
        if rates:
            self._speed = f"  {rates['tokens_per_second']:,.0f} tokens/s"
            self._speed += f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
        text = f"loss {loss:.4f}{self._speed}"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= QUIET_SECONDS:
            left = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            eta = f"ETA {int(left) // 60}:{int(left) % 60:02d}"
            self._console.print(f"step {step:,}/{self._steps:,}  {text}  {eta}")
            self._last = now

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        self._bar.stop()
