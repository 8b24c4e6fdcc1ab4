"""Every choice of a model: it does what it says, differs from the others, and runs on any mesh."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from families import DECODER, LENGTH

from llm_jax.errors import UserError
from llm_jax.models import activations, flops
from llm_jax.models.attention import Kept
from llm_jax.models.transformer import Transformer

BASE = dataclasses.replace(DECODER, scan_layers=False)
CHOICES = {
    "base": {},
    "postnorm": {"block": "postnorm"},
    "parallel": {"block": "parallel"},
    "layernorm": {"norm": "layernorm"},
    "embedding norm": {"embedding_norm": True},
    "learnt": {"positions": "learnt"},
    "sinusoidal": {"positions": "sinusoidal"},
    "alibi": {"positions": "alibi"},
    "no positions": {"positions": "none"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "geglu": {"activation": "geglu"},
    "relu2": {"activation": "relu2"},
    "multi-head": {"num_kv_heads": 0},
    "multi-query": {"num_kv_heads": 1},
    "qk norm": {"qk_norm": True},
    "biases": {"biases": True},
    "untied": {"tied_head": False},
    "logit cap": {"logit_softcap": 1.0},
    "attention cap": {"attention_softcap": 1.0},
    "window": {"window": (4,)},
    "window pattern": {"window": (4, 0)},
    "local base": {"window": (4, 0), "rotary_local_base": 100.0},
    "wide heads": {"head_dim": 16},
    "value residual": {"value_residual": True},
    "zero init": {"zero_init": True},
}
# Together they touch every path of the layout: stacked extras, biases, vectors on heads, an untied head.
TOGETHER = dataclasses.replace(
    BASE,
    biases=True,
    qk_norm=True,
    tied_head=False,
    window=(4, 0),
    rotary_local_base=100.0,
    value_residual=True,
)
OTHERS = dataclasses.replace(
    BASE, block="postnorm", positions="alibi", embedding_norm=True, attention_softcap=5.0, kernel="blockwise"
)


@functools.cache
def run(name):
    """Scores of a random batch, with parameters moved off their initial values where these are all equal."""
    model, params = families.make(dataclasses.replace(BASE, **CHOICES[name]), families.layout_of())
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32) if np.ptp(x) == 0 else x, params
    )
    return np.asarray(forward(model, params)), params


def forward(model, params, batch=None, **settings):
    layout = model.layout

    def logits(params, b):
        x, _ = model.apply({"params": params}, b.inputs, b.positions, b.segments, **settings)
        return model.apply({"params": params}, x, method="logits")

    with jax.set_mesh(layout.mesh):
        return jax.jit(logits)(params, families.place(batch or families.batch(), layout))[
            ..., : families.VOCAB
        ]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_nothing_is_silently_equal_to_something_else(name):
    scores, _ = run(name)
    assert np.isfinite(scores).all() and scores.std() > 0.05
    for other in CHOICES:
        if other != name and other in list(CHOICES)[: list(CHOICES).index(name)]:
            assert np.abs(scores - run(other)[0]).max() > 1e-4, other


@pytest.mark.slow
@pytest.mark.parametrize("config", [TOGETHER, OTHERS], ids=["together", "others"])
def test_any_mesh(config):
    """Loss and gradients on 2 x 2 x 2 are those of one device, scanned or not."""

    def value_and_grad(mesh, scan):
        layout = families.layout_of(*mesh)
        model, params = families.make(dataclasses.replace(config, scan_layers=scan), layout)

        def loss(params):
            x, _ = model.apply({"params": params}, b.inputs, b.positions, b.segments)
            logits = model.apply({"params": params}, x, method="logits")
            return jnp.mean(jax.nn.logsumexp(logits, -1))

        with jax.set_mesh(layout.mesh):
            b = families.place(families.batch(), layout)
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    alone, gradients = value_and_grad((1, 1, 1), scan=False)
    many, other = value_and_grad((2, 2, 2), scan=True)
    assert many == pytest.approx(alone, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max()), gradients, other)


def influence(config):
    """bool [query, key], by the gradient of each token's own embedding row; see test_transformer.py."""
    from test_transformer import influence as of_model

    layout = families.layout_of()
    return of_model(layout, *families.make(config, layout))


