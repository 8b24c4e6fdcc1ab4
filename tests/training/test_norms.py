"""Norms by layer against numpy, and what is not finite."""

import families
import jax
import numpy as np
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
