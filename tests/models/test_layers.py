"""Layers against independent computations in numpy."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import layout_of

from llm_jax.layout import all_but_gathered, turned
from llm_jax.models import attend, attention, blockwise, layers, positions
from llm_jax.models.activations import ACTIVATIONS
from llm_jax.models.attend import Mask, Scoring
from llm_jax.models.config import ModelConfig
from llm_jax.models.mlp import MLP

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(layout_of().mesh):
        yield


# ---- norms and dropout ----------------------------------------------------------------------


@pytest.mark.parametrize("name", layers.NORMS)
def test_norms(name):
    x = DRAW.normal(2.0, 3.0, (2, 3, 8)).astype(np.float32)
    scale, bias = (DRAW.normal(size=8).astype(np.float32) for _ in range(2))
    norm = layers.NORMS[name](layout_of(), "float32", biases=True)
    out = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
    centred = x - x.mean(-1, keepdims=True) if name == "layernorm" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon) * scale + bias
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0, 300.0, 3000.0])
def test_the_variance_of_rounded_rows(mean, dtype):
    """It is off by less than the rounding of the row has changed it, also where it is made in one pass."""
    exact = DRAW.normal(mean, 1.0, (4, 256))
    x = jnp.asarray(exact, dtype)
    lost = np.abs(np.asarray(x, np.float64) - exact).mean()
    norm, params = layers.LayerNorm(layout_of(), "float32"), {"scale": jnp.ones(256)}
    one, two = (norm.apply({"params": params}, y) for y in (x, x.astype(jnp.float32)))
    assert np.abs(one - two).max() <= 0.1 * lost + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", layers.NORMS)
def test_norms_of_a_gpu_are_the_same(name, dtype):
    """Its barriers change neither the result nor the gradients."""
    x, scale = jnp.asarray(DRAW.normal(2.0, 3.0, (2, 3, 8)), dtype), jnp.linspace(0.5, 1.5, 8)

    def loss(layout, scale, x):
        return jnp.sum(jnp.sin(layers.NORMS[name](layout, "float32").apply({"params": {"scale": scale}}, x)))

    gpu = dataclasses.replace(layout_of(), platform="gpu")
    for there, here in zip(
        *(jax.grad(partial(loss, layout), (0, 1))(scale, x) for layout in (gpu, layout_of())), strict=True
    ):
        np.testing.assert_allclose(*(g.astype(jnp.float32) for g in (there, here)), rtol=1e-6)
    barriers = [str(jax.make_jaxpr(layout.in_memory)(1.0)).count("barrier") for layout in (gpu, layout_of())]
    assert barriers == [1, 0]


def test_dropout_share_and_scale():
    x = layers.dropout(jnp.ones((64, 64)), 0.25, jax.random.key(0))
    kept = np.asarray(x) > 0
    assert 0.72 < kept.mean() < 0.78
    np.testing.assert_allclose(np.asarray(x)[kept], 1 / 0.75, rtol=1e-6)


def test_drop_path_drops_whole_rows():
    x = layers.drop_path(jnp.ones((200, 4, 4)), jnp.asarray(0.25), jax.random.key(0))
    rows = np.asarray(x).reshape(200, -1)
    assert (rows == rows[:, :1]).all() and 0.65 < (rows[:, 0] > 0).mean() < 0.85
    np.testing.assert_allclose(rows[rows > 0], 1 / 0.75, rtol=1e-6)


# ---- positions ------------------------------------------------------------------------------


def test_rotation_by_complex_numbers():
    x = DRAW.normal(size=(1, 5, 2, 8)).astype(np.float32)
    places = np.array([[0, 1, 2, 7, 100]])
    turned = positions.rotate(jnp.asarray(x), jnp.asarray(places), 10000.0)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = places[:, :, None, None] * 10000.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=2e-5)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=2e-5)


def test_rotary_scores_depend_on_distance_alone():
    q, k = (jnp.asarray(DRAW.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = lambda x, place: positions.rotate(x, jnp.array([[place]]), 100.0)  # noqa: E731
        return float(jnp.sum(at(q, i) * at(k, j)))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_sinusoids():
    places = np.array([[0, 1, 50]])
    out = positions.sinusoids(jnp.asarray(places), 8)
    for i in range(4):
        angle = places / 10000 ** (i / 3)
        np.testing.assert_allclose(out[..., i], np.sin(angle), atol=1e-5)
        np.testing.assert_allclose(out[..., i + 4], np.cos(angle), atol=1e-5)


def test_alibi_slopes():
    """The paper's own values for 8 heads and its rule for 12."""
    np.testing.assert_allclose(positions.alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    twelve = [2.0**-i for i in range(1, 9)] + [2.0**-i for i in (0.5, 1.5, 2.5, 3.5)]
    np.testing.assert_allclose(positions.alibi_slopes(12), twelve, rtol=1e-6)


# ---- attention ------------------------------------------------------------------------------

# "auto" is dense here, or a triangle of it where the mask is one
KERNELS = {"dense": attend.dense, "blockwise": blockwise.blockwise, "auto": attention.auto}
CASES = {
    "decoder": {},
    "encoder": {"causal": False},
    "decoder with a window": {"window": 3},
    "encoder with a window": {"causal": False, "window": 3},
    "a window of 0": {"window": 0},
    "capped": {"softcap": 0.5},
    "alibi": {"slopes": True},
    "alibi encoder": {"slopes": True, "causal": False},
    "decoding": {"q_start": 5},
    "one key-value head": {"kv_heads": 1},
    "no groups": {"kv_heads": 4},
}


def attention_case(causal=True, window=None, softcap=0.0, slopes=False, q_start=0, kv_heads=2):
    """q, k, v, mask and scoring on packed rows of 11 tokens; the same by hand."""
    draw = np.random.default_rng(1)
    q = draw.normal(size=(2, 11 - q_start, 4, 8)).astype(np.float32)
    k, v = (draw.normal(size=(2, 11, kv_heads, 8)).astype(np.float32) for _ in range(2))
    segments = np.array([[1] * 6 + [2] * 5, [1] * 11])
    distance = np.arange(q_start, 11)[:, None] - np.arange(11)
    allowed = segments[:, q_start:, None] == segments[:, None, :]
    allowed &= (distance >= 0) if causal else True
    allowed &= (abs(distance) < window) if window else True
    steep = np.array([0.5, 0.25, 0.1, 0.0], np.float32)
    bias = -steep[:, None, None] * abs(distance) if slopes else np.zeros((4, 1, 1))
    expected = attention_by_hand(q, k, v, allowed, bias, softcap)
    mask = Mask(jnp.asarray(segments[:, q_start:]), jnp.asarray(segments), causal, q_start, window)
    scoring = Scoring(jnp.asarray(steep) if slopes else None, softcap)
    return tuple(map(jnp.asarray, (q, k, v))), mask, scoring, expected


def attention_by_hand(q, k, v, allowed, bias, softcap):
    """One head after the other, in float64."""
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            s = q[b, :, h].astype(np.float64) @ k[b, :, h // share].T / np.sqrt(q.shape[3])
            s = softcap * np.tanh(s / softcap) if softcap else s
            s = np.where(allowed[b], s + bias[h], -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            out[b, :, h] = p / p.sum(-1, keepdims=True) @ v[b, :, h // share]
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(attend, "TRIANGLE_BLOCK", 4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_attention(case, kernel, small_blocks):
    inputs, mask, scoring, expected = attention_case(**CASES[case])
    run = jax.jit(lambda *qkv: attend.attend(*qkv, mask, scoring, layout_of(), KERNELS[kernel]))
    np.testing.assert_allclose(run(*inputs), expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["blockwise", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_in_blocks(case, kernel, small_blocks):
    inputs, mask, scoring, _ = attention_case(**CASES[case])

    def gradient(kernel):
        def loss(q, k, v):
            out = attend.attend(q, k, v, mask, scoring, layout_of(), kernel)
            return jnp.sum(out * jnp.sin(jnp.arange(out.size)).reshape(out.shape))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)

    for one, other in zip(gradient(attend.dense), gradient(KERNELS[kernel]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.slow
def test_how_exact_gradients_in_blocks_are_in_bfloat16():
    """Of keys and values they are summed over blocks in bfloat16, in ``dense`` within one product."""
    draw = np.random.default_rng(0)
    exact = [jnp.asarray(draw.normal(size=(1, 1024, 2, 32)).astype(np.float32)) for _ in range(3)]
    ones, weight = jnp.ones((1, 1024), jnp.int32), jnp.asarray(draw.normal(size=exact[0].shape))
    mask = Mask(ones, ones, True)

    def gradients(dtype, kernel):
        def loss(*qkv):
            out = attend.attend(*qkv, mask, Scoring(), layout_of(), kernel)
            return jnp.sum(out.astype(jnp.float32) * weight)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*(x.astype(jnp.bfloat16).astype(dtype) for x in exact))

    wanted = gradients(jnp.float32, attend.dense)

    def off(kernel):
        found = gradients(jnp.bfloat16, kernel)
        return [
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(found, wanted, strict=True)
        ]

    whole, blocks = off(attend.dense), off(attention.auto)
    assert blocks[0] < 1.1 * whole[0] and all(b < 1.5 * a < 0.006 for a, b in zip(whole, blocks, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 2}, {"fsdp": 2}], ids=["data x tensor", "fsdp"])
def test_blocks_on_a_mesh(mesh, small_blocks):
    inputs, mask, scoring, expected = attention_case()
    layout = layout_of(**mesh)
    by_head, by_row = layout.named("batch", None, "heads", None), layout.named("batch", None)
    with jax.set_mesh(layout.mesh):
        q, k, v = (jax.device_put(np.asarray(x), by_head) for x in inputs)
        segments = jax.device_put(np.asarray(mask.q_segments), by_row)
        mask = mask._replace(q_segments=segments, kv_segments=segments)
        run = jax.jit(lambda q, k, v: attend.attend(q, k, v, mask, scoring, layout, attention.auto))
        np.testing.assert_allclose(run(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_scores_above_the_diagonal_are_not_made(causal):
    """Of 512 tokens in blocks of 128 six blocks of sixteen; an encoder needs them all."""

    def flops(kernel):
        ones, x = jnp.ones((1, 512), jnp.int32), jnp.ones((1, 512, 2, 32))
        mask = Mask(ones, ones, causal)
        run = jax.jit(lambda q: attend.attend(q, x, x, mask, Scoring(), layout_of(), kernel))
        return run.lower(x).cost_analysis()["flops"]

    assert flops(attention.auto) / flops(attend.dense) == pytest.approx(10 / 16 if causal else 1, rel=0.02)


@pytest.mark.slow
def test_blockwise_memory_is_linear():
    """Forward and backward at 16,384 and 32,768 tokens; full scores would take 17 GB at the second."""

    def temporaries(length):
        def loss(q, k, v):
            ones = jnp.ones((1, length), jnp.int32)
            return attend.attend(
                q, k, v, Mask(ones, ones, True), Scoring(), layout_of(), blockwise.blockwise
            ).sum()

        x = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    half, whole = temporaries(16384), temporaries(32768)
    assert whole < 2.1 * half
    assert whole < 20 * (32768 * 4 * 32 * 4)  # twenty copies of the queries


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_query_that_may_look_at_nothing_is_finite(kernel):
    q, k, v = (jnp.ones((1, 2, 1, 4)) for _ in range(3))
    mask = Mask(jnp.array([[1, 3]]), jnp.array([[1, 2]]), True)

    def total(q):
        return attend.attend(q, k, v, mask, Scoring(), layout_of(), KERNELS[kernel]).sum()

    out, gradient = jax.value_and_grad(total)(q)
    assert np.isfinite(out) and np.isfinite(gradient).all()


# ---- mlp ------------------------------------------------------------------------------------


def erf_gelu(z):
    return z * 0.5 * (1 + np.vectorize(math.erf)(z / np.sqrt(2)))


ACTIVATED = {
    "gelu": lambda a, _: erf_gelu(a),
    "gelu_tanh": lambda a, _: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    "relu2": lambda a, _: np.maximum(a, 0) ** 2,
    "swiglu": lambda a, g: g / (1 + np.exp(-g)) * a,
    "geglu": lambda a, g: erf_gelu(g) * a,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True])
def test_mlp(name, biases):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(1, 3, 8)).astype(np.float32)
    config = ModelConfig(model_dim=8, mlp_dim=16, dtype="float32", activation=name, biases=biases)
    mlp = MLP(config, layout_of(), "float32")
    shapes = jax.eval_shape(lambda: mlp.init(jax.random.key(0), x))["params"]
    assert ("gate" in shapes) == (name in ("swiglu", "geglu")) and ("in_bias" in shapes) == biases
    w = {key: draw.normal(size=shape.shape).astype(np.float32) for key, shape in shapes.items()}

    def linear(z, key):
        return z @ w[key] + w.get(f"{key}_bias", 0.0)

    hidden = ACTIVATED[name](linear(x, "in"), linear(x, "gate") if "gate" in w else None)
    np.testing.assert_allclose(mlp.apply({"params": w}, x), linear(hidden, "out"), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(("platform", "kept"), [("cpu", True), ("cuda", False)])
def test_gelu_s_slope_is_kept_for_a_cpu_and_made_again_by_a_gpu(platform, kept):
    slope = jax.jit(jax.vmap(jax.grad(ACTIVATIONS["gelu"].function)))
    text = slope.trace(jnp.ones(4)).lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == kept


def test_the_derivative_of_gelu():
    x = np.linspace(-6.0, 6.0, 101, dtype=np.float32)
    exact = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(jax.vmap(jax.grad(ACTIVATIONS["gelu"].function))(x), exact, atol=1e-6)


def test_a_gathered_matrix_is_not_kept():
    """For the backward pass, where it is tall: its transpose is made of the shard again."""
    layout = layout_of(fsdp=4)
    with jax.set_mesh(layout.mesh):
        x = layout.shard(jnp.ones((4, 8, 64)), "batch", "length", None)
        w = layout.store(jnp.ones((64, 16)), "mlp", "embed")

        def product(x, w):
            out = layout.spec("batch", "length", None)
            return layers._matmul(layout, x, layout.gather(w, "float32"), out)

        _, back = jax.vjp(jax.checkpoint(product, policy=all_but_gathered), x, w)
    kept = jax.tree.leaves(back)
    assert len(kept) == 2 and not any(a.size == w.size and a.is_fully_replicated for a in kept)


def test_a_transpose_is_not_kept_where_stages_are_stacked():
    x, w = jnp.ones((2, 8, 64)), jnp.ones((2, 64, 16))
    work = jax.vmap(lambda x, w: jnp.einsum("ni,oi->no", x, turned(w)))
    _, back = jax.vjp(jax.checkpoint(work, policy=all_but_gathered), x, w)
    assert {a.shape for a in jax.tree.leaves(back)} == {x.shape, w.shape}
