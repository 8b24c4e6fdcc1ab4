"""What a person sees while a sweep runs: what starts and ends, the best so far, when it will be done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llm_jax.scaling.sweep import FINISHED, SETTLED, Point, Sweep
from llm_jax.scaling.table import Row, best_of, step_flops
from llm_jax.training import metrics
from llm_jax.training.progress import clock
from llm_jax.training.rundir import RunDirectory

TAIL = 1 << 16  # bytes of a metrics file, enough for its last line
REFRESH_SECONDS = 1.0


class Board:
    """Lines that stay where a point starts or ends, and a live one on a terminal."""

    def __init__(self, sweep: Sweep, points: Sequence[Point], console: Console | None = None) -> None:
        """points: those that this process is to run; their data are prepared."""
        self._sweep, self._points = sweep, points
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._began, self._clock, self._shown = self._flops(), time.monotonic(), 0.0
        self._best = ""
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total} points"),
            BarColumn(bar_width=12),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=len(points), completed=self._settled())
        self._bar.start()

    def started(self, group: Sequence[Point], log: Path) -> None:
        """group: what one process trains; log: where it says how it goes."""
        first, *others = group
        run, branch = self._sweep.directory(first).run, self._sweep.branches.get(first.index)
        step = last_step(run)
        goes_on = f"goes on at step {step:,}" if step else "starts"
        if step and step == run.branched().get("step"):
            goes_on = f"branches off point {branch.trunk} at step {step:,}"
        with_ = f" together with {_indices(others)}" if others else ""
        self._say(f"{first} {goes_on}{with_}; its log: {log}")

    def ended(self, point: Point, rows: Sequence[Row]) -> None:
        """rows: of the whole sweep."""
        row = rows[point.index]
        said = f": {row['error']}" if row["error"] else ""
        said += f": validation loss {row['loss']:.4f}" if row["status"] == FINISHED else ""
        if best := best_of(rows):
            self._best = f"best {best['loss']:.4f} (point {best['index']})"
        done = f"{self._settled()} of {len(self._points)} done"
        self._say(_listed(f"{point} {row['status']}{said}", done, self._best, self._eta()))

    def show(self, running: Sequence[Sequence[Point]]) -> None:
        """Redraws the live line, at most once a second. running: the points of each process."""
        if self._bar.disable or time.monotonic() - self._shown < REFRESH_SECONDS:
            return
        self._shown = time.monotonic()
        steps = [
            f"{_indices(group)}: {self._step(group):,}/{group[0].experiment.steps:,}" for group in running
        ]
        text = _listed(self._eta(), self._best, f"steps of point {', '.join(steps)}")
        self._bar.update(self._task, completed=self._settled(), description=text)

    def _step(self, group: Sequence[Point]) -> int:
        """Of those that have not diverged: they are all there."""
        return max(last_step(self._sweep.directory(point).run) for point in group)

    def close(self) -> None:
        self._bar.stop()

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _settled(self) -> int:
        return sum(self._sweep.status(point) in SETTLED for point in self._points)

    def _flops(self) -> tuple[float, float]:
        """Of all points of this process: those done, and those still to do. What a point has from another
        is neither."""
        done = left = 0.0
        for point in self._points:
            e, directory = self._sweep.complete(point), self._sweep.directory(point)
            begin = self._sweep.steps_of_others(point)
            step = e.steps if directory.status() in SETTLED else max(last_step(directory.run), begin)
            done += step_flops(e) * (step - begin)
            left += step_flops(e) * (e.steps - step)
        return done, left

    def _eta(self) -> str:
        """From the FLOPs that were done since the start, compilation included, so rather too late than too
        early; nothing before the first step."""
        done, left = self._flops()
        fresh = done - self._began[0]
        seconds = time.monotonic() - self._clock
        return f"ETA {clock(left / fresh * seconds)}" if fresh > 0 and left > 0 else ""


def _indices(group: Sequence[Point]) -> str:
    return "+".join(str(point.index) for point in group)


def _listed(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def last_step(run: RunDirectory) -> int:
    """The newest step in the metrics, from the end of their newest file: cheap enough to ask every second."""
    paths = metrics.segments(run.metrics)
    if not paths:
        return 0
    with paths[-1].open("rb") as file:
        file.seek(max(0, paths[-1].stat().st_size - TAIL))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]  # the last one may be half written
    return json.loads(whole[-1])["step"] if whole else 0
