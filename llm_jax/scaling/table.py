"""The run table of a sweep: one line a point, as JSON lines and as CSV.

A function of what is on disk: after any kill and rerun it is the same, byte for byte, but for the columns
``time`` (wall clock of all steps, whoever made them, the number of attempts, and the mean power of a GPU as
its driver counts it) and ``device``, which stand apart. In the CSV their names, and those of ``overrides``,
are dotted: ``time.tokens_per_second``, ``overrides.model.model_dim``.

    status                    waiting, unfinished, finished, diverged (its loss is not a number), failed
    error                     what a failed point, or one that diverged and stopped for it, said last
    parameters                of the model, as they are stored: the vocabulary padded
    embedding_parameters      of tokens and positions; head_parameters: of a head that is not tied, else 0;
                              rest_parameters: of blocks and norms
    non_embedding_parameters  head and rest
    matmul_parameters         those that multiply every token: matrices of blocks, of experts a token's own,
                              and the head, tied or not
    steps, skipped_steps      steps made; those among them that changed nothing, for a bad gradient
    tokens, training_flops    of these steps, a multiply-add being 2, an encoder's head for its targets alone;
                              training_flops_causal: with the half of attention that a causal mask leaves (a
                              decoder alone)
    unique_tokens, epochs     those of its tokens that differ: no more than the training text has, by the
                              weights of its sources; how often they were read
    batch_sequences           rows of a step; batch_tokens: their tokens
    optimizer, learning_rate  its name and peak rate; weight_decay; warmup_steps; schedule: its name;
                              decay_share: of all steps, where a schedule has it (wsd); seed
    together                  how many runs were trained as one program, this one among them (groups.py)
    loss, best_loss           validation, nats a token: the last evaluation and the lowest one
    loss_se                   standard error of the last one, by evaluation batches (training/evaluate.py): as
                              an estimate for all such text; what seeds change is not in it
    bits_per_byte             of the last evaluation, where the text of a token is known (a decoder alone)
    branched_from             fingerprint of the longer run that made its first steps, branched_at of them;
                              saved_flops: of these, which are in training_flops but were spent once

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

from llm_jax import config as configs
from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.flops import matmul_parameters
from llm_jax.scaling.sweep import FAILED, FINISHED, SETTLED, Point, Sweep
from llm_jax.text import shards
from llm_jax.training import metrics
from llm_jax.training.checkpoint import Source, complete_steps
from llm_jax.training.experiment import Experiment
from llm_jax.training.metrics import Record
from llm_jax.training.rundir import RunDirectory
from llm_jax.training.together_loop import MEMBERS

Row = dict[str, Any]
APART = {"time": ("seconds", "tokens_per_second", "attempts", "watts"), "device": ("kind", "count")}
GROUPS = ("", "embedding_", "head_", "rest_", "non_embedding_", "matmul_")
SIZES = tuple(f"{group}parameters" for group in GROUPS)
WORK = ("steps", "skipped_steps", "tokens", "training_flops", "training_flops_causal")
TEXT = ("unique_tokens", "epochs")
RECIPE = {  # column: key of the config
    "batch_sequences": "global_batch_size",
    "optimizer": "optimizer.name",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "schedule": "schedule.name",
    "warmup_steps": "schedule.warmup_steps",
    "decay_share": "schedule.decay_share",
    "seed": "seed",
}
RESULTS = ("loss", "loss_se", "best_loss", "bits_per_byte")
BRANCH = ("branched_from", "branched_at", "saved_flops")
UNKNOWN = {
    **dict.fromkeys((*SIZES, *WORK, *TEXT, *RECIPE, "batch_tokens", "together", *RESULTS, *BRANCH)),
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
    if directory is None or not directory.run.config.exists():
        return row
    try:
        return row | numbers(directory.run, sweep.header(point))
    except UserError as damage:
        return row | {"status": FAILED, "error": str(damage)}


def numbers(run: RunDirectory, header: dict[str, Any]) -> Row:
    """What the directory of a run that has begun says of it. header: of its token shards."""
    e, story = run.stored(), metrics.read(run.metrics)
    made = work(e, story)
    apart = {"time": times(story), "device": device(run)}
    return {
        **parameters(run, e.model),
        **made,
        **text(e, header, made["tokens"]),
        **recipe(e),
        "together": members(run),
        **losses(story),
        **branch(run, e),
        **apart,
    }


def parameters(run: RunDirectory, model: ModelConfig) -> Row:
    """Counted in the newest checkpoint, where there is one."""
    if not complete_steps(run.checkpoints):
        return {}
    sizes = {name: math.prod(shape) for name, (shape, _) in Source.find(run.path).arrays.items()}
    total, head = sum(sizes.values()), sizes.get("head", 0)
    embedding = sizes["embedding"] + sizes.get("position_embedding", 0)
    rest = total - embedding - head
    counts = total, embedding, head, rest, head + rest, matmul_parameters(model)
    return dict(zip(SIZES, counts, strict=True))


def work(e: Experiment, story: list[Record]) -> Row:
    """Steps, tokens and FLOPs. e: complete."""
    steps = [record for record in story if record["kind"] == "train"]
    return {
        "steps": len(steps),
        "skipped_steps": sum(int(record["skipped"]) for record in steps),
        "tokens": len(steps) * batch_tokens(e),
        "training_flops": len(steps) * step_flops(e),
        "training_flops_causal": len(steps) * step_flops(e, causal=True) if e.model.causal else None,
    }


def batch_tokens(e: Experiment) -> int:
    return e.global_batch_size * e.data.sequence_length


def step_flops(e: Experiment, causal: bool = False) -> float:
    return batch_tokens(e) * e.flops_per_token(causal)


def text(e: Experiment, header: dict[str, Any], tokens: int) -> Row:
    """How many of the tokens read differ: each source's share of them, or all that it has."""
    whole, unique = sum(source.weight for source in e.data.mixture), 0
    for source in e.data.mixture:
        there = header["splits"][shards.split_name(shards.TRAIN, source.name)]["tokens"]
        unique += min(round(tokens * source.weight / whole), there)
    return {"unique_tokens": unique, "epochs": tokens / unique if unique else None}


