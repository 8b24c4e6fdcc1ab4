"""Layers against independent computations in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import layout_of

from llm_jax.models import layers
from llm_jax.models.attention import Mask, attend
from llm_jax.models.mlp import MLPS
from llm_jax.models.transformer import ModelConfig

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(layout_of().mesh):
        yield


@pytest.mark.parametrize("name", layers.NORMS)
def test_norms(name):
    x = DRAW.normal(2.0, 3.0, (2, 3, 8)).astype(np.float32)
    scale = DRAW.normal(size=8).astype(np.float32)
    norm = layers.NORMS[name](layout_of(), "float32")
    out = norm.apply({"params": {"scale": scale}}, x)
    centred = x - x.mean(-1, keepdims=True) if name == "layernorm" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon) * scale
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_rotation_by_complex_numbers():
    x = DRAW.normal(size=(1, 5, 2, 8)).astype(np.float32)
    places = np.array([[0, 1, 2, 7, 100]])
    turned = layers.rotate(jnp.asarray(x), jnp.asarray(places), 10000.0)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = places[:, :, None, None] * 10000.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=2e-5)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=2e-5)


def test_rotary_scores_depend_on_distance_alone():
    q, k = (jnp.asarray(DRAW.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = lambda x, place: layers.rotate(x, jnp.array([[place]]), 100.0)  # noqa: E731
        return float(jnp.sum(at(q, i) * at(k, j)))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def attention_by_hand(q, k, v, allowed):
    """One head after the other, in float64."""
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h // share].T / np.sqrt(q.shape[3])
            scores = np.where(allowed[b], scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = p / p.sum(-1, keepdims=True) @ v[b, :, h // share]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(kv_heads, causal):
    q = DRAW.normal(size=(2, 6, 4, 8)).astype(np.float32)
    k, v = (DRAW.normal(size=(2, 6, kv_heads, 8)).astype(np.float32) for _ in range(2))
    index = np.broadcast_to(np.arange(6), (2, 6))
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
    allowed = segments[:, :, None] == segments[:, None, :]
    if causal:
        allowed = allowed & np.tril(np.ones((6, 6), bool))
    out = attend(*map(jnp.asarray, (q, k, v)), Mask(index, index, segments, segments, causal), layout_of())
    np.testing.assert_allclose(out, attention_by_hand(q, k, v, allowed), atol=2e-6)


def test_a_query_that_may_look_at_nothing_is_finite():
    q, k, v = (jnp.ones((1, 2, 1, 4)) for _ in range(3))
    index = jnp.arange(2)[None]
    mask = Mask(index, index, jnp.array([[1, 3]]), jnp.array([[1, 2]]), True)
    out, gradient = jax.value_and_grad(lambda q: attend(q, k, v, mask, layout_of()).sum())(q)
    assert np.isfinite(out) and np.isfinite(gradient).all()


def test_mlps():
    x = DRAW.normal(size=(1, 3, 8)).astype(np.float32)
    w = {name: DRAW.normal(size=(8, 16)).astype(np.float32) for name in ("in", "gate")}
    w["out"] = DRAW.normal(size=(16, 8)).astype(np.float32)
    config = ModelConfig(model_dim=8, mlp_dim=16, dtype="float32")

    def run(name, weights):
        return MLPS[name](config, layout_of(), "float32").apply({"params": weights}, x)

    def gelu(z):
        from math import erf

        return z * 0.5 * (1 + np.vectorize(erf)(z / np.sqrt(2)))

    plain = gelu(x @ w["in"]) @ w["out"]
    np.testing.assert_allclose(run("gelu", {k: w[k] for k in ("in", "out")}), plain, rtol=1e-4, atol=1e-5)
    gate = x @ w["gate"]
    gated = (gate / (1 + np.exp(-gate)) * (x @ w["in"])) @ w["out"]
    np.testing.assert_allclose(run("swiglu", w), gated, rtol=1e-4, atol=1e-5)


def test_dropout_share_and_scale():
    x = layers.dropout(jnp.ones((64, 64)), 0.25, jax.random.key(0))
    kept = np.asarray(x) > 0
    assert 0.72 < kept.mean() < 0.78
    np.testing.assert_allclose(np.asarray(x)[kept], 1 / 0.75, rtol=1e-6)
