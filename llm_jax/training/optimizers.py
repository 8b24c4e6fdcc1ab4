"""Optimisers: a dataclass each, assembled by one list of rules over parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import optax

from llm_jax.config import identity, part
from llm_jax.errors import UserError
from llm_jax.training import moments, norms
from llm_jax.training.adafactor import scale_by_factored_moments
from llm_jax.training.muon import scale_by_muon
from llm_jax.training.rules import OWN, Rule, by_rule, check_rules, route

GAINS_AND_BIASES = ".*(scale|bias)"


@dataclass(frozen=True)
class Section:
    """What every optimiser has; the learning rate is the schedule's peak.

    weight_decay: p -= rate * weight_decay * p beside the update (decoupled, Loshchilov and Hutter 2017,
    arXiv 1711.05101), or added to the gradient where the class says so. clip_norm: of all gradients that
    move something together, before anything else; 0 = no clipping.
    """

    learning_rate: float = identity(1e-3)
    weight_decay: float = identity(0.0)
    clip_norm: float = identity(1.0)
    rules: tuple[Rule, ...] = identity((Rule(GAINS_AND_BIASES, weight_decay=0.0), Rule()))

    decays_gradients: ClassVar[bool] = False

    def core(self) -> optax.GradientTransformation:
        """Gradients to updates of rate 1, without decay; its update takes ``applied`` as in moments.py."""
        raise NotImplementedError

    def cores(self) -> dict[str, optax.GradientTransformation]:
        """The section's own, and those that its rules may name."""
        return {OWN: self.core()}


@dataclass(frozen=True)
class Moments:
    """The two running means of Adam (Kingma and Ba 2014, arXiv 1412.6980)."""

    beta1: float = identity(0.9)
    beta2: float = identity(0.95)
    epsilon: float = identity(1e-8)

    def core(self) -> optax.GradientTransformation:
        return moments.scale_by_adam(self.beta1, self.beta2, self.epsilon)


@dataclass(frozen=True)
class AdamW(Moments, Section):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101); weight decay as in PyTorch."""

    weight_decay: float = identity(0.1)


@dataclass(frozen=True)
class Adam(Moments, Section):
    """Adam as first published (Kingma and Ba 2014, arXiv 1412.6980); weight decay is L2, as in PyTorch's."""

    beta2: float = identity(0.999)

    decays_gradients: ClassVar[bool] = True


@dataclass(frozen=True)
class SGD(Section):
    """Gradient descent with heavy-ball or Nesterov momentum (Sutskever et al. 2013); decay is L2.

    momentum 0 = none. As in PyTorch, m = momentum * m + g, without a factor 1 - momentum.
    """

    learning_rate: float = identity(0.1)
    momentum: float = identity(0.9)
    nesterov: bool = identity(False)

    decays_gradients: ClassVar[bool] = True

    def core(self) -> optax.GradientTransformation:
        if not self.momentum:
            return moments.choosing(optax.identity())
        return moments.trace(self.momentum, self.nesterov)


@dataclass(frozen=True)
class Lion(Section):
    """The sign of a mean (Chen et al. 2023, arXiv 2302.06675): a rate 3 to 10 times below AdamW's, a decay
    as many times above. beta1: of the mean whose sign is taken; beta2: of the mean that is kept."""

    learning_rate: float = identity(1e-4)
    weight_decay: float = identity(1.0)
    beta1: float = identity(0.9)
    beta2: float = identity(0.99)

    def core(self) -> optax.GradientTransformation:
        return moments.choosing(optax.scale_by_lion(self.beta1, self.beta2))


@dataclass(frozen=True)
class Adafactor(Section):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) without momentum; fields as in adafactor.py.

    The rate is relative to the size of each matrix, hence larger than AdamW's.
    """

    learning_rate: float = identity(1e-2)
    decay_rate: float = identity(0.8)
    clip_threshold: float = identity(1.0)
    relative: bool = identity(True)
    min_factored: int = identity(128)

    def core(self) -> optax.GradientTransformation:
        return scale_by_factored_moments(
            self.decay_rate, self.clip_threshold, self.relative, self.min_factored
        )


@dataclass(frozen=True)
class Muon(Section):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for embeddings, head, gains and biases.

    match_adamw: scale updates to AdamW's size, so that one learning rate serves both (Liu et al. 2025,
    arXiv 2502.16982). Without it Muon wants a rate near 0.02, and the rules must give AdamW its share.
    """

    weight_decay: float = identity(0.1)
    momentum: float = identity(0.95)
    nesterov: bool = identity(True)
    match_adamw: bool = identity(True)
    adamw: Moments = part(Moments)
    rules: tuple[Rule, ...] = identity(
        (
            Rule(GAINS_AND_BIASES, weight_decay=0.0, optimizer="adamw"),
            Rule("blocks/(attention|mlp)/.*"),
            Rule(optimizer="adamw"),
        )
    )

    def core(self) -> optax.GradientTransformation:
        return scale_by_muon(self.momentum, self.nesterov, self.match_adamw)

    def cores(self) -> dict[str, optax.GradientTransformation]:
        return {OWN: self.core(), "adamw": self.adamw.core()}


OPTIMIZERS = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": SGD,
    "lion": Lion,
    "adafactor": Adafactor,
    "muon": Muon,
}


class Optimizer(NamedTuple):
    """An optax transformation and a way to read its learning rate from its state."""

    transformation: optax.GradientTransformation
    schedule: optax.Schedule

    def learning_rate(self, opt_state: Any) -> jax.Array:
        """The rate of the next update; the count inside is of updates applied, not of steps."""
        return self.schedule(opt_state[-1].count)


def check(config: Section) -> None:
    """Raises UserError for rules that no parameters could make right."""
    check_rules(config.rules, config.cores())
    for rule in config.rules:
        owner = config if rule.optimizer == OWN else getattr(config, rule.optimizer)
        if rule.epsilon != 1.0 and not (rule.epsilon > 0.0 and isinstance(owner, Moments)):
            raise UserError(
                f"config.optimizer.rules: {rule.match!r} has epsilon={rule.epsilon}, a factor above 0 on the "
                "epsilon of Adam and AdamW; other optimizers have none: leave it out"
            )


def build(config: Section, schedule: optax.Schedule) -> Optimizer:
    """Clipping, core, then decay and rate by the rules; states in this order, the core's second.

    Its init raises UserError for a parameter that no rule matches and a rule that matches none.
    """
    check(config)
    rules = config.rules

    def decayed(u: jax.Array, p: jax.Array, rule: Rule) -> jax.Array:
        decay = config.weight_decay * rule.weight_decay
        return u + decay * p if decay else u

    mask_frozen = by_rule(rules, lambda u, p, rule: u)  # so that they do not count in the norm
    clip = norms.clip(config.clip_norm) if config.clip_norm else optax.identity()
    decay = by_rule(rules, decayed)
    multiply = by_rule(rules, lambda u, p, rule: u * rule.learning_rate)
    if config.decays_gradients:
        before, after = (mask_frozen, clip, decay), (multiply,)
    else:
        before, after = (mask_frozen, clip), (decay, multiply)
    if any(rule.epsilon != 1.0 for rule in rules):  # m / (sqrt(v) + c eps) = (m / c) / (sqrt(v) / c + eps)
        before = (*before, by_rule(rules, lambda u, p, rule: u / rule.epsilon))
    rate = moments.choosing(optax.scale_by_learning_rate(schedule))
    core = route(rules, config.cores())
    return Optimizer(optax.chain(optax.chain(*before), core, optax.chain(*after), rate), schedule)