def recipe(e: Experiment) -> Row:
    """What was chosen for the run, as a law of learning rates and batches needs it."""
    values = dict(configs.leaves(e))
    return {name: values.get(key) for name, key in RECIPE.items()} | {"batch_tokens": batch_tokens(e)}


def members(run: RunDirectory) -> int:
    """Of its program, in the newest attempt; 1 for a run by itself."""
    return json.loads(run.environment.read_text()).get("mesh", {}).get(MEMBERS, 1)


def losses(story: list[Record]) -> Row:
    found = metrics.evaluations(story)
    last = found[-1] if found else {}
    known = [record["loss"] for record in found if record["loss"] is not None]
    return {name: last.get(name) for name in RESULTS} | {"best_loss": min(known, default=None)}


def branch(run: RunDirectory, e: Experiment) -> Row:
    """What of the run another one made."""
    origin = run.branched()
    if not origin:
        return {}
    return dict(zip(BRANCH, (origin["from"], origin["step"], origin["step"] * step_flops(e)), strict=True))


def times(story: list[Record]) -> Row:
    """Seconds of the dispatches that were timed, which leaves out compilation and evaluation."""
    steps = [record.get("time", {}) for record in story if record["kind"] == "train"]
    timed = [time for time in steps if "seconds" in time]
    rates = [time["tokens_per_second"] for time in timed]
    return {
        "seconds": sum(time["seconds"] for time in timed),
        "tokens_per_second": median(rates) if rates else None,
        "attempts": max((record["attempt"] for record in story), default=0),
        "watts": next((time["watts"] for time in reversed(timed) if "watts" in time), None),
    }


def device(run: RunDirectory) -> Row:
    """Of the newest attempt."""
    return json.loads(run.environment.read_text())["devices"]


def best_of(rows: Iterable[Row]) -> Row | None:
    """The finished point of lowest loss at its end."""
    finished = [row for row in rows if row["status"] == FINISHED]
    return min(finished, key=lambda row: row["loss"], default=None)


def saving(rows: Iterable[Row]) -> str:
    """In words, what trunks have saved; "" for nothing."""
    branched = [row["saved_flops"] for row in rows if row["saved_flops"]]
    if not branched:
        return ""
    saved, whole = sum(branched), sum(row["training_flops"] or 0.0 for row in rows)
    share = f"{saved:.3g} of {whole:.3g} FLOPs ({saved / whole:.0%})"
    return f"{len(branched)} points branched off longer ones, which saved {share}"


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
