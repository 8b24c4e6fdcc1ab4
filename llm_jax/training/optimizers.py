"""Optimisers by parameter rules: one list of regular expressions over parameter names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax

from llm_jax.config import identity
from llm_jax.errors import UserError


@dataclass(frozen=True)
class Rule:
    """For parameters whose whole name (``blocks/mlp/in``) matches: multipliers of the common values.

    learning_rate 0 freezes. The first rule that matches a parameter decides; one must.
    """

    match: str = identity(".*")
    learning_rate: float = identity(1.0)
    weight_decay: float = identity(1.0)


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) after clipping by global norm.

    weight_decay is multiplied by the learning rate, as in PyTorch. clip_norm 0 = no clipping.
    """

    learning_rate: float = identity(1e-3)
    beta1: float = identity(0.9)
    beta2: float = identity(0.95)
    epsilon: float = identity(1e-8)
    weight_decay: float = identity(0.1)
    clip_norm: float = identity(1.0)
    rules: tuple[Rule, ...] = identity((Rule(".*scale", weight_decay=0.0), Rule()))

    def core(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.beta1, self.beta2, self.epsilon)


OPTIMIZERS = {"adamw": AdamW}


class Optimizer(NamedTuple):
    """An optax transformation and a way to read its learning rate from its state."""

    transformation: optax.GradientTransformation
    schedule: optax.Schedule

    def learning_rate(self, opt_state: Any) -> jax.Array:
        """The rate of the next update; the count inside is of updates applied, not of steps."""
        return self.schedule(opt_state[-1].count)


def build(config: AdamW, schedule: optax.Schedule) -> Optimizer:
    """Clipping, core, then decay and rate by the rules.

    Its init raises UserError for a parameter that no rule matches and a rule that matches none.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    rules = _apply_rules(config.rules, config.weight_decay)
    rate = optax.scale_by_learning_rate(schedule)
    return Optimizer(optax.chain(clip, config.core(), rules, rate), schedule)


def _apply_rules(rules: tuple[Rule, ...], weight_decay: float) -> optax.GradientTransformation:
    """update -> (update + decay * parameter) * rate, each parameter by its rule."""

    def init(params: Any) -> optax.EmptyState:
        match_rules(rules, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def one(u: jax.Array, p: jax.Array, rule: Rule) -> jax.Array:
            decay = weight_decay * rule.weight_decay
            return (u + decay * p if decay else u) * rule.learning_rate

        return jax.tree.map(one, updates, params, match_rules(rules, params)), state

    return optax.GradientTransformation(init, update)


def match_rules(rules: tuple[Rule, ...], params: Any) -> Any:
    """The rule of every parameter, as a tree of Rules."""
    used = set()

    def find(path: tuple, _: Any) -> Rule:
        name = parameter_name(path)
        for rule in rules:
            if re.fullmatch(rule.match, name):
                used.add(rule)
                return rule
        raise UserError(f"no rule of config.optimizer.rules matches parameter {name}")

    tree = jax.tree_util.tree_map_with_path(find, params)
    idle = [rule.match for rule in rules if rule not in used]
    if idle:
        raise UserError(f"config.optimizer.rules: {idle[0]!r} decides no parameter; drop or move it")
    return tree


def parameter_name(path: tuple) -> str:
    """``blocks/mlp/in`` of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
