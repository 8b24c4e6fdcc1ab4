"""What a law says of a run that has not been made: its best size and tokens, a smaller model for much use,
and what to do with too little text.

Losses are nats a token. N, D and FLOPs are counted as the runs of the law counted them; training makes
flops_per * N * D FLOPs. What a law does not know is not known here: see docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling import backtest, study
from llm_jax.scaling.laws import published, repeated
from llm_jax.scaling.laws.surface import Surface
from llm_jax.scaling.next_run import Candidate

LEVEL = 0.9  # of intervals
SMALLEST, LARGEST = 1e2, 1e20  # parameters, and tokens, between which an answer is looked for
SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 8)  # of the best size, that are shown


class Law(Protocol):
    """Of the best run of a budget. A surface has loss(params, tokens) and flops_per, too: FLOPs of training a
    parameter a token, of which the forward pass is a third."""

    def optimum(self, flops: float) -> tuple[np.ndarray, np.ndarray]: ...
    def frontier(self, flops: float) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """A law, and where it is from. resampled: the same law with fields [repeats], where there is one; noise:
    standard deviation of a run's log loss about it, where it was fitted."""

    law: Law
    resampled: Law | None
    about: str
    noise: float = 0.0


@dataclass(frozen=True)
class Optimum:
    """The run of least loss for a budget. intervals: of params, tokens and loss, the middle LEVEL of
    resampled fits; empty without them."""

    flops: float
    params: float
    tokens: float
    loss: float
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Plan:
    """A run and its use. training, inference: FLOPs."""

    params: float
    tokens: float
    training: float
    inference: float


@dataclass(frozen=True)
class Smaller:
    """A model of a share of the best size, trained to the same loss.

    training: its FLOPs over those of the best size. pays_after: tokens of inference from which it costs less
    in all.
    """

    share: float
    params: float
    tokens: float
    training: float
    pays_after: float


@dataclass(frozen=True)
class Use:
    """Of a model of some loss. usual: the run that is cheapest to train; least: the cheapest with its use.
    smaller: of SHARES those that reach the loss with any number of tokens."""

    inference_tokens: float
    usual: Plan
    least: Plan
    smaller: tuple[Smaller, ...]

    @property
    def saved(self) -> float:
        """Share of all FLOPs, training and inference."""
        least, usual = (plan.training + plan.inference for plan in (self.least, self.usual))
        return 1 - least / usual


@dataclass(frozen=True)
class Constrained:
    """The best run with ``unique`` tokens. epochs: how often each is seen, 1 if there are more than the run
    needs. given_up: nats above the best run with text without end. once: loss of a run that sees each token
    once and puts the rest of the compute into parameters."""

    unique: float
    params: float
    tokens: float
    loss: float
    epochs: float
    given_up: float
    once: float


def optimum(law: Law, flops: float, resampled: Law | None = None) -> Optimum:
    """resampled: for intervals, the same law with fields [repeats]."""
    params, tokens = law.optimum(flops)
    intervals = {}
    if resampled is not None:
        found = dict(zip(("params", "tokens"), resampled.optimum(flops), strict=True))
        found["loss"] = resampled.frontier(flops)
        intervals = {name: _middle(values) for name, values in found.items()}
    return Optimum(flops, float(params), float(tokens), float(law.frontier(flops)), intervals)


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def tokens_for(law: Law, params: np.ndarray | float, loss: float) -> np.ndarray:
    """Tokens that bring models of these sizes to a loss: [sizes], inf where none do. By bisection, as every
    law's loss falls with tokens."""
    params = np.asarray(params, float)
    low, high = np.full(params.shape, np.log(SMALLEST)), np.full(params.shape, np.log(LARGEST))
    possible = law.loss(params, np.exp(high)) <= loss
    for _ in range(60):  # halves 41 nats to less than a float's last bit
        middle = (low + high) / 2
        enough = law.loss(params, np.exp(middle)) <= loss
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(possible, np.exp(high), np.inf)


def cheapest(law: Law, loss: float, inference_tokens: float = 0.0) -> Plan:
    """The run to a loss that is cheapest with its use: least 6 N D + 2 N D_inference (Sardana et al. 2023,
    arXiv 2401.00448), where a token read costs as much as one written. Raises UserError for a loss that is
    out of reach, and for a law that knows best runs alone."""
    if not hasattr(law, "loss"):
        raise UserError("this law knows the best run of a budget alone; take a surface, such as chinchilla")

    def total(log_params: np.ndarray) -> np.ndarray:
        params = np.exp(log_params)
        return params * law.flops_per * (tokens_for(law, params, loss) + inference_tokens / 3)

    params = float(np.exp(_lowest(total, np.log(SMALLEST), np.log(LARGEST))))
    plan = _plan(law, params, loss, inference_tokens)
    if not np.isfinite(plan.tokens):
        raise UserError(f"a loss of {loss:g} nats a token is out of this law's reach, whatever the compute")
    return plan


def _lowest(function: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """Where a function of one minimum, which may be inf to the left of it, is least: by ever finer grids."""
    while True:
        grid = np.linspace(low, high, 201)
        best = int(np.argmin(function(grid)))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 200)]
        if high - low < 1e-6:
            return float(grid[best])


def _plan(law: Law, params: float, loss: float, inference_tokens: float) -> Plan:
    tokens = float(tokens_for(law, params, loss))
    per = law.flops_per
    return Plan(params, tokens, per * params * tokens, per / 3 * params * inference_tokens)


