"""Laws of the learning rate and the batch size, published ones and fits: what recipes of a ladder ask.

N and D are parameters and tokens of the run, a batch is in tokens. Every law here is a power law in logs, and
each was found for one optimiser, schedule and count of N: beyond these its exponents are worth more than its
scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from llm_jax.errors import UserError
from llm_jax.scaling.runs import FLOPS_PER, Runs

HORIZON = 0.3  # Bjorck et al. 2024, arXiv 2409.19913: the best rate falls by about the 0.3rd power of tokens
NEAR = 3.0  # rates within this factor of the best one are fitted: further up they diverge
LEAST = 3  # and at least so many


@dataclass(frozen=True)
class Scale:
    """constant N^params D^tokens B^batch; fields are floats, or arrays [repeats]."""

    constant: np.ndarray | float
    params: np.ndarray | float = 0.0
    tokens: np.ndarray | float = 0.0
    batch: np.ndarray | float = 0.0

    def at(self, params: float, tokens: float, batch: float = 1.0) -> np.ndarray | float:
        return self.constant * params**self.params * tokens**self.tokens * batch**self.batch


@dataclass(frozen=True)
class Rule:
    """A learning rate and a batch for a run. source: of the law, with what it was found for."""

    lr: Scale
    batch: Scale
    source: str = ""

    def batch_tokens(self, params: float, tokens: float) -> np.ndarray | float:
        """Tokens a step."""
        return self.batch.at(params, tokens)

    def rate(self, params: float, tokens: float, batch_tokens: float | None = None) -> np.ndarray | float:
        """The peak, for a batch of so many tokens, which is the rule's own if not given. Only a rule with a
        power of the batch, such as DELPHI, asks for it."""
        return self.lr.at(params, tokens, batch_tokens or self.batch_tokens(params, tokens))


STEP_LAW = Rule(
    Scale(1.797, params=-0.713, tokens=0.307),
    Scale(0.581, tokens=0.571),
    "Step Law, Li et al. 2025, arXiv 2503.04715: AdamW, cosine to a fixed 1e-5, N non-embedding",
)

# lr = .3118 C^-.1250, batch = .2920 C^.3271; C = 6 N D here, theirs M D, M of non-embedding FLOPs a token
DEEPSEEK = Rule(
    Scale(0.3118 * FLOPS_PER**-0.1250, -0.1250, -0.1250),
    Scale(0.2920 * FLOPS_PER**0.3271, 0.3271, 0.3271),
    "DeepSeek LLM, 2024, arXiv 2401.02954: AdamW, steps at 80% and 90%, C of non-embedding FLOPs",
)


def olmo_ladder(sequence_length: int = 2048) -> Rule:
    """lr .0047 (N / 108e6)^(-1/3), batch 160 (N / 108e6)^(2/3) rows of 2,048 tokens; longer rows leave the
    tokens of a batch, and take the rate down by the square of their length: at 4,096 a quarter, as in its
    runs. It warms up over N tokens."""
    scale = (2048 / sequence_length) ** 2
    return Rule(
        Scale(0.0047 * scale * 108e6 ** (1 / 3), params=-1 / 3),
        Scale(160 * 2048 * 108e6 ** (-2 / 3), params=2 / 3),
        "OLMo ladder, Bhagia et al. 2024, arXiv 2412.04403, after Porian et al. 2024, arXiv 2406.19146: "
        "AdamW, cosine, N non-embedding",
    )


# B0 = 64 rows of 4,096 tokens, T0 = 2.5e9 tokens. Its batches are those of 2^16 steps, up to a power of two.
DELPHI = Rule(
    Scale(0.0063 * 2.5e9**0.3 * (64 * 4096) ** -0.5, tokens=-HORIZON, batch=0.5),
    Scale(2.0**-16, tokens=1.0),
    "marin Delphi, 2026, github.com/marin-community/marin/pull/3292: AdamH, whose rates are not AdamW's, WSD "
    "with 10% warm-up and 20% decay",
)

RULES = {
    "step-law": STEP_LAW,
    "deepseek": DEEPSEEK,
    "olmo-ladder": olmo_ladder(),
    "delphi": DELPHI,
}


def horizon(rate: float, tuned_tokens: float, tokens: float, exponent: float = HORIZON) -> float:
    """The rate for a run of ``tokens`` where ``rate`` was best at ``tuned_tokens``, all else the same: times
    (T0/T)^0.3 (Bjorck et al. 2024, arXiv 2409.19913)."""
    return rate * (tuned_tokens / tokens) ** exponent


@dataclass(frozen=True)
class Best:
    """The best rate and batch at one N and D. interior: rates of more loss were tried on both sides, and the
    same of batches where there are several; else it is that of the best run."""

    params: float
    tokens: float
    rate: float
    batch: float
    loss: float
    interior: bool


def optima(
    runs: Runs, lr: str = "lr", batch: str = "batch_tokens", weights: np.ndarray | None = None
) -> list[Best]:
    """One for each N and D of the table. lr, batch: its columns. weights [runs]: how often each was drawn.

    Of each batch a parabola of log loss in log rate, where it has three rates, then one over batches.
    """
    for column in (lr, batch):
        if column not in runs.columns:
            raise UserError(f"the table has no column {column!r}: {', '.join(runs.columns)}")
    weights = np.ones(len(runs)) if weights is None else weights
    cells = np.stack([runs.params, runs.tokens], -1)
    found = []
    for params, tokens in np.unique(cells[weights > 0], axis=0):
        cell = np.flatnonzero((runs.params == params) & (runs.tokens == tokens) & (weights > 0))
        batches = np.unique(runs.columns[batch][cell])
        valleys = []
        for size in batches:
            rows = cell[runs.columns[batch][cell] == size]
            valleys.append(_valley(np.log(runs.columns[lr][rows]), np.log(runs.loss[rows]), weights[rows]))
        rates, losses, inside = (np.array(x) for x in zip(*valleys, strict=True))
        at, loss, between = _valley(np.log(batches), losses, np.ones(len(batches)))
        interior = bool(inside[losses.argmin()] and (between or len(batches) == 1))
        rate = np.interp(at, np.log(batches), rates)
        found.append(
            Best(float(params), float(tokens), math.exp(rate), math.exp(at), math.exp(loss), interior)
        )
    return found


def fit(
    runs: Runs, lr: str = "lr", batch: str = "batch_tokens", of: tuple[str, ...] = ("params", "tokens")
) -> Rule:
    """lr = c N^p D^q and batch = c D^q by least squares in logs through the optima.

    of: what the rate depends on: ("params", "tokens"), one of them, or ("flops",), which is C = 6 N D. A
    batch depends on tokens, or on flops where the rate does. Optima that are not interior count only where
    too few are, less than two a constant. Raises UserError for too few cells, and where N and D
    moved together.
    """
    return _rule(optima(runs, lr, batch), of)


def refit(
    law: Rule,
    runs: Runs,
    weights: np.ndarray,
    losses: np.ndarray | None = None,
    lr: str = "lr",
    batch: str = "batch_tokens",
    of: tuple[str, ...] = ("params", "tokens"),
) -> Rule:
    """One fit a row of ``weights`` [repeats, runs], and of ``losses``; nan where a draw has too few cells.
    Nothing is kept of ``law`` but its source."""
    rules = []
    for k, drawn in enumerate(weights):
        loss = runs.loss if losses is None else losses[k]
        try:
            rules.append(_rule(optima(replace(runs, loss=loss), lr, batch, drawn), of))
        except UserError:
            rules.append(Rule(Scale(np.nan, np.nan, np.nan), Scale(np.nan, np.nan, np.nan)))
    return Rule(_stacked([rule.lr for rule in rules]), _stacked([rule.batch for rule in rules]), law.source)


def _stacked(scales: list[Scale]) -> Scale:
    return Scale(*np.array([list(vars(scale).values()) for scale in scales]).T)


def _rule(found: list[Best], of: tuple[str, ...]) -> Rule:
    interior = [best for best in found if best.interior]
    if len(interior) >= 2 * (1 + len(of)):
        found = interior
    batch_of = of if of == ("flops",) else ("tokens",)
    return Rule(_scale(found, "rate", of), _scale(found, "batch", batch_of), f"{len(found)} optima")


def _scale(found: list[Best], what: str, of: tuple[str, ...]) -> Scale:
    logs = {
        "params": np.log([best.params for best in found]),
        "tokens": np.log([best.tokens for best in found]),
    }
    logs["flops"] = logs["params"] + logs["tokens"]
    x = np.stack([np.ones(len(found)), *(logs[name] for name in of)], -1)
    if len(found) <= len(of) or np.linalg.matrix_rank(x - [0, *x[:, 1:].mean(0)], 1e-3) < x.shape[1]:
        raise UserError(
            f"{len(found)} pairs of N and D cannot tell how the {what} depends on {' and '.join(of)}: "
            "vary each by itself, or fit of=('flops',)"
        )
    level, *slopes = np.linalg.lstsq(x, np.log([getattr(best, what) for best in found]), rcond=None)[0]
    power = dict(zip(of, map(float, slopes), strict=True))
    shared = power.pop("flops", 0.0)
    p, q = power.get("params", shared), power.get("tokens", shared)
    return Scale(math.exp(level), p, q)


def _valley(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[float, float, bool]:
    """Lowest point of the parabola of y in x near the least y, and whether it is inside; else the least y."""
    best = y.argmin()
    nearest = np.sort(np.abs(np.unique(x) - x[best]))[:LEAST]
    near = np.abs(x - x[best]) <= max(np.log(NEAR), nearest[-1]) + 1e-9
    if len(np.unique(x[near])) >= LEAST:
        a, b, c = np.polyfit(x[near] - x[best], y[near], 2, w=np.sqrt(w[near]))
        at = x[best] - b / (2 * a) if a > 0 else np.inf
        if x[near].min() < at < x[near].max():
            return at, c - b**2 / (4 * a), True
    return x[best], y[best], False
