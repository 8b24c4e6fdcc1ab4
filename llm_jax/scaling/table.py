"""The run table of a sweep: one line a point, as JSON lines and as CSV.

A function of what is on disk: after any kill and rerun it is the same, byte for byte, but for the columns
``time`` (wall clock, and the number of attempts) and ``device``, which stand apart. In the CSV their names,
and those of ``overrides``, are dotted: ``time.tokens_per_second``, ``overrides.model.model_dim``.

    status                    waiting, unfinished, finished, diverged (its loss is not a number), failed
    error                     what a failed point, or one that diverged and stopped for it, said last
    parameters                of the model, as they are stored: the vocabulary padded
    non_embedding_parameters  without token and position embeddings; an untied head counts
    steps, skipped_steps      steps made; those among them that changed nothing, for a bad gradient
    tokens, training_flops    of these steps, a multiply-add being 2; training_flops_causal: with the half of
                              attention that a causal mask leaves (a decoder alone)
    loss, best_loss           validation, nats a token: the last evaluation and the lowest one
    bits_per_byte             of the last evaluation, where the text of a token is known (a decoder alone)

What is not known, or not a number, is null, and empty in the CSV.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.models.flops import training_flops_per_token
from llm_jax.scaling.sweep import FAILED, FINISHED, SETTLED, Point, Sweep
from llm_jax.training import metrics
from llm_jax.training.checkpoint import Source, complete_steps
from llm_jax.training.experiment import Experiment
from llm_jax.training.metrics import Record
from llm_jax.training.rundir import RunDirectory

Row = dict[str, Any]
APART = {"time": ("seconds", "tokens_per_second", "attempts"), "device": ("kind", "count")}
COUNTS = ("parameters", "non_embedding_parameters", "steps", "skipped_steps", "tokens", "training_flops")
RESULTS = ("training_flops_causal", "loss", "best_loss", "bits_per_byte")
UNKNOWN = {
    **dict.fromkeys((*COUNTS, *RESULTS)),
    **{name: dict.fromkeys(keys) for name, keys in APART.items()},
}


class Table:
    """Reads the rows, and keeps those of points that are settled."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._settled: dict[int, Row] = {}

    def row(self, point: Point) -> Row:
        if point.index not in self._settled:
            row = read(self._sweep, point)
            if row["status"] not in SETTLED:
                return row
            self._settled[point.index] = row
        return self._settled[point.index]

    def write(self) -> list[Row]:
        """Replaces table.jsonl and table.csv. Where several processes run one sweep, the last one to write
        has seen what all have finished."""
        path = self._sweep.path
        with storage.lock(path / "table.lock", wait=True):
            storage.remove_leftovers(path, "table.*")
            rows = [self.row(point) for point in self._sweep.points]
            storage.write_text(path / "table.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            storage.write_text(path / "table.csv", to_csv(rows))
        return rows


def read(sweep: Sweep, point: Point) -> Row:
    """The row of one point."""
    directory = sweep.directory(point)
    outcome = directory.read_outcome() if directory else {}
    row = {
        "index": point.index,
        "fingerprint": sweep.fingerprint(point),
        "status": sweep.status(point),
        "error": outcome.get("error") or None,
        "overrides": point.overrides,
        **UNKNOWN,
    }
    try:
        return row | (numbers(directory.run) if directory and directory.run.config.exists() else {})
    except UserError as damage:
        return row | {"status": FAILED, "error": str(damage)}


def numbers(run: RunDirectory) -> Row:
    """What the directory of a run that has begun says of it."""
    e, story = run.stored(), metrics.read(run.metrics)
    apart = {"time": times(story), "device": device(run)}
    return {**parameters(run), **work(e, story), **losses(story), **apart}


def parameters(run: RunDirectory) -> Row:
    """Counted in the newest checkpoint, where there is one."""
    if not complete_steps(run.checkpoints):
        return {}
    sizes = {name: math.prod(shape) for name, (shape, _) in Source.find(run.path).arrays.items()}
    inner = [size for name, size in sizes.items() if name not in ("embedding", "position_embedding")]
    return {"parameters": sum(sizes.values()), "non_embedding_parameters": sum(inner)}


def work(e: Experiment, story: list[Record]) -> Row:
    """Steps, tokens and FLOPs. e: complete."""
    steps = [record for record in story if record["kind"] == "train"]
    length = e.data.sequence_length
    tokens = len(steps) * e.global_batch_size * length
    flops = {causal: tokens * training_flops_per_token(e.model, length, causal) for causal in (False, True)}
    return {
        "steps": len(steps),
        "skipped_steps": sum(int(record["skipped"]) for record in steps),
        "tokens": tokens,
        "training_flops": flops[False],
        "training_flops_causal": flops[True] if e.model.causal else None,
    }


def losses(story: list[Record]) -> Row:
    found = metrics.evaluations(story)
    last = found[-1] if found else {}
    known = [record["loss"] for record in found if record["loss"] is not None]
    return {
        "loss": last.get("loss"),
        "best_loss": min(known, default=None),
        "bits_per_byte": last.get("bits_per_byte"),
    }


def times(story: list[Record]) -> Row:
    """Seconds of the dispatches that were timed, which leaves out compilation and evaluation."""
    steps = [record.get("time", {}) for record in story if record["kind"] == "train"]
    timed = [time for time in steps if "seconds" in time]
    rates = [time["tokens_per_second"] for time in timed]
    return {
        "seconds": sum(time["seconds"] for time in timed),
        "tokens_per_second": median(rates) if rates else None,
        "attempts": max((record["attempt"] for record in story), default=0),
    }


def device(run: RunDirectory) -> Row:
    """Of the newest attempt."""
    return json.loads(run.environment.read_text())["devices"]


def best_of(rows: Iterable[Row]) -> Row | None:
    """The finished point of lowest loss at its end."""
    finished = [row for row in rows if row["status"] == FINISHED]
    return min(finished, key=lambda row: row["loss"], default=None)


def to_csv(rows: list[Row]) -> str:
    """Columns in the order of the first row, the keys of all points' overrides among them."""
    keys = dict.fromkeys(key for row in rows for key in row["overrides"])
    padded = [row | {"overrides": {key: row["overrides"].get(key) for key in keys}} for row in rows]
    text = io.StringIO()
    flat = [dict(_flat(row)) for row in padded]
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Nested columns with dotted names; a value that CSV has no word for as JSON."""
    columns = []
    for key, value in row.items():
        if key in ("overrides", *APART):
            columns += [(f"{key}.{name}", _cell(inner)) for name, inner in value.items()]
        else:
            columns.append((key, _cell(value)))
    return columns


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value
