"""Which meshes, micro-batches and recomputations fit a machine, the fastest first."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console
from rich.progress import track

from llm_jax.errors import UserError
from llm_jax.planning import layout, plan
from llm_jax.planning.machine import Machine
from llm_jax.planning.plan import Plan
from llm_jax.training.experiment import Experiment

MOST_TENSOR = 16  # more than the heads of a key-value group or the links of a torus can serve


def search(experiment: Experiment, machine: Machine, count: int) -> list[Plan]:
    """The ``count`` plans that fit with the highest bound of tokens a second; of equals those first whose
    step is the shortest where nothing overlaps."""
    if machine.chip is None:
        raise UserError(f"--search needs to know the chip's peaks; of {machine.name} they are not known")
    fitting = [one for plans in _families(experiment, machine) for one in _that_fit(plans)]
    return sorted(fitting, key=_order)[:count]


def _order(plan: Plan) -> tuple[float, float]:
    r = plan.roofline
    return -round(r.tokens_per_second), r.compute + r.memory + r.network


def _families(e: Experiment, machine: Machine) -> Iterator[list[Plan]]:
    """Plans that differ in their micro-batch alone, the largest first."""
    stderr = Console(stderr=True)
    for mesh in track(list(_meshes(machine)), "meshes", console=stderr, transient=True):
        state = None  # the same for all of a mesh
        for remat in (False, True):
            plans = []
            for accumulation in _divisors(e.global_batch_size):
                with suppress(UserError):  # what does not divide is not among them
                    program = layout.prepare(_changed(e, mesh, accumulation, remat), machine)
                    state = state or layout.state(program)
                    plans.append(plan.of_program(program, machine, state))
            yield plans


def _that_fit(plans: list[Plan]) -> list[Plan]:
    """Bisection, as a smaller micro-batch never takes more: a plan's memory is traced for half a second."""
    if not plans or plans[0].at_rest > plans[0].capacity:
        return []
    return plans[bisect.bisect_left(plans, True, key=lambda one: one.fits) :]


def _changed(e: Experiment, mesh: dict[str, int], accumulation: int, remat: bool) -> Experiment:
    rows = e.global_batch_size // accumulation
    return dataclasses.replace(
        e,
        accumulation=accumulation,
        model=dataclasses.replace(e.model, remat=remat),
        mesh=dataclasses.replace(e.mesh, recipe="ddp", **mesh),
        evaluation=dataclasses.replace(e.evaluation, batch_size=rows),
    )


def _meshes(machine: Machine) -> Iterator[dict[str, int]]:
    """Sizes of replica, data, fsdp and tensor whose product is the machine's devices."""
    inside = machine.devices // machine.slices
    for tensor in _divisors(min(inside, MOST_TENSOR)):
        for fsdp in _divisors(inside // tensor):
            data = inside // tensor // fsdp
            yield {"replica": machine.slices, "data": data, "fsdp": fsdp, "tensor": tensor}


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
