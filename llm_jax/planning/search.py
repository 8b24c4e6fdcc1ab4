"""Which meshes, micro-batches and recomputations fit a machine, the fastest first."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
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
SHORTEST_PIECE = 8192  # tokens of a row on a device: shorter ones are cut along tensor as well


def search(experiment: Experiment, machine: Machine, count: int) -> list[Plan]:
    """The ``count`` plans that fit with the highest bound of tokens a second; of equals those first whose
    step is the shortest where nothing overlaps."""
    if machine.chip is None:
        raise UserError(f"--search needs to know the chip's peaks; of {machine.name} they are not known")
    likely = [one for plans in _families(experiment, machine) for one in _likely_to_fit(plans)]
    fitting = (one for one in sorted(likely, key=_order) if one.fits)
    return list(itertools.islice(fitting, count))


def _order(plan: Plan) -> tuple[float, float]:
    r = plan.roofline
    return -round(r.tokens_per_second), r.compute + r.memory + r.network


def _families(e: Experiment, machine: Machine) -> Iterator[list[Plan]]:
    """Plans that differ in their micro-batch alone, the largest first."""
    stderr = Console(stderr=True)
    for mesh in track(list(_meshes(e, machine)), "meshes", console=stderr, transient=True):
        state = None  # the same for all of a mesh
        for remat in (False, True):
            plans = []
            for accumulation in _divisors(e.global_batch_size):
                with suppress(UserError):  # what does not divide is not among them
                    program = layout.prepare(_changed(e, mesh, accumulation, remat), machine)
                    state = state or layout.state(program)
                    plans.append(plan.of_program(program, machine, state))
            yield plans


def _likely_to_fit(plans: list[Plan]) -> list[Plan]:
    """Bisection, as a smaller micro-batch takes less, but for where another attention kernel is chosen: a
    plan's memory is traced for half a second."""
    if not plans or plans[0].at_rest > plans[0].capacity:
        return []
    return plans[bisect.bisect_left(plans, True, key=lambda one: one.fits) :]


def _changed(e: Experiment, mesh: dict[str, int], accumulation: int, remat: bool) -> Experiment:
    rows = e.global_batch_size // accumulation
    return dataclasses.replace(
        e,
        accumulation=accumulation,
        model=dataclasses.replace(e.model, remat=remat),
        mesh=dataclasses.replace(e.mesh, recipe="ddp", stage_rounds=1, stage_parts=0, **mesh),
        evaluation=dataclasses.replace(e.evaluation, batch_size=rows),
    )


def _meshes(e: Experiment, machine: Machine) -> Iterator[dict[str, int]]:
    """Sizes of the axes whose product is the machine's devices: context where rows are long, expert where
    there are experts, stage between nodes of GPUs, whose network is slower than that inside."""
    inside = machine.devices // machine.slices
    choices = {
        "tensor": [n for n in _divisors(MOST_TENSOR) if e.model.num_heads % n == 0],
        "context": _divisors(max(e.data.sequence_length // SHORTEST_PIECE, 1)),
        "expert": _divisors(e.model.num_experts or 1),
        "stage": _divisors(machine.shape[-1] if machine.device.platform == "gpu" else 1),
    }
    for sizes in itertools.product(*choices.values()):
        left, over = divmod(inside, math.prod(sizes))
        for fsdp in _divisors(left) if not over else ():
            own = dict(zip(choices, sizes, strict=True))
            yield {"replica": machine.slices, "data": left // fsdp, "fsdp": fsdp, **own}


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
