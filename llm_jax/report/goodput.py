"""Where the time of a run went, over all its attempts, from what its metrics say of the clock."""

from __future__ import annotations

import statistics
from pathlib import Path

from llm_jax.training import metrics
from llm_jax.training.metrics import Record

KINDS = (
    *("step", "start", "compile", "data wait", "evaluation"),
    *("samples", "checkpoint", "lost steps", "restart"),
)


def goodput(directory: Path) -> dict[str, float]:
    """{kind: seconds} of a run's wall time, from its first attempt's start to its last record.

    directory: the run's metrics. step: of steps that the story kept; start: from a process's beginning to its
    first dispatch; compile: of the first dispatch, beyond what others take; lost steps: of those that a later
    attempt did again; restart: between attempts, with what an attempt did after its last record.
    """
    spent = dict.fromkeys(KINDS, 0.0)
    attempts = [found for path in metrics.segments(directory) if (found := metrics.read_segment(path))]
    timed = [attempt for attempt in attempts if "time" in attempt[0]]
    for number, attempt in enumerate(timed):
        later = timed[number + 1 :]
        kept = min((after[0]["step"] for after in later), default=float("inf"))
        for kind, seconds in _attempt(attempt, kept).items():
            spent[kind] += seconds
        if later and attempt[-1]["kind"] != "end":  # after the end nothing waited for a restart
            spent["restart"] += max(later[0][0]["time"]["process"] - _last(attempt), 0.0)
    return spent


def _attempt(records: list[Record], kept: float) -> dict[str, float]:
    """Seconds of one attempt. kept: the last step that no later attempt did again."""
    spent = dict.fromkeys(KINDS, 0.0)
    began = records[0]["time"]
    spent["start"] = began["at"] - began["process"]
    before, paused, dispatches = began["at"], 0.0, []
    for record in records[1:]:
        clock = record.get("time", {})
        if record["kind"] == "pause":
            spent[record["of"]] += clock["seconds"]
            paused += clock["seconds"]
        elif record["kind"] == "end":  # it waited for the last checkpoint to be complete
            spent["checkpoint"] += max(clock["at"] - before - paused, 0.0)
        elif "at" in clock:
            wait = clock.get("data_wait", 0.0)
            spent["data wait"] += wait
            dispatches.append((record["step"], max(clock["at"] - before - wait - paused, 0.0)))
            before, paused = clock["at"], 0.0
    if len(dispatches) > 1:
        first = dispatches[0]
        usual = min(statistics.median(seconds for _, seconds in dispatches[1:]), first[1])
        spent["compile"], dispatches[0] = first[1] - usual, (first[0], usual)
    for step, seconds in dispatches:
        spent["step" if step <= kept else "lost steps"] += seconds
    return spent


def _last(records: list[Record]) -> float:
    """When an attempt last wrote."""
    return max(record["time"]["at"] for record in records if "at" in record.get("time", {}))
