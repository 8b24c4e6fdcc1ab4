"""Metrics: one append-only file an attempt, and one reader that tells a run's single story.

``metrics/0001.jsonl`` belongs to the first start of a run, ``0002.jsonl`` to the next. Every line has
``attempt``, ``kind`` (start, train, evaluation, pause, end) and ``step``; values that come from a wall clock
stand apart under ``time``, so that two runs of one config differ in nothing else. An evaluation says
of which set under ``set``; ``validation`` is the one that a run is judged by. A pause says what stood between
two dispatches and for how long.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.text.shards import VALIDATION

Record = dict[str, Any]


class MetricsWriter:
    """Appends records to a new segment. The first is a start, which says where the attempt goes on."""

    def __init__(self, directory: Path) -> None:
        storage.make_directory(directory)
        self.attempt = 1 + max((int(path.stem) for path in segments(directory)), default=0)
        self._path = segment(directory, self.attempt)
        self._log = storage.open_log(self._path)

    def write(
        self,
        kind: str,
        step: int,
        values: Mapping[str, Any] | None = None,
        time: Mapping[str, float] | None = None,
    ) -> Record:
        """One line. A killed run has lost none; on a bucket, those of the last half minute.

        values: numbers, texts, and mappings of these. Gives the record that was written.
        """
        record = {"attempt": self.attempt, "kind": kind, "step": step, **_plain(values or {})}
        if time:
            record["time"] = _plain(time)
        try:
            self._log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        return record

    def sync(self) -> None:
        """To the disk or the bucket: what a checkpoint relies on must not be lost when the machine is."""
        try:
            self._log.sync()
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        self._log.close()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not finite is written as null."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            plain[key] = _plain(value)
        elif isinstance(value, str):
            plain[key] = value
        else:
            plain[key] = float(value) if math.isfinite(value) else None
    return plain


def segment(directory: Path, attempt: int) -> Path:
    return directory / f"{attempt:04d}.jsonl"


def segments(directory: Path) -> list[Path]:
    """Of all attempts, in order. They are numbered without gaps, so that one which a bucket does not list yet
    is asked for by its name."""
    newest = max((int(path.stem) for path in directory.glob("[0-9]*.jsonl")), default=0)
    while segment(directory, newest + 1).exists():
        newest += 1
    found = (segment(directory, attempt) for attempt in range(1, newest + 1))
    return [path for path in found if path.exists()]


def read(directory: Path) -> list[Record]:
    """The story of a run: of every step the latest attempt's records, in order.

    An attempt that went on from step s replaces all that earlier ones wrote after s. Raises UserError
    for a broken line, unless it is the last of its segment, which a kill may have cut.
    """
    story: list[Record] = []
    for path in segments(directory):
        for record in read_segment(path):
            if record["kind"] == "start":
                story = [kept for kept in story if kept["step"] <= record["step"]]
            story.append(record)
    return story


def read_segment(path: Path) -> list[Record]:
    """All that one attempt wrote. Raises UserError as ``read`` does."""
    records, lines = [], storage.read_log(path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON; the file is damaged") from None
    return records


def evaluations(story: list[Record], of: str = VALIDATION) -> list[Record]:
    """The evaluations of one set, in order."""
    return [r for r in story if r["kind"] == "evaluation" and r.get("set", VALIDATION) == of]


def without_time(story: list[Record]) -> list[Record]:
    """What two runs of one config have in common, however often either was stopped."""
    hidden = ("time", "attempt")
    return [
        {key: value for key, value in record.items() if key not in hidden}
        for record in story
        if record["kind"] not in ("start", "pause", "end")
    ]