@pytest.mark.slow
def test_a_window_is_as_wide_as_it_says():
    """Two layers with a window of 3 reach 2 + 2 back; an encoder to both sides."""
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    decoder = dataclasses.replace(BASE, window=(3,))
    assert (influence(decoder) == ((distance >= 0) & (distance <= 4))).all()
    encoder = dataclasses.replace(BASE, window=(3,), causal=False)
    assert (influence(encoder) == (abs(distance) <= 4)).all()
    assert (influence(dataclasses.replace(decoder, window=(3, 0))) == (distance >= 0)).all()


@pytest.mark.parametrize("positions", ["alibi", "sinusoidal", "none"])
def test_decoders_stay_causal(positions):
    config = dataclasses.replace(BASE, positions=positions, block="postnorm")
    assert (influence(config) == np.tril(np.ones((LENGTH, LENGTH), bool))).all()


def test_no_positions_means_no_order():
    """Without positions an encoder's states only change places when its tokens do."""
    config = dataclasses.replace(BASE, positions="none", causal=False)
    model, params = families.make(config, families.layout_of())
    batch = families.batch()
    order = np.random.default_rng(0).permutation(LENGTH)
    shuffled = forward(model, params, batch.replace(inputs=batch.inputs[:, order]))
    np.testing.assert_allclose(shuffled, np.asarray(forward(model, params))[:, order], atol=1e-5)


@pytest.mark.slow
def test_qk_norm_forgets_the_size_of_queries():
    model, params = families.make(dataclasses.replace(BASE, qk_norm=True), families.layout_of())
    scores = forward(model, params)
    attention = params["blocks"]["attention"] | {"query": 7.0 * params["blocks"]["attention"]["query"]}
    louder = params | {"blocks": params["blocks"] | {"attention": attention}}
    np.testing.assert_allclose(forward(model, louder), scores, atol=1e-4)


def test_caps_hold():
    assert np.abs(run("logit cap")[0]).max() < 1.0 < np.abs(run("base")[0]).max()


@pytest.mark.slow
def test_biases_start_at_nothing():
    """Fresh biases change no score, and are of the shape of what they are added to."""
    model, params = families.make(dataclasses.replace(BASE, biases=True), families.layout_of())

    def without(tree):
        kept = {k: v for k, v in tree.items() if not k.endswith("bias")}
        return {k: without(v) if isinstance(v, dict) else v for k, v in kept.items()}

    bare = Transformer(BASE, model.layout)
    np.testing.assert_array_equal(forward(model, params), forward(bare, without(params)))
    assert params["blocks"]["attention"]["query_bias"].shape == (2, 4, 8)
    assert params["blocks"]["mlp"]["out_bias"].shape == (2, 32)


@pytest.mark.slow
def test_an_untied_head_is_its_own():
    _, params = run("untied")
    assert params["head"].shape == params["embedding"].shape
    assert np.abs(params["head"] - params["embedding"]).max() > 0.1


@pytest.mark.slow
def test_stochastic_depth():
    """At rate 1 the last block is left out; evaluation leaves out nothing; the first block never is."""
    config = dataclasses.replace(BASE, stochastic_depth=1.0)
    model, params = families.make(config, families.layout_of())
    one = Transformer(dataclasses.replace(BASE, num_layers=1), model.layout)
    first = params | {"blocks": jax.tree.map(lambda x: x[:1], params["blocks"])}
    np.testing.assert_allclose(forward(model, params, key=jax.random.key(1)), forward(one, first), atol=1e-5)
    np.testing.assert_array_equal(forward(model, params), forward(Transformer(BASE, model.layout), params))


