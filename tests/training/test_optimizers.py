"""AdamW and its schedule against independent computations; the rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.training import optimizers
from llm_jax.training.optimizers import AdamW, Rule
from llm_jax.training.schedules import WarmupCosine

PARAMS = {
    "blocks": {"in": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "scale": np.ones(3, np.float32)}
}


def by_hand(config, rates, gradients):
    """PyTorch's order: clip, decay, step; in float64."""
    p = {k: v.astype(np.float64) for k, v in PARAMS["blocks"].items()}
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    for t, (rate, g) in enumerate(zip(rates, gradients, strict=True), 1):
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k in p:
            clipped = g[k] * min(1.0, config.clip_norm / norm)
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * clipped
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * clipped**2
            if k != "scale":
                p[k] *= 1 - rate * config.weight_decay
            corrected = np.sqrt(v[k] / (1 - config.beta2**t)) + config.epsilon
            p[k] -= rate * m[k] / (1 - config.beta1**t) / corrected
    return p


def test_adamw_over_steps():
    config, schedule = AdamW(weight_decay=0.3, clip_norm=0.5), WarmupCosine(2, 0.1).build(0.1, 6)
    draw = np.random.default_rng(0)
    gradients = [{k: draw.normal(size=v.shape) for k, v in PARAMS["blocks"].items()} for _ in range(6)]
    optimizer = optimizers.build(config, schedule)
    params, state, rates = PARAMS, optimizer.transformation.init(PARAMS), []
    for g in gradients:
        rates.append(float(optimizer.learning_rate(state)))
        g = {"blocks": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)}
        updates, state = optimizer.transformation.update(g, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    expected = by_hand(config, rates, gradients)
    for name, value in expected.items():
        np.testing.assert_allclose(params["blocks"][name], value, rtol=2e-5, atol=1e-6)


def test_warmup_cosine():
    schedule = WarmupCosine(warmup_steps=4, end_ratio=0.1).build(2.0, 20)
    for step in range(25):
        if step < 4:
            expected = 2.0 * (step + 1) / 5
        else:
            share = min((step - 4) / 16, 1.0)
            expected = 0.2 + 0.5 * (1 + np.cos(np.pi * share)) * 1.8
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_rules_multiply():
    rules = (Rule(".*scale", learning_rate=0.0, weight_decay=0.0), Rule(".*in", learning_rate=0.5), Rule())
    params = {**PARAMS, "other": np.ones(2, np.float32)}
    gradient = jax.tree.map(np.ones_like, params)
    optimizer = optimizers.build(AdamW(rules=rules, weight_decay=0.0), lambda _: 0.1)
    updates, _ = optimizer.transformation.update(gradient, optimizer.transformation.init(params), params)
    assert (updates["blocks"]["scale"] == 0).all()
    np.testing.assert_allclose(updates["blocks"]["in"], updates["other"][0] / 2, rtol=1e-6)


def test_every_parameter_needs_a_rule_and_every_rule_a_parameter():
    with pytest.raises(UserError, match=r"no rule .* matches parameter blocks/scale"):
        optimizers.match_rules((Rule(".*in"),), PARAMS)
    with pytest.raises(UserError, match=r"'\.\*bias' decides no parameter"):
        optimizers.match_rules((Rule(".*bias"), Rule()), PARAMS)


def test_names_match_as_a_whole():
    tree = optimizers.match_rules((Rule("blocks/in"), Rule(weight_decay=0.0)), PARAMS)
    assert tree["blocks"]["in"].weight_decay == 1.0 and tree["blocks"]["scale"].weight_decay == 0.0
