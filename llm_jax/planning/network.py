"""Every collective that a step needs under its layout, with the fewest bytes that it can take.

Of experts those of their weights, not yet those of their tokens.
"""

from __future__ import annotations

import math

from jax.sharding import PartitionSpec

from llm_jax.mesh import Layout, mesh_axes
from llm_jax.planning.collectives import Collective
from llm_jax.planning.layout import Array, Tokens
from llm_jax.training.experiment import Experiment

FORWARD_AND_BACKWARD = 2  # a layer is gathered for both


def needed(e: Experiment, layout: Layout, params: list[Array]) -> list[Collective]:
    """Of one step; scalars and gains aside."""
    found = [one for array in params for one in _of_weight(e, layout, array)]
    found += _of_activations(e, layout)
    return [one for one in found if one.group > 1]


def _of_weight(e: Experiment, layout: Layout, w: Array) -> list[Collective]:
    """Gathers of a matrix, reduce-scatters and all-reduces of its gradient."""
    in_block = w.name.startswith("blocks/")
    if len(w.shape) < (3 if in_block else 2):  # a gain: all-reduced, kilobytes
        return []
    mesh, width = layout.mesh.shape, Tokens.of(e, layout).width
    layers = w.shape[0] // mesh["stage"] if in_block else 1
    size = w.size / (w.shape[0] if in_block else 1)
    looked_up = w.name.endswith("embedding")  # tokens are looked up in it: that needs all of the vocabulary
    whole = [a for a in w.axes if a in (("fsdp", "tensor") if looked_up else ("fsdp",))]
    size /= _product(mesh, [a for a in w.axes if a not in (*whole, "stage")])
    tied = w.name == "embedding" and e.model.tied_head  # it is the head, too: another gradient
    gathers = 1 if layout.zero < 3 else e.accumulation * (FORWARD_AND_BACKWARD if in_block else 1)
    sums, sum_width = (1, 4) if layout.zero == 1 else (e.accumulation * (2 if tied else 1), width)
    found, left = [], size
    cuts = [mesh_axes(PartitionSpec(cut)) for cut in w.spec.partitions]
    dims = [tuple(a for a in mesh if a in cut and a in whole) for cut in cuts]
    missing = _product(mesh, whole)
    for axes in filter(None, reversed(dims)):  # the last dimension first
        missing //= _product(mesh, axes)
        found.append(
            Collective("all-gather", axes, size * width / missing, layers * gathers, _product(mesh, axes))
        )
    if "fsdp" in whole:
        found.append(Collective("reduce-scatter", ("fsdp",), size * sum_width, layers * sums, mesh["fsdp"]))
        left /= mesh["fsdp"]
    over = tuple(a for name in ("batch", "length") for a in layout.axes(name) if a not in w.axes)
    return [*found, Collective("all-reduce", over, left * sum_width, layers * sums, _product(mesh, over))]


def _of_activations(e: Experiment, layout: Layout) -> list[Collective]:
    """Of the residual stream along tensor, of keys and values along context."""
    c, t, mesh = e.model, Tokens.of(e, layout), layout.mesh.shape
    layers = c.num_layers // mesh["stage"] * e.accumulation
    again = 1 if c.remat else 0  # what the backward pass makes anew
    found = []
    if mesh["tensor"] > 1:
        size = t.count * c.model_dim * t.width
        # Into and out of attention and MLP, forward and back; of the loss in, of the embeddings back.
        into, out = layers * (4 + 2 * again) + 2 * e.accumulation, layers * (4 + again) + e.accumulation
        found.append(Collective("all-gather", ("tensor",), size, into, mesh["tensor"]))
        found.append(Collective("reduce-scatter", ("tensor",), size, out, mesh["tensor"]))
    if mesh["context"] > 1:
        groups = c.kv_heads // layout.ways("kv_heads")
        size = 2 * t.rows * e.data.sequence_length * groups * c.head_size * t.width  # keys and values
        found.append(Collective("all-gather", ("context",), size, layers * (1 + again), mesh["context"]))
        found.append(Collective("reduce-scatter", ("context",), size, layers, mesh["context"]))
    return found


def _product(mesh: dict[str, int], axes: list[str] | tuple[str, ...]) -> int:
    return math.prod(mesh[axis] for axis in axes)
