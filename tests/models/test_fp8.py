"""Products in 8 bits: what is rounded, how far, and that a model with them goes in the same direction."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import fp8


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("dtype", "bits"), [(fp8.OPERAND, 3), (fp8.GRADIENT, 2)])
def test_entries_are_rounded_to_the_bits_there_are(dtype, bits):
    x = normal((64, 64))
    error = jnp.abs(fp8.rounded(x, dtype) - x) / jnp.abs(x)
    large = jnp.abs(x) > 0.01
    assert 2.0 ** -(bits + 2) < float(error[large].max()) <= 1.01 * 2.0 ** -(bits + 1)
    largest = float(jnp.abs(x).max())
    assert float(jnp.abs(fp8.rounded(x, dtype)).max()) == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_stay_zeros(dtype):
    assert not fp8.rounded(jnp.zeros((4, 4), dtype), fp8.OPERAND).any()


def test_what_is_exact_in_8_bits_stays_as_it_is_in_bfloat16():
    """The scale is rounded before it divides, so that it does not bias what comes back."""
    x = 3.3 * jnp.asarray([448.0, 3.0, -1.0, 0.5], jnp.bfloat16)
    np.testing.assert_allclose(fp8.rounded(x, fp8.OPERAND).astype(float), x.astype(float), rtol=2**-8)


def test_gradients_are_of_the_rounded_operands_and_rounded_themselves():
    x, w, d_y = normal((8, 16)), normal((16, 4), 1), normal((8, 4), 2)
    _, pull = jax.vjp(lambda x, w: fp8.result(fp8.operand(x) @ fp8.operand(w)), x, w)
    d_x, d_w = pull(d_y)
    x8, w8, d8 = fp8.rounded(x, fp8.OPERAND), fp8.rounded(w, fp8.OPERAND), fp8.rounded(d_y, fp8.GRADIENT)
    np.testing.assert_allclose(d_x, d8 @ w8.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_w, x8.T @ d8, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "2x2x2"])
def test_a_model_in_8_bits_has_nearly_the_same_gradients(mesh):
    layout = families.layout_of(**mesh)

    def gradients(config):
        model, params = families.make(config, layout)
        b = families.place(families.batch(), layout)

        def loss(params):
            hidden, _ = model.apply({"params": params}, b.inputs, b.positions, b.segments)
            logits = model.apply({"params": params}, hidden, method="logits")
            return jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))

        with jax.set_mesh(layout.mesh):
            return jax.device_get(jax.jit(jax.grad(loss))(params))

    exact = gradients(families.DECODER)
    small = gradients(dataclasses.replace(families.DECODER, fp8=True))
    for one, other in zip(jax.tree.leaves(exact), jax.tree.leaves(small), strict=True):
        cosine = np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other))
        assert 0.97 < cosine < 1 - 1e-6
