"""Rules: one list of regular expressions over parameter names says what happens to every parameter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.config import identity
from llm_jax.errors import UserError

OWN = ""  # the optimiser that the section is named after
_LABELS = {OWN: "own"}  # in the state, whose keys are file names of a checkpoint and must not be empty
_FROZEN = "frozen"


@dataclass(frozen=True)
class Rule:
    """For parameters whose whole name (``blocks/mlp/in``) matches: multipliers of the common values.

    learning_rate 0 freezes: such a parameter never moves and holds no optimiser state. optimizer: "" is
    the section's own; else one of its secondary ones, "adamw" in Muon. epsilon: of Adam alone. The first rule
    that matches a parameter decides; one must.
    """

    match: str = identity(".*")
    learning_rate: float = identity(1.0)
    weight_decay: float = identity(1.0)
    optimizer: str = identity("", neutral="")
    epsilon: float = identity(1.0, neutral=1.0)


def check_rules(rules: tuple[Rule, ...], optimizers: Iterable[str]) -> None:
    """What can be said before the parameters are known. optimizers: the names a rule may give."""
    for rule in rules:
        try:
            re.compile(rule.match)
        except re.error as error:
            raise UserError(
                f"config.optimizer.rules: {rule.match!r} is no regular expression: {error}"
            ) from None
        if rule.optimizer not in optimizers:
            known = ", ".join(repr(name) for name in optimizers)
            raise UserError(
                f"config.optimizer.rules: {rule.match!r} asks for optimizer {rule.optimizer!r}; "
                f"this section has {known}"
            )


def match_rules(rules: tuple[Rule, ...], params: Any) -> Any:
    """The rule of every parameter, as a tree of Rules.

    Raises UserError for a parameter that no rule matches and for a rule that decides none.
    """
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


def by_rule(
    rules: tuple[Rule, ...], change: Callable[[jax.Array, jax.Array, Rule], jax.Array]
) -> optax.GradientTransformation:
    """Every update becomes ``change(update, parameter, rule)``; those of frozen parameters become 0."""

    def init(params: Any) -> optax.EmptyState:
        match_rules(rules, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def one(u: jax.Array, p: jax.Array, rule: Rule) -> jax.Array:
            return change(u, p, rule) if rule.learning_rate else jnp.zeros_like(u)

        return jax.tree.map(one, updates, params, match_rules(rules, params)), state

    return optax.GradientTransformation(init, update)


def route(
    rules: tuple[Rule, ...], optimizers: Mapping[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Every parameter to the optimiser that its rule names; a frozen one to none.

    Where all go to the section's own, the state is that optimiser's, with nothing around it.
    """

    def label(rule: Rule) -> str:
        return _LABELS.get(rule.optimizer, rule.optimizer) if rule.learning_rate else _FROZEN

    def chosen(params: Any) -> optax.GradientTransformation:
        labels = jax.tree.map(label, match_rules(rules, params))
        used = set(jax.tree.leaves(labels))
        if used == {_LABELS[OWN]}:
            return optimizers[OWN]
        named = {_LABELS.get(name, name): optimizer for name, optimizer in optimizers.items()}
        named[_FROZEN] = optax.set_to_zero()
        return optax.multi_transform({name: named[name] for name in sorted(used)}, labels)

    def init(params: Any) -> Any:
        return chosen(params).init(params)

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        return chosen(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def parameter_name(path: tuple) -> str:
    """``blocks/mlp/in`` of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
