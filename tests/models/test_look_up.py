"""Rows looked up on one GPU: what jax gives, and its gradients."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm_jax.models import look_up

DRAW = np.random.default_rng(0)
TABLE = DRAW.normal(size=(9, 4)).astype(np.float32)
ROWS = DRAW.normal(size=(2, 6, 4)).astype(np.float32)
PLACES = np.array([[0, 2, 5], [4, 3, 1]])
CASES = {
    "rows": (lambda x: look_up.rows_of(x, jnp.array([[0, 3, 3], [8, 0, 3]]), PartitionSpec()), TABLE),
    "places": (lambda x: look_up.places_of(x, jnp.asarray(PLACES)), ROWS),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_on_one_gpu_as_anywhere(monkeypatch, name, dtype):
    look, x = CASES[name]
    found = []
    with jax.set_mesh(families.layout_of().mesh):
        for gpu in (False, True):
            monkeypatch.setattr(look_up, "_on_one_gpu", lambda _, gpu=gpu: gpu)
            y, pull = jax.vjp(look, jnp.asarray(x, dtype))
            (d_x,) = pull(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
            found.append((y, d_x))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


def test_what_gradients_are_added_to_is_hidden():
    """A barrier stands before it."""

    def gradient(x):
        return jax.grad(lambda x: look_up._rows(9, x, jnp.array([0, 3])).sum())(x)

    assert "optimization_barrier" in jax.jit(gradient).lower(TABLE).as_text()
