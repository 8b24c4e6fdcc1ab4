"""Every collective that a step needs under its layout, with the fewest bytes that it can take."""

from __future__ import annotations

import math

from jax.sharding import PartitionSpec

from llm_jax.layout import Layout, mesh_axes
from llm_jax.models import pipeline
from llm_jax.planning.collectives import Collective
from llm_jax.planning.layout import Array, Tokens, expert_tokens, layer_runs
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
    runs = (layer_runs(e, layout) if in_block else 1) * e.accumulation
    size = w.size / (w.shape[0] if in_block else 1)
    looked_up = w.name.endswith("embedding")  # tokens are looked up in it: that needs all of the vocabulary
    whole = [a for a in w.axes if a in (("fsdp", "tensor") if looked_up else ("fsdp",))]
    size /= _product(mesh, [a for a in w.axes if a not in (*whole, "stage")])
    tied = w.name == "embedding" and e.model.tied_head  # it is the head, too: another gradient
    if layout.zero < 3:  # all of a stack in one message
        size, layers = size * layers, 1
    uses = 2 if tied else 1
    whole_runs = e.model.remat and layout.rounds > 1  # recomputed, and each layer gathered once more in that
    times = FORWARD_AND_BACKWARD + whole_runs if in_block else 1
    gathers = layers if layout.zero < 3 else runs * times
    sums = {1: layers, 2: layers * e.accumulation * uses, 3: runs * uses}[layout.zero]
    sum_width = 4 if layout.zero == 1 else width
    found, left = [], size
    cuts = [mesh_axes(PartitionSpec(cut)) for cut in w.spec.partitions]
    dims = [tuple(a for a in mesh if a in cut and a in whole) for cut in cuts]
    missing = _product(mesh, whole)
    for axes in filter(None, reversed(dims)):  # the last dimension first
        missing //= _product(mesh, axes)
        found.append(Collective("all-gather", axes, size * width / missing, gathers, _product(mesh, axes)))
    if "fsdp" in whole:
        found.append(Collective("reduce-scatter", ("fsdp",), size * sum_width, sums, mesh["fsdp"]))
        left /= _product(mesh, whole)
    if in_block and layout.rounds > 1:  # dealt out to their rounds by two, there and back
        dealt = layers * (left * 4 if layout.zero == 3 else size * width)
        found.append(Collective("all-to-all", ("stage",), dealt, 4 * e.accumulation, mesh["stage"]))
    summed = {a for name in ("batch", "length") for a in layout.axes(name)} - {*w.axes}
    over = tuple(a for a in mesh if a in summed and a != "replica")
    found.append(Collective("all-reduce", over, left * sum_width, sums, _product(mesh, over)))
    between = left / _product(mesh, over)  # each sends its share to its like in the other slices
    return [*found, Collective("all-reduce", ("replica",), between * sum_width, sums, mesh["replica"])]


def _of_activations(e: Experiment, layout: Layout) -> list[Collective]:
    """Of the residual stream along tensor and from stage to stage, of keys and values along context."""
    c, t, mesh = e.model, Tokens.in_block(e, layout), layout.mesh.shape
    layers = layer_runs(e, layout) * e.accumulation
    again = 1 if c.remat else 0  # what the backward pass makes anew
    found = _of_experts(e, layout, layers) if c.num_experts else []
    if mesh["tensor"] > 1:
        size = t.count * c.model_dim * t.width
        # Into and out of attention, forward and back, and of an MLP, whose output is not made anew; of the
        # loss in, of the embeddings back.
        mlps = layers if c.shared_experts or not c.num_experts else 0
        into, out = layers * (2 + again) + mlps * (2 + again), layers * (2 + again) + mlps * 2
        found.append(Collective("all-gather", ("tensor",), size, into, mesh["tensor"]))
        found.append(Collective("reduce-scatter", ("tensor",), size, out, mesh["tensor"]))
        outside = Tokens.of(e, layout).count * c.model_dim * t.width
        found.append(Collective("all-gather", ("tensor",), outside, 2 * e.accumulation, mesh["tensor"]))
        found.append(Collective("reduce-scatter", ("tensor",), outside, e.accumulation, mesh["tensor"]))
    if mesh["context"] > 1:
        groups = c.kv_heads // layout.ways("kv_heads")
        size = t.rows * e.data.sequence_length * groups * c.head_size * t.width  # keys, and as many values
        found.append(Collective("all-gather", ("context",), size, 2 * layers * (1 + again), mesh["context"]))
        found.append(Collective("reduce-scatter", ("context",), size, 2 * layers, mesh["context"]))
    return found + (_between_stages(e, layout) if mesh["stage"] > 1 else [])


def _of_experts(e: Experiment, layout: Layout, layers: int) -> list[Collective]:
    """Of tokens on their way to experts and back, as experts.py says."""
    c, t, mesh = e.model, Tokens.in_block(e, layout), layout.mesh.shape
    again = 1 if c.remat else 0
    tensor, expert = mesh["tensor"], mesh["expert"]
    choices = t.count * c.experts_per_token * 4  # numbers of experts, and as many weights
    if c.capacity_factor:
        size = expert_tokens(e, layout) * c.model_dim * t.width
        stream = t.count * c.model_dim * t.width / tensor
        return [
            Collective("all-to-all", ("expert",), size / tensor, layers * (4 + 2 * again), expert),
            Collective("all-gather", ("tensor",), size, layers * (2 + again), tensor),
            Collective("reduce-scatter", ("tensor",), size, layers * (2 + again), tensor),
            Collective("all-to-all", ("tensor",), stream, layers * (4 + again), tensor),
            Collective("all-gather", ("tensor",), choices, layers * 2 * (1 + again), tensor),
        ]
    size = t.count * c.model_dim * t.width
    both = tuple(axis for axis in mesh if axis in ("expert", "tensor") and mesh[axis] > 1)
    return [
        *(
            Collective("all-gather", axes, one * whole, layers * times, n)
            for axes, whole, n in ((("tensor",), 1, tensor), (("expert",), expert, expert))
            for one, times in ((size, 2 + again), (choices, 2 * (1 + again)))
        ),
        Collective("reduce-scatter", both, size * expert, layers * 2, expert * tensor),
        Collective("reduce-scatter", both, choices * expert, layers, expert * tensor),
    ]


def _between_stages(e: Experiment, layout: Layout) -> list[Collective]:
    """Parts handed on in every tick; rows gathered at the pipeline's entry and cut at its end. Forward and
    back."""
    t, stages = Tokens.in_block(e, layout), layout.ways("layers")
    part = t.rows * t.residual * e.model.model_dim * t.width
    handed = 2 * e.accumulation * pipeline.ticks(layout, e.micro_batch)
    rows = part * layout.parts(e.micro_batch)
    return [
        Collective("collective-permute", ("stage",), part, handed, stages),
        Collective("all-gather", ("stage",), rows, 2 * e.accumulation, stages),
        Collective("reduce-scatter", ("stage",), rows, 2 * e.accumulation, stages),
    ]


def _product(mesh: dict[str, int], axes: list[str] | tuple[str, ...]) -> int:
    return math.prod(mesh[axis] for axis in axes)
