"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from llm_jax.planning import layout
from llm_jax.planning.plan import Plan

HOURS_A_DAY = 24
SECONDS_AN_HOUR = 3600


def summary(plan: Plan, tokens: float, price: float) -> Iterator[str]:
    """tokens: the budget to count days for, 0 = the config's own; price: dollars a chip-hour, 0 = unknown."""
    e, m = plan.experiment, plan.machine
    counts = layout.parameters(plan.state["params"])
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh().items()) or "one device"
    yield f"{m.name}{f' x {m.slices} slices' if m.slices > 1 else ''}: {m.devices:,} devices as {mesh}"
    yield f"parameters: {counts.pop('total'):,}  ({', '.join(f'{k} {v:,}' for k, v in counts.items())})"
    rows = layout.Tokens.in_block(e, plan.program.layout).rows
    yield (
        f"a step: {e.global_batch_size:,} rows of {e.data.sequence_length:,} tokens, {rows} rows a device at "
        f"a time, {e.accumulation} micro-batches{', blocks recomputed' if e.model.remat else ''}"
    )
    if "stage" in plan.mesh():
        yield (
            f"a pipeline: {plan.program.layout.parts(e.micro_batch)} parts of a micro-batch, "
            f"{plan.program.layout.rounds} rounds; {plan.bubble:.1%} of a device's ticks are idle"
        )
    yield from _memory(plan)
    yield from _network(plan)
    if plan.roofline:
        yield from _speed(plan, tokens or e.steps * e.global_batch_size * e.data.sequence_length, price)
    else:
        yield "speed: not known, as the peaks of this device are not"


def _memory(plan: Plan) -> Iterator[str]:
    yield "memory of a device, GB:"
    for cause, size in plan.memory.items():
        yield f"  {cause:16} {size / 1e9:9.3f}"
    if plan.capacity:
        yield f"  {'there is':16} {plan.capacity / 1e9:9.3f}"
    if compiled := plan.compiled.get("memory"):
        parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in compiled.items())
        yield f"  the compiler says: {parts} ({plan.compiled['seconds']:.0f} s to compile)"
    if found := plan.compiled.get("out_of_memory"):
        yield f"  the compiler says: {found}"
    if not plan.fits:
        yield f"  IT DOES NOT FIT: {mend(plan)}"


def mend(plan: Plan) -> str:
    """What takes most of the memory, and what would make it less."""
    causes = {cause: size for cause, size in plan.memory.items() if cause != "total"}
    worst = max(causes, key=causes.get)
    advice = {
        "parameters": "cut them further (mesh.fsdp, mesh.tensor) or take more devices",
        "optimizer": "cut it further (mesh.fsdp, mesh.tensor) or take more devices",
        "gradients": "cut them further (mesh.fsdp, mesh.tensor; mesh.zero=3)",
        "activations": "fewer rows at a time (accumulation), model.remat=True, mesh.tensor or mesh.context",
        "layer": "fewer rows at a time (accumulation), mesh.tensor or mesh.context",
        "gathered layer": "mesh.tensor",
        "head": "mesh.tensor, which cuts the vocabulary",
        "logits": "mesh.tensor, which cuts the vocabulary",
    }
    return f"{worst} take most, {causes[worst] / 1e9:.1f} GB: {advice.get(worst, 'take more devices')}"


def _network(plan: Plan) -> Iterator[str]:
    rows, compiled = plan.collectives(), "collectives" in plan.compiled
    if rows:
        yield f"sent by a device in a step, GB:{'':14} least{'   compiled' if compiled else ''}"
    for row in rows:
        made = f"  {row['bytes'] / 1e9:9.3f}" if compiled else ""
        yield f"  {row['kind']:18} {row['axis']:16} {row['minimum_bytes'] / 1e9:9.3f}{made}"


def _speed(plan: Plan, tokens: float, price: float) -> Iterator[str]:
    r = plan.roofline
    parts = ", ".join(f"{name} {getattr(r, name):.4f}" for name in ("compute", "memory", "network"))
    yield f"a step takes at least, s: {parts}: {r.limit} is the limit"
    yield f"MFU at most {r.mfu:.1%} (attention by its mask), {r.tokens_per_second:,.0f} tokens/s"
    hours = tokens / r.tokens_per_second / SECONDS_AN_HOUR
    cost = f", {hours * plan.machine.devices * price:,.0f} dollars at {price} a chip-hour" if price else ""
    yield f"{tokens / 1e9:,.1f} billion tokens: at least {hours / HOURS_A_DAY:,.1f} days{cost}"


def explain(plan: Plan) -> Iterator[str]:
    """Layout and bytes on a device of every parameter and activation."""
    yield f"{'parameter':36} {'shape':26} {'cut along':34} bytes a device"
    for array in plan.state["params"]:
        yield f"{array.name:36} {_shape(array.shape):26} {_cut(array.spec):34} {array.bytes:>14,}"
    yield ""
    yield f"{'activation of a block':36} {'shape on a device':26} {'axes':34} bytes a device"
    width = layout.Tokens.of(plan.experiment, plan.program.layout).width
    for name, (shape, axes) in layout.activations(plan.experiment, plan.program.layout).items():
        size = width
        for one in shape:
            size *= one
        yield f"{name:36} {_shape(shape):26} {axes:34} {size:>14,}"


def ranking(plans: list[Plan]) -> Iterator[str]:
    yield f"{'tokens/s':>12} {'MFU':>6} {'GB':>7}  limit    mesh; rows a device; remat"
    for one in plans:
        r, e = one.roofline, one.experiment
        mesh = ", ".join(f"{axis} {size}" for axis, size in one.mesh().items())
        rows = layout.Tokens.in_block(e, one.program.layout).rows
        gigabytes, remat = one.memory["total"] / 1e9, "remat" if e.model.remat else "none"
        speed = f"{r.tokens_per_second:12,.0f} {r.mfu:6.1%}"
        yield f"{speed} {gigabytes:7.1f}  {r.limit:8} {mesh}; {rows}; {remat}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _cut(spec: tuple) -> str:
    return (
        ", ".join("-" if not cut else cut if isinstance(cut, str) else "+".join(cut) for cut in spec) or "-"
    )
