"""What lies where: every array of the state, of a batch and of a layer, its logical place and its bytes on a
device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm_jax.data.batch import Batch
from llm_jax.layout import Layout, mesh_axes
from llm_jax.mesh import abstract_layout
from llm_jax.models import pipeline
from llm_jax.models.experts import Room
from llm_jax.planning.machine import Machine
from llm_jax.training.experiment import Experiment
from llm_jax.training.fitting import check_mesh
from llm_jax.training.program import Program
from llm_jax.training.rules import parameter_name


@dataclass(frozen=True)
class Array:
    """An array of the state. spec: of its dimensions; shard: its shape on one device."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    shard: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """On one device."""
        return math.prod(self.shard) * _width(self.dtype)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that cut it."""
        return mesh_axes(self.spec)


def prepare(experiment: Experiment, machine: Machine) -> Program:
    """The program of a complete experiment on devices that need not be there. Raises UserError where the
    mesh does not fit the machine or the model."""
    layout = abstract_layout(experiment.mesh, machine.devices, machine.slices, machine.device)
    model = experiment.model
    if model.dtype == "auto":
        model = dataclasses.replace(model, dtype="bfloat16" if machine.chip else "float32")
    experiment = dataclasses.replace(experiment, model=model, accumulation=experiment.accumulation or 1)
    check_mesh(experiment, layout.mesh.shape)
    return Program(experiment, layout, Path("unused"))


def batch(program: Program, *lead: int) -> Batch:
    """Shapes and shardings of micro-batches as a run is fed, [*lead, rows, length] each."""
    e, length = program.experiment, program.experiment.data.sequence_length
    sharding = program.layout.named(*[None] * len(lead), "batch", None)

    def of_row(count: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, e.micro_batch, count), dtype, sharding=sharding)

    inputs, targets, positions, segments = (of_row(length) for _ in range(4))
    predict = None if e.objective.causal else of_row(e.objective.targets_of_row(length))
    return Batch(inputs, targets, of_row(length, jnp.float32), positions, segments, predict)


def dispatch(program: Program) -> Batch:
    """``batch`` of all the steps that are sent to the devices at once."""
    return batch(program, program.experiment.steps_per_dispatch, program.experiment.accumulation)


def state(program: Program) -> dict[str, list[Array]]:
    """{part of the state: its arrays}: params, opt_state, ema, and what is left."""
    abstract = program.abstract_state()
    found: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        part, _, name = parameter_name(path).partition("/")
        shard = shard_shape(leaf.shape, leaf.sharding.spec, program.layout.mesh.shape)
        array = Array(name, leaf.shape, str(leaf.dtype), leaf.sharding.spec, shard)
        found.setdefault(part, []).append(array)
    return found


def shard_shape(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mapping[str, int]) -> tuple[int, ...]:
    cuts = [math.prod(mesh[a] for a in mesh_axes(PartitionSpec(c))) for c in spec.partitions]
    cuts += [1] * (len(shape) - len(cuts))
    return tuple(size // cut for size, cut in zip(shape, cuts, strict=True))


def _width(dtype: str) -> int:
    return 8 if dtype.startswith("key") else jax.numpy.dtype(dtype).itemsize


@dataclass(frozen=True)
class Tokens:
    """What a device works on at a time. rows, length: of its part of the batch; residual: of the length
    between layers; width: bytes of a number in computation."""

    rows: int
    length: int
    residual: int
    width: int

    @classmethod
    def of(cls, e: Experiment, layout: Layout) -> Tokens:
        """Of a micro-batch."""
        return cls._of_rows(e.micro_batch, e, layout)

    @classmethod
    def in_block(cls, e: Experiment, layout: Layout) -> Tokens:
        """The same, but in a pipeline one of its parts."""
        return cls._of_rows(e.micro_batch // layout.parts(e.micro_batch), e, layout.inside_stage())

    @classmethod
    def _of_rows(cls, rows: int, e: Experiment, layout: Layout) -> Tokens:
        length = e.data.sequence_length
        return cls(
            rows // layout.ways("batch"),
            length // layout.ways("length"),
            length // layout.ways("residual"),
            _width(e.model.dtype),
        )

    @property
    def count(self) -> int:
        return self.rows * self.length


def layer_runs(e: Experiment, layout: Layout) -> int:
    """How often a device runs a layer for a micro-batch: each of its own once; in a pipeline a run of them in
    every tick, the idle ones too."""
    run = e.model.num_layers // (layout.ways("layers") * layout.rounds)
    return run * pipeline.ticks(layout, e.micro_batch)


def expert_tokens(e: Experiment, layout: Layout) -> int:
    """Rows that a device's experts work on for a micro-batch or a part: places, filled or not, or room for
    all choices of the tokens that it gathers."""
    c, t = e.model, Tokens.in_block(e, layout)
    if not c.capacity_factor:
        return t.count * c.experts_per_token * layout.ways("experts")
    group, room = c.routing_group or t.length, Room(c.capacity_factor, c.routing_group)
    places = room.places(group, c.experts_per_token, c.num_experts)
    return t.count // group * places * c.num_experts


def activations(e: Experiment, layout: Layout) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape on a device, logical axes)} of what one block makes of a micro-batch, or of a part."""
    c, t = e.model, Tokens.in_block(e, layout)
    heads, groups = c.num_heads // layout.ways("heads"), c.kv_heads // layout.ways("kv_heads")
    features = c.mlp_size // layout.ways("mlp")
    whole = (t.rows, t.length, c.model_dim)
    between = (t.rows, t.residual, c.model_dim)
    attention, mlp = "batch, length, heads, head", "batch, length, mlp"
    of_mlp = (t.rows, t.length, features)
    if c.num_experts:
        of_mlp, mlp = (expert_tokens(e, layout), features), "groups x length x experts, mlp"
    return {
        "residual stream": (between, "batch, residual, -"),
        "attention_norm": (between, "batch, residual, -"),
        "attention input": (whole, "batch, length, -"),
        "query": ((t.rows, t.length, heads, c.head_size), attention),
        "key": ((t.rows, t.length, groups, c.head_size), attention),
        "value": ((t.rows, t.length, groups, c.head_size), attention),
        "attention output": ((t.rows, t.length, heads, c.head_size), attention),
        "after attention": (between, "batch, residual, -"),
        "mlp_norm": (between, "batch, residual, -"),
        "mlp input": (whole, "batch, length, -"),
        **{name: (of_mlp, mlp) for name in (("gate",) if c.gated else ())},
        "in": (of_mlp, mlp),
        "activated": (of_mlp, mlp),
    }


def parameters(arrays: list[Array]) -> dict[str, int]:
    """{group: count}: embedding, head, and the rest by the modules of a block; "total"."""
    groups: dict[str, int] = {}
    for array in arrays:
        parts = array.name.split("/")
        group = "/".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        groups[group] = groups.get(group, 0) + array.size
    return {**groups, "total": sum(groups.values())}