def use(law: Law, loss: float, inference_tokens: float) -> Use:
    """What a smaller model of the same loss costs to train, and saves where it is used."""
    usual = dataclasses.replace(
        best := cheapest(law, loss), inference=law.flops_per / 3 * best.params * inference_tokens
    )
    rows = []
    for share in SHARES:
        plan = _plan(law, share * best.params, loss, 0.0)
        if np.isfinite(plan.tokens):
            saved = law.flops_per / 3 * (best.params - plan.params)  # by a token of inference
            pays = (plan.training - best.training) / saved
            rows.append(Smaller(share, plan.params, plan.tokens, plan.training / best.training, pays))
    return Use(inference_tokens, usual, cheapest(law, loss, inference_tokens), tuple(rows))


def constrained(law: Law, flops: float, unique: float) -> Constrained:
    """What to do with ``unique`` tokens, by the worth of repeated ones in Muennighoff et al. 2023
    (laws/repeated.py): their R_D and R_N on top of the constants of ``law``, unless it has its own. Raises
    UserError for a law of another form."""
    if not isinstance(law, Surface | repeated.Repeated):
        raise UserError(
            "--unique-tokens needs a law of the form E + A/N^alpha + B/D^beta, such as chinchilla"
        )
    of = law if isinstance(law, repeated.Repeated) else repeated.of(law)
    params, tokens = (float(x) for x in of.optimum(flops, unique))
    loss, free = float(of.frontier(flops, unique)), float(of.frontier(flops))
    at_once = min(unique, float(of.optimum(flops)[1]))
    once = float(of.loss(flops / (of.flops_per * at_once), at_once, unique))
    return Constrained(unique, params, tokens, loss, max(1.0, tokens / unique), loss - free, once)


def load(spec: str, method: str = "") -> Source:
    """A published law by name, or one of a file that scripts/fit_scaling_law.py --json has written. method:
    which; "" = whose backtest was best at the best loss of a budget.

    Raises UserError for a name or file that is not there, and for a law that cannot be told from the file.
    """
    if not spec.endswith(".json"):
        found = published.law(spec)
        return Source(found.law, None, f"{spec}: {found.source}; N counts {found.counts} parameters")
    content = study.read(Path(spec))
    methods = content["methods"]
    only = next(iter(methods)) if len(methods) == 1 else ""
    method = method or content.get("chosen", {}).get(backtest.FRONTIER, only)
    if method not in methods:
        raise UserError(f"--law={spec} has {', '.join(methods)}: choose one by --method, by its backtest")
    law, resampled = study.law_of(methods[method])
    return Source(law, resampled, f"{spec}: {method}", methods[method].get("residual", 0.0))


def optimum_lines(best: Optimum) -> Iterator[str]:
    """As a person reads it."""
    shown = {name: f" ({LEVEL:.0%}: {low:.4g} to {high:.4g})" for name, (low, high) in best.intervals.items()}
    yield f"the best run of {best.flops:.4g} FLOPs by this law:"
    yield f"  {best.params:.4g} parameters{shown.get('params', '')}"
    yield f"  {best.tokens:.4g} tokens{shown.get('tokens', '')}, {best.tokens / best.params:,.3g} a parameter"
    yield f"  {best.loss:.4f} nats a token{shown.get('loss', '')}"


def use_lines(found: Use) -> Iterator[str]:
    usual, least = found.usual, found.least
    yield f"with {found.inference_tokens:.4g} tokens of inference, the cheapest model of that loss in all:"
    yield (
        f"  {least.params:.4g} parameters ({least.params / usual.params:.2f} of the best to train), "
        f"{least.tokens:.4g} tokens, {least.tokens / least.params:,.3g} a parameter"
    )
    yield (
        f"  training costs {least.training / usual.training - 1:+.1%}, training and inference "
        f"{-found.saved:+.1%}: {least.training + least.inference:.4g} FLOPs"
    )
    yield f"  {'size':>6} {'parameters':>11} {'tokens':>11} {'training':>9}  pays after tokens of inference"
    for row in found.smaller:
        size = f"{row.share:6.3f} {row.params:11.4g} {row.tokens:11.4g}"
        yield f"  {size} {row.training:8.3f}x  {row.pays_after:.4g}"
    if len(found.smaller) < len(SHARES):
        yield "  still smaller ones never reach that loss"


def constrained_lines(best: Constrained) -> Iterator[str]:
    if best.epochs < 1.001:
        yield f"{best.unique:.4g} unique tokens are enough for one pass"
        return
    yield f"with {best.unique:.4g} unique tokens:"
    yield f"  {best.params:.4g} parameters, {best.tokens:.4g} tokens: {best.epochs:.3g} epochs"
    yield f"  {best.loss:.4f} nats a token: {best.given_up:.4f} more than with text without end"
    yield f"  {best.once:.4f} if each token is seen once and the compute goes into parameters"


def next_lines(found: Sequence[Candidate], target: float) -> Iterator[str]:
    yield f"the next run, to know the loss at {target:.4g} FLOPs better:"
    for c in found:
        size = f"{c.params:.4g} parameters, {c.tokens:.4g} tokens"
        left = f"leave {c.left:.0%} of the forecast's deviation"
        yield f"  {c.flops:.3g} FLOPs ({c.flops / target:.0%}): {size} {left}"
