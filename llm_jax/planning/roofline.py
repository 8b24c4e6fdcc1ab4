"""The least time a step can take: products, memory and network, each at its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_jax.layout import Layout
from llm_jax.models import pipeline
from llm_jax.models.config import ModelConfig
from llm_jax.planning.collectives import Collective
from llm_jax.planning.layout import Array, Tokens, activations, layer_runs
from llm_jax.planning.machine import Machine
from llm_jax.planning.memory import head
from llm_jax.training.experiment import Experiment

PASSES = 3  # over every product: forward, and back to the input and to the weight


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step on every device. Lower bounds: nothing waits for anything else."""

    compute: float
    memory: float
    network: float
    step_flops: float  # of the model over all devices, by what its mask leaves; recomputation not counted
    tokens: int
    peak: float  # FLOP/s of all devices

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """The share of the peak that the model's own FLOPs, attention by its mask, can reach."""
        return self.step_flops / (self.seconds * self.peak)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def bound(
    e: Experiment, layout: Layout, machine: Machine, params: list[Array], network: list[Collective]
) -> Roofline:
    """Of a machine whose chip is known."""
    tokens = e.global_batch_size * e.data.sequence_length
    model = tokens * e.flops_per_token(e.model.causal)
    peak = machine.chip.flops * machine.devices
    return Roofline(
        compute=executed(e, layout, tokens) / peak,
        memory=moved(e, layout, params) / machine.chip.bandwidth,
        network=sum(one.sent / machine.bandwidth(one.axes, one.group, reach(one, layout)) for one in network),
        step_flops=model,
        tokens=tokens,
        peak=peak,
    )


def reach(one: Collective, layout: Layout) -> int:
    """How many neighbours lie from the first to the last device of a group."""
    sizes = list(layout.mesh.shape.items())
    first = next(i for i, (axis, _) in enumerate(sizes) if axis in one.axes)
    return math.prod(size for _, size in sizes[first:])


def executed(e: Experiment, layout: Layout, tokens: int) -> float:
    """FLOPs of a step over all devices: of attention only what its mask leaves, the blocks' forward pass once
    more where it is recomputed, experts' places that stay empty, and what a pipeline does in idle ticks."""
    c, done = e.model, e.flops_per_token(e.model.causal)
    in_head = e.scored * PASSES * 2 * c.model_dim * c.padded_vocab
    in_blocks = (done - in_head + _empty_places(c)) * ((PASSES + 1) / PASSES if c.remat else 1.0)
    return tokens * (in_blocks / (1.0 - pipeline.bubble(layout, e.micro_batch)) + in_head)


def _empty_places(c: ModelConfig) -> float:
    """FLOPs a token of what a capacity leaves room for beyond the tokens there are."""
    of_chosen = 2 * (3 if c.gated else 2) * c.model_dim * c.mlp_size * c.experts_per_token * c.num_layers
    return PASSES * of_chosen * max(c.capacity_factor - 1.0, 0.0)


def moved(e: Experiment, layout: Layout, params: list[Array]) -> float:
    """Bytes between a device and its memory in a step: activations written and read by every pass, gathered
    weights likewise, and the optimiser's seven float32 numbers a parameter."""
    t, c = Tokens.of(e, layout), e.model
    passes = PASSES + (1 if c.remat else 0)
    runs = layer_runs(e, layout)
    of_layer = sum(math.prod(shape) for shape, _ in activations(e, layout).values()) * t.width
    reads = runs / (c.num_layers // layout.ways("layers"))  # of a stage's weights, for one part after another
    weights = sum(a.bytes / 4 * t.width * (reads if a.name.startswith("blocks/") else 1) for a in params)
    weights *= layout.mesh.shape["fsdp"]
    once = sum(a.bytes for a in params) * 7.0
    per_micro = 2 * passes * (runs * of_layer + weights) + head(e, layout)
    return e.accumulation * per_micro + once
