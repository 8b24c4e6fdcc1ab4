"""Beginning with the parameters of another run: its optimiser and its step are not taken."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.errors import UserError
from llm_jax.text import shards
from llm_jax.training.checkpoint import Source, describe
from llm_jax.training.program import Program
from llm_jax.training.rules import parameter_name

NOISE = 0.01  # of the old rows' standard deviation: enough to tell new tokens apart, too little to matter
NEW_ROWS = 2  # the purpose of a draw, beside the seed


def params_from(program: Program, source: Source, say: Callable[[str], None]) -> Any:
    """The program's parameters on its own mesh, those that ``init_skip`` matches and new rows as fresh.

    Raises UserError naming every parameter that is missing, extra or misshapen, or a byte that changed.
    """
    e = program.experiment
    params, before, now = program.fresh_params(), source.about("vocab_size"), e.model.vocab_size
    fresh = flat(params)
    skipped = skip(e.init_skip, {**fresh, **source.arrays})
    wanted = {name: leaf for name, leaf in fresh.items() if name not in skipped}
    axes = {name: axis for name, axis in vocabulary_axes(program).items() if name in wanted}
    grown = axes if now != before else {}
    check_vocabulary(source, (before, now), grown, e.init_vocabulary)
    check_shapes(source, wanted, skipped, grown)
    if axes and source.about("tokenizer") != shards.read_header(program.directory)["tokenizer"]:
        say("parameters: the tokenizer is another one; rows of the vocabulary keep their numbers")
    everywhere = NamedSharding(program.layout.mesh, PartitionSpec())
    target: dict[str, Any] = {}
    for name, leaf in wanted.items():
        shape, dtype = source.arrays[name]
        sharding = everywhere if name in grown else leaf.sharding
        *parents, last = name.split("/")
        section = target
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
    found = flat(source.restore(target))
    for number, (name, axis) in enumerate(sorted(grown.items())):
        draw = np.random.default_rng([e.seed, NEW_ROWS, number]) if e.init_vocabulary == "mean" else None
        with jax.set_mesh(program.layout.mesh):
            found[name] = extend(np.asarray(found[name]), fresh[name], axis, (before, now), draw)
    say(f"parameters: {len(found)} from {source.path}, {len(fresh) - len(found)} fresh")
    return jax.tree_util.tree_map_with_path(lambda path, x: found.get(parameter_name(path), x), params)


def flat(tree: Any) -> dict[str, Any]:
    """{parameter name: leaf}."""
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def skip(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that a pattern matches as a whole. Raises UserError for a pattern that matches none."""
    found = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f"config.init_skip: {pattern!r} is no regular expression ({error})") from None
        if not matched:
            raise UserError(f"config.init_skip: {pattern!r} matches none of {', '.join(sorted(names))}")
        found |= matched
    return found


def vocabulary_axes(program: Program) -> dict[str, int]:
    """{parameter: its axis over the vocabulary}: the axes that another vocabulary would make longer."""
    e = program.experiment
    model = dataclasses.replace(e.model, vocab_size=2 * e.model.padded_vocab)
    larger = dataclasses.replace(program, experiment=dataclasses.replace(e, model=model))
    shapes = describe(program.abstract_state().params)
    other = describe(larger.abstract_state().params)
    axes = {}
    for name, (shape, _) in shapes.items():
        changed = [axis for axis, size in enumerate(shape) if other[name][0][axis] != size]
        axes |= {name: changed[0]} if changed else {}
    return axes


def check_vocabulary(source: Source, sizes: tuple[int, int], grown: Iterable[str], choice: str) -> None:
    """Raises UserError unless the vocabulary is the old one, or larger and something is said about that."""
    before, now = sizes
    tokens = f"{source.path} has {before} tokens, this model {now} ({', '.join(grown)})"
    if grown and now < before:
        raise UserError(f"{tokens}; a vocabulary cannot shrink: take the old tokenizer, or config.init_skip")
    if grown and choice == "error":
        raise UserError(f"{tokens}; config.init_vocabulary=mean or =fresh says what the new rows begin as")


def check_shapes(source: Source, wanted: dict[str, Any], skipped: set[str], grown: dict[str, int]) -> None:
    """Raises one UserError that names all that does not fit."""
    saved = {name: about for name, about in source.arrays.items() if name not in skipped}
    here = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in wanted.items()}
    for name, axis in grown.items():
        if name in saved and len(saved[name][0]) == len(here[name][0]):
            here[name][0][axis] = saved[name][0][axis]
    wrong = [
        f"{name} is {saved[name]} there, {here[name]} here"
        for name in here
        if name in saved and saved[name] != here[name]
    ]
    problems = {
        "missing there": [name for name in here if name not in saved],
        "not in this model": [name for name in saved if name not in here],
        "of another shape": wrong,
    }
    listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
    if listed:
        raise UserError(f"{source.path} does not fit: {listed}; config.init_skip leaves parameters out")


def extend(
    old: np.ndarray, fresh: jax.Array, axis: int, sizes: tuple[int, int], draw: np.random.Generator | None
) -> jax.Array:
    """``fresh`` with the old rows in front (rows: along ``axis``), in its own sharding.

    sizes: tokens before and now. draw: new rows are the mean of the old ones plus a little noise, which
    keeps the probabilities of old tokens nearly what they were (Hewitt 2021, "Initializing new word
    embeddings"); None: they stay fresh. Padding behind the vocabulary stays fresh.
    """
    before, now = sizes
    rows = np.moveaxis(old, axis, 0)[:before]
    values = np.zeros((fresh.shape[axis], *rows.shape[1:]), np.float32)
    values[:before] = rows
    if draw is not None:
        noise = NOISE * rows.std() * draw.standard_normal((now - before, *rows.shape[1:]))
        values[before:now] = rows.mean(axis=0, dtype=np.float64) + noise
    taken = np.arange(len(values)) < (before if draw is None else now)
    mask = np.broadcast_to(taken.reshape([-1] + [1] * (old.ndim - 1)), values.shape)
    placed = [jax.device_put(np.moveaxis(x, 0, axis), fresh.sharding) for x in (mask, values)]
    return jnp.where(*placed, fresh)