@pytest.mark.slow
def test_post_norm_ends_normed():
    config = dataclasses.replace(BASE, block="postnorm")
    model, params = families.make(config, families.layout_of())
    assert "final_norm" not in params
    with jax.set_mesh(model.layout.mesh):
        b = families.place(families.batch(), model.layout)
        x, _ = model.apply({"params": params}, b.inputs, b.positions, b.segments)
    np.testing.assert_allclose(np.square(x).mean(-1), 1.0, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kernel", ["dense", "blockwise"])
def test_capture(scan, kernel):
    config = dataclasses.replace(BASE, scan_layers=scan, kernel=kernel)
    model, params = families.make(config, families.layout_of())
    with jax.set_mesh(model.layout.mesh):
        b = families.place(families.batch(), model.layout)
        apply = functools.partial(model.apply, {"params": params}, b.inputs, b.positions, b.segments)
        x, aux = apply(capture=("hidden", "attention"))
        plain, free = apply()
        normed = model.apply({"params": params}, aux.layers.hidden[-1], method=lambda m, h: m.final_norm(h))
    np.testing.assert_array_equal(x, plain)
    np.testing.assert_allclose(normed, x, atol=1e-6)
    weights = np.asarray(aux.layers.attention)
    assert weights.shape == (2, families.ROWS, 4, LENGTH, LENGTH)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert (weights[..., ~np.tril(np.ones((LENGTH, LENGTH), bool))] == 0).all()
    assert free.layers == Kept()


def test_capture_is_free_when_not_asked_for():
    model, params = families.make(dataclasses.replace(BASE, scan_layers=True), families.layout_of())

    def operations(**settings):
        with jax.set_mesh(model.layout.mesh):
            b = families.place(families.batch(), model.layout)
            call = functools.partial(model.apply, **settings)
            traced = jax.jit(call).lower({"params": params}, b.inputs, b.positions, b.segments)
        return traced.as_text().count("\n")

    assert operations() == operations(capture=()) < operations(capture=("attention",))
    with pytest.raises(UserError, match="capture: hiden is none of hidden, attention"):
        operations(capture=("hiden",))


def test_windows_count_for_less():
    c = dataclasses.replace(BASE, window=(4, 0))
    for length, window, causal in ((16, 4, True), (16, 0, True), (16, 4, False), (5, 9, False)):
        distance = np.arange(length)[:, None] - np.arange(length)
        seen = (abs(distance) < (window or length)) & ((distance >= 0) | (not causal))
        share = flops.keys(length, window, causal)
        assert share == pytest.approx(seen.sum() / length)
    assert flops.training_flops_per_token(c, 16) < flops.training_flops_per_token(BASE, 16)


@pytest.mark.slow
def test_zero_init_makes_every_block_the_identity():
    config = dataclasses.replace(BASE, zero_init=True, tied_head=False)
    model, params = families.make(config, families.layout_of())
    b = families.place(families.batch(), model.layout)
    with jax.set_mesh(model.layout.mesh):
        embedded = model.apply({"params": params}, b.inputs, b.positions, method="embed")
        _, aux = model.apply({"params": params}, b.inputs, b.positions, b.segments, capture=("hidden",))
    np.testing.assert_array_equal(aux.layers.hidden[-1], embedded)
    assert not params["head"].any()


@pytest.mark.slow
def test_values_of_the_first_layer_reach_the_last():
    """Scanned, unrolled and recomputed alike; the first layer's own share is not used."""
    config = dataclasses.replace(DECODER, value_residual=True)
    model, params = families.make(config, families.layout_of())
    shares = params["blocks"]["attention"]["value_mix_scale"]
    assert shares.shape == (2, 1) and (shares == 0.5).all()
    others = [dataclasses.replace(config, scan_layers=False), dataclasses.replace(config, remat=True)]
    expected = forward(model, params)
    for other in others:
        found = forward(Transformer(other, model.layout), params)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def changed(layer):
        moved = shares.at[layer].set(0.9)
        return forward(model, jax.tree.map(lambda x: moved if x is shares else x, params))

    np.testing.assert_array_equal(changed(0), expected)
    assert np.abs(changed(1) - expected).max() > 1e-3


def test_gelu_keeps_its_tail_in_bfloat16():
    x = jnp.linspace(-5.0, 0.0, 64)
    small = jax.vmap(jax.value_and_grad(activations.gelu))(x.astype(jnp.bfloat16))
    exact = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(
        x.astype(jnp.bfloat16).astype(jnp.float32)
    )
    for one, other in zip(small, exact, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-6, atol=1e-6)


def test_gelu_in_bfloat16_at_every_number():
    """Within two roundings of value and slope by float64, and 2e-4 of what the slope is a difference of."""
    x = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))]
    found = jax.vmap(jax.value_and_grad(activations.gelu))(jnp.asarray(x))
    exact = x.astype(np.float64)
    below = scipy.special.ndtr(exact)
    slope = below + exact * np.exp(-0.5 * np.square(exact)) / np.sqrt(2 * np.pi)
    for one, other in zip(found, (exact * below, slope), strict=True):
        most = 2**-7 * np.abs(other) + 2e-4 * below + 1e-6
        assert (np.abs(np.asarray(one, np.float64) - other) <= most).all()
