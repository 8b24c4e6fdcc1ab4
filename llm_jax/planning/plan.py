"""A plan: what a config costs on a machine, before a device is booked."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm_jax.mesh import AXES
from llm_jax.models import pipeline
from llm_jax.planning import layout, memory, network, roofline
from llm_jax.planning.collectives import Collective, by_kind
from llm_jax.planning.gpu_target import PREALLOCATED
from llm_jax.planning.layout import Array
from llm_jax.planning.machine import Machine
from llm_jax.planning.roofline import Roofline
from llm_jax.training.experiment import Experiment
from llm_jax.training.program import Program


@dataclass(frozen=True)
class Plan:
    """needed: the collectives of a step; roofline: None where the chip's peaks are not known; compiled: what
    the compiler said, {} where it was not asked."""

    program: Program
    machine: Machine
    state: dict[str, list[Array]]
    needed: list[Collective]
    roofline: Roofline | None
    compiled: dict[str, Any] = field(default_factory=dict)

    @property
    def experiment(self) -> Experiment:
        return self.program.experiment

    @cached_property
    def memory(self) -> dict[str, float]:
        """{cause: bytes on a device}."""
        return memory.estimate(self.program, self.state)

    @property
    def at_rest(self) -> int:
        """Bytes of the state on a device."""
        return sum(array.bytes for arrays in self.state.values() for array in arrays)

    @property
    def capacity(self) -> float | None:
        """Bytes of a device that a program may take; None for a CPU."""
        if self.machine.chip is None:
            return None
        share = PREALLOCATED if self.machine.device.platform == "gpu" else 1 - memory.RESERVED
        return self.machine.chip.memory * share

    @property
    def fits(self) -> bool:
        needed = self.memory["total"]
        if self.compiled:  # libtpu's sum counts some buffers twice, and what it refuses does not fit
            if self.compiled["out_of_memory"] or self.machine.device.platform != "gpu":
                return not self.compiled["out_of_memory"]
            needed = self.compiled["memory"]["total"]
        return self.capacity is None or needed <= self.capacity

    @property
    def bubble(self) -> float:
        """The share of the ticks in which a stage of a pipeline has nothing to do."""
        return pipeline.bubble(self.program.layout, self.experiment.micro_batch)

    def mesh(self) -> dict[str, int]:
        return {axis: size for axis, size in self.program.layout.mesh.shape.items() if size > 1}

    def collectives(self) -> list[dict[str, Any]]:
        """Bytes that a device sends in a step: as the compiler made it, where it was asked, and the least."""
        least = by_kind(self.needed)
        made = self.compiled.get("collectives", {})
        rows = []
        for kind, axes in {**least, **made}:
            minimum = least.get((kind, axes), 0.0)
            sent = made.get((kind, axes), 0.0) if made else minimum
            rows.append({"kind": kind, "axis": "+".join(axes), "bytes": sent, "minimum_bytes": minimum})
        return rows

    def to_json(self) -> dict[str, Any]:
        e, r = self.experiment, self.roofline
        per_token = {
            "full_attention": e.flops_per_token(),
            "masked_attention": e.flops_per_token(e.model.causal),
        }
        found = {
            "machine": {
                "topology": self.machine.name,
                "slices": self.machine.slices,
                "devices": self.machine.devices,
            },
            "mesh": {axis: self.program.layout.mesh.shape[axis] for axis in AXES},
            "parameters": layout.parameters(self.state["params"]),
            "flops_per_token": per_token,
            "memory_per_device_bytes": self.memory,
            "memory_capacity_bytes": self.capacity,
            "compiled_memory_bytes": self.compiled.get("memory"),
            "compiled_kernels": self.compiled.get("kernels"),
            "compile_seconds": self.compiled.get("seconds"),
            "out_of_memory": self.compiled.get("out_of_memory"),
            "collectives": self.collectives(),
            "pipeline_bubble": self.bubble,
            "fits": self.fits,
        }
        if r:
            found |= {
                "step_seconds": {"compute": r.compute, "memory": r.memory, "network": r.network},
                "limit": r.limit,
                "mfu_bound": r.mfu,
                "mfu_bound_full_attention": r.mfu
                * per_token["full_attention"]
                / per_token["masked_attention"],
                "tokens_per_second": r.tokens_per_second,
            }
        return found


def make(experiment: Experiment, machine: Machine) -> Plan:
    """The analytic plan of a complete experiment. Raises UserError where the mesh does not fit."""
    program = layout.prepare(experiment, machine)
    return of_program(program, machine, layout.state(program))


def of_program(program: Program, machine: Machine, state: dict[str, list[Array]]) -> Plan:
    e, where = program.experiment, program.layout
    needed = network.needed(e, where, state["params"])
    bound = roofline.bound(e, where, machine, state["params"], needed) if machine.chip else None
    return Plan(program, machine, state, needed, bound)
