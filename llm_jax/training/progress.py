"""What a person sees while a run is under way."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llm_jax import hosts

QUIET_SECONDS = 5.0  # between lines where there is no terminal to redraw
MEMORY = 0.9  # how much of the pace is kept when a dispatch is added: about the last ten count


def say(text: str) -> None:
    """A line about what is going on, from process 0. Results, in contrast, go to standard output."""
    if hosts.leads():
        print(text, file=sys.stderr, flush=True)


class Pace:
    """How long a run will still take: from dispatches that were timed, so not from the one that compiled,
    and from what stands between dispatches at a cadence."""

    def __init__(self, steps: int, pauses: Mapping[str, int]) -> None:
        """pauses: {what: steps between two}; 0 = only at the end, where each is in any case."""
        self.steps, self._every = steps, dict(pauses)
        self._seconds: dict[str, float] = {}
        self._step: float | None = None  # seconds

    def dispatch(self, steps: int, seconds: float) -> None:
        """So many steps took so long."""
        fresh = seconds / steps
        self._step = fresh if self._step is None else MEMORY * self._step + (1 - MEMORY) * fresh

    def pause(self, what: str, seconds: float) -> None:
        """The shortest counts: the first one compiled."""
        self._seconds[what] = min(seconds, self._seconds.get(what, seconds))

    def left(self, step: int) -> float | None:
        """Seconds from ``step`` to the end; None before a dispatch was timed."""
        if self._step is None:
            return None
        total = (self.steps - step) * self._step
        for what, seconds in self._seconds.items():
            every = self._every[what] or self.steps
            before_the_end = (self.steps - 1) // every - step // every
            total += seconds * (before_the_end + 1) if step < self.steps else 0.0
        return total


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressLine:
    """One live line on a terminal; a line every few seconds in a log."""

    def __init__(self, start: int, pace: Pace, console: Console | None = None) -> None:
        self._pace = pace
        self._console = console or Console(file=sys.stderr, highlight=False, quiet=not hosts.leads())
        self._last = float("-inf")
        self._speed = ""
        self._bar = Progress(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=pace.steps, completed=start)
        self._bar.start()

    def update(self, step: int, loss: float, rates: Mapping[str, float], count: int) -> None:
        """``count`` steps are done. rates: empty where nothing was timed; then the last speed stays."""
        if rates:
            self._pace.dispatch(count, rates["seconds"])
            self._speed = f"  {rates['tokens_per_second']:,.0f} tokens/s"
            self._speed += f"  MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
        left = self._pace.left(step)
        eta = "" if left is None else f"  ETA {clock(left)}"
        text = f"loss {loss:.4f}{self._speed}{eta}"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= QUIET_SECONDS:
            self._console.print(f"step {step:,}/{self._pace.steps:,}  {text}", soft_wrap=True)
            self._last = now

    def paused(self, what: str, seconds: float) -> None:
        """An evaluation, or samples, took so long."""
        self._pace.pause(what, seconds)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
