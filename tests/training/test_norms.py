"""Norms by layer against numpy, and what is not finite."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.training import norms


def test_by_layer_on_a_mesh():
    """Every block and every other part by itself; together they are the norm of all parameters."""
    layout = families.layout_of(1, 2, 2)
    _, params = families.make(families.DECODER, layout)
    with jax.set_mesh(layout.mesh):
        squares = jax.jit(norms.squares)(params)
        whole = float(norms.total(squares))
    found = norms.by_layer(squares)
    host = jax.device_get(params)
    for i in range(families.DECODER.num_layers):
        squares = [np.sum(np.square(x[i], dtype=np.float64)) for x in jax.tree.leaves(host["blocks"])]
        assert found[f"blocks/{i}"] == pytest.approx(sum(squares) ** 0.5, rel=1e-6)
    assert found["embedding"] == pytest.approx(np.linalg.norm(host["embedding"]), rel=1e-6)
    total = sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(host))
    assert sum(norm**2 for norm in found.values()) == pytest.approx(total, rel=1e-6)
    assert whole == pytest.approx(total**0.5, rel=1e-6)
    assert len(found) == len(host) - 1 + families.DECODER.num_layers


def test_one_bad_layer_is_told_from_the_others():
    tree = {
        "blocks": {"w": np.float32([[3.0, 4.0], [np.nan, 1.0], [np.inf, 1.0]])},
        "head": np.float32([2.0]),
    }
    found = norms.by_layer(norms.squares(tree))
    assert found["blocks/0"] == 5.0 and found["head"] == 2.0
    assert np.isnan(found["blocks/1"]) and np.isinf(found["blocks/2"])


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_is_optax_s(most):
    """Down to ``most`` where the norm is above it; else every bit stays."""
    draw = np.random.default_rng(0)
    tree = {"blocks": {"w": draw.normal(size=(2, 3, 4))}, "head": draw.normal(size=5)}
    tree = jax.tree.map(jnp.float32, tree)
    ours, theirs = (
        c.update(tree, c.init(tree))[0] for c in (norms.clip(most), optax.clip_by_global_norm(most))
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    whole = float(optax.tree.norm(ours))
    assert (
        whole == pytest.approx(most) if most < 1 else jax.tree.all(jax.tree.map(jnp.array_equal, ours, tree))
    )


def test_clipping_keeps_what_is_not_finite():
    """A bad step is found by its norm; clipping may not hide it, nor fail where there is nothing."""
    bad = norms.clip(1.0).update({"head": jnp.float32([np.nan, 1.0])}, None)[0]["head"]
    assert np.isnan(bad).all()
    np.testing.assert_array_equal(
        norms.clip(1.0).update({"head": jnp.zeros(3)}, None)[0]["head"], np.zeros(3)
    )
