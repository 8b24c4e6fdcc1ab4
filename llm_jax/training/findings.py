"""What a replay found: the sentence, and the numbers behind it for people and for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.training import insides
from llm_jax.training.bad_steps import plain
from llm_jax.training.insides import Insides

LayerNorms = list[dict[str, float]]  # gradient norms by layer, one entry a step
SHOWN = 3  # rows whose text is shown
FINITE = (
    "the numbers are finite on replay: neither the data nor the parameters; suspect the hardware, or a "
    "library that has changed"
)


@dataclass(frozen=True)
class Row:
    """A row of the batch. draw: its number over the whole run; loss: mean over its targets; token: the first
    whose numbers are not finite, counted from 0, or None."""

    draw: int
    loss: float
    token: int | None
    text: str


@dataclass(frozen=True)
class Finding:
    """What a replay shows. where: the place that went wrong first, "" for none; recorded: loss and norm of
    the gradient as the run had them, None where it recorded none; same: whether the replay has their
    bits; usual: gradient norms of the steps before, medians; changed: of the machine and its packages.
    """

    step: int
    begin: int
    where: str
    verdict: str
    loss: float
    grad_norm: float
    limit: float
    recorded: tuple[float, float] | None
    same: bool | None
    insides: Insides
    usual: dict[str, float]
    rows: list[Row]
    changed: dict[str, str]


def judge(
    inside: Insides, loss: float, grad_norm: float, limit: float, usual: dict[str, float], was_bad: bool
) -> tuple[str, str]:
    """(place, sentence): what went wrong first. was_bad: whether the run found the step bad."""
    if inside.params:
        place, names = next(iter(inside.params.items()))
        return place, f"parameters are not finite before the step: {place} ({', '.join(names)})"
    for place, rows in inside.bad_rows.items():
        if rows:
            of = f"{rows} of {inside.finite_nbl.shape[1]} rows"
            return place, f"forward: {place} is the first whose output is not finite, in {of}"
    for place in insides.backward_order(inside):
        if names := inside.gradients.get(place):
            order = "going back, is the first whose gradient is not finite"
            return place, f"backward: {place}, {order} ({', '.join(names)})"
    largest, grown = _grown(inside.grad_norms, usual)
    if not math.isfinite(grad_norm) and math.isfinite(loss):
        return largest, f"backward: the squares of the gradient overflow float32: {grown}"
    if grad_norm > limit:
        return largest, f"spike: the gradient's norm is {grad_norm:.4g}, its limit {limit:.4g}: {grown}"
    return "", FINITE if was_bad else "nothing is wrong with this step"


def _grown(grad_norms: dict[str, float], usual: dict[str, float]) -> tuple[str, str]:
    """The layer whose gradient has grown most, and a phrase that says so."""
    ratios = {place: x / usual[place] for place, x in grad_norms.items() if usual.get(place)}
    if not ratios:
        largest = max(grad_norms, key=grad_norms.get)
        return largest, f"{largest} has the largest; what is usual is not known"
    largest = max(ratios, key=ratios.get)
    return largest, f"{largest} has grown most, to {ratios[largest]:.3g} times its usual norm"


def usual_norms(steps: LayerNorms) -> dict[str, float]:
    """{place: median over the steps}."""
    return {place: float(np.median([layers[place] for layers in steps])) for place in (steps or [{}])[0]}


def describe(finding: Finding) -> dict[str, Any]:
    """A finding as JSON."""
    inside = finding.insides
    values = {name: x for name, x in vars(finding).items() if name != "insides"} | {
        "largest_outputs": inside.largest,
        "bad_rows": inside.bad_rows,
        "parameters_not_finite": inside.params,
        "gradients_not_finite": inside.gradients,
        "grad_norms": inside.grad_norms,
        "rows": [vars(row) for row in finding.rows],
    }
    return plain(values)


def table(finding: Finding) -> str:
    """A finding to be read."""
    f, inside = finding, finding.insides
    begun = f"the checkpoint of step {f.begin:,}" if f.begin else "step 0"
    columns = {
        "output max": inside.largest,
        "bad rows": inside.bad_rows,
        "gradient": inside.grad_norms,
        "usual": f.usual,
    }
    names = list(dict.fromkeys([*inside.places, *inside.grad_norms]))
    width = max(map(len, names))
    lines = [f"step {f.step:,}, replayed from {begun}", " " * width + "".join(f"{c:>12}" for c in columns)]
    for name in names:
        cells = (f"{column[name]:.4g}" if name in column else "-" for column in columns.values())
        lines.append(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append(f"loss {f.loss:.6g}, gradient norm {f.grad_norm:.6g}, its limit {f.limit:.6g}")
    if f.recorded:
        how = "the same bits" if f.same else "NOT the same"
        lines.append(f"recorded: loss {f.recorded[0]:.6g}, gradient norm {f.recorded[1]:.6g}: {how}")
    lines += [f"changed since: {name} {change}" for name, change in f.changed.items()]
    draws = [row.draw for row in f.rows]
    lines.append(f"rows {min(draws):,} to {max(draws):,} of the run; those to look at first:")
    for row in f.rows[:SHOWN]:
        bad = "" if row.token is None else f", not finite from token {row.token}"
        lines.append(f"  row {row.draw:,}: loss {row.loss:.4f}{bad}: {row.text[:200]!r}")
    return "\n".join([*lines, f.verdict])
