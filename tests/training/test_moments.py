"""What optimisers remember: the same bits as optax, and nothing at all of a step that is not applied."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.training import moments, optimizers
from llm_jax.training.optimizers import OPTIMIZERS
from llm_jax.training.rules import Rule

CASES = {
    "adam": (moments.scale_by_adam(0.9, 0.95, 1e-8), optax.scale_by_adam(0.9, 0.95, 1e-8)),
    "momentum": (moments.trace(0.9, False), optax.trace(0.9, False)),
    "nesterov": (moments.trace(0.9, True), optax.trace(0.9, True)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_optax(name):
    ours, theirs = CASES[name]
    params = {"w": jnp.ones((3, 5)), "b": jnp.zeros(7)}
    states, draw = [ours.init(params), theirs.init(params)], np.random.default_rng(0)
    for _ in range(4):
        grads = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params)
        first, states[0] = ours.update(grads, states[0], params, applied=jnp.bool_(True))
        second, states[1] = theirs.update(grads, states[1], params)
        jax.tree.map(np.testing.assert_array_equal, (first, states[0]), (second, states[1]))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd without momentum", "routed"])
def test_no_optimizer_remembers_what_was_not_applied(name):
    """After a step like any other, one of NaN: the state keeps its bits, counts among them."""
    section = {
        "sgd without momentum": optimizers.SGD(momentum=0.0),
        "routed": optimizers.Muon(rules=(Rule("final_norm/.*", learning_rate=0.0), *optimizers.Muon().rules)),
    }.get(name) or OPTIMIZERS[name]()
    layout = families.layout_of()
    _, params = families.make(families.DECODER, layout)
    update = optimizers.build(section, optax.constant_schedule(1e-3)).transformation
    with jax.set_mesh(layout.mesh):
        ones = jax.tree.map(jnp.ones_like, params)
        nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
        step = jax.jit(lambda *args, applied: update.update(*args, applied=applied)[1])
        state = step(ones, update.init(params), params, applied=jnp.bool_(True))
        kept = step(nan, state, params, applied=jnp.bool_(False))
        jax.tree.map(np.testing.assert_array_equal, kept, state)
        counts = [x for x in jax.tree.leaves(state) if x.ndim == 0]
        assert counts and all(x == 1 for x in counts)
