"""Properties of the model: who sees whom, and that how it is run changes nothing."""

import dataclasses
from functools import partial

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import DECODER, FAMILIES, LENGTH, VOCAB

from llm_jax.models import head_product
from llm_jax.models.transformer import Transformer, init_params
from llm_jax.objectives.clm import CLM
from llm_jax.training import step

TOLERANCE = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def built():
    layout = families.layout_of()
    return {name: (layout, *families.make(config, layout)) for name, config in FAMILIES.items()}


def hidden(layout, model, params, batch, key=None):
    with jax.set_mesh(layout.mesh):
        apply = jax.jit(
            lambda p, b: model.apply({"params": p}, b.inputs, b.positions, b.segments, key=key)[0]
        )
        return apply(params, families.place(batch, layout))


def influence(layout, model, params):
    """bool [query, key]: does the hidden state at query have a gradient at the input of key?

    Every place holds a token of its own, so the gradient of an embedding row is that of its place.
    """
    batch = families.batch(1)
    batch.inputs[0] = np.arange(5, 5 + LENGTH)
    direction = np.random.default_rng(0).normal(size=model.config.model_dim)

    @jax.jit
    def gradient(params, query):
        def at_query(params):
            x = model.apply({"params": params}, b.inputs, b.positions, b.segments)[0]
            return jnp.sum(x * direction * (jnp.arange(LENGTH) == query)[:, None])

        return jax.grad(at_query)(params)["embedding"]

    with jax.set_mesh(layout.mesh):
        b = families.place(batch, layout)
        rows = [np.asarray(gradient(params, query))[batch.inputs[0]] for query in range(LENGTH)]
    return np.abs(rows).max(axis=-1) > 0


def test_decoder_sees_only_the_past(built):
    seen = influence(*built["decoder"])
    assert (seen == np.tril(np.ones((LENGTH, LENGTH), bool))).all()


def test_encoder_sees_everything(built):
    assert influence(*built["encoder"]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(built, family):
    """Two documents in one row give what each gives in a row of its own."""
    layout, model, params = built[family]
    cut = 6
    both = families.batch(1)
    places = np.r_[np.arange(cut), np.arange(LENGTH - cut)].astype(np.int32)[None]
    segments = np.r_[np.full(cut, 1), np.full(LENGTH - cut, 2)].astype(np.int32)[None]
    packed = hidden(layout, model, params, both.replace(positions=places, segments=segments))[0]
    for start, stop in ((0, cut), (cut, LENGTH)):
        alone = families.batch(1)
        alone.inputs[0, : stop - start] = both.inputs[0, start:stop]
        alone.segments[0, stop - start :] = 0
        alone.inputs[0, stop - start :] = 0
        separate = hidden(layout, model, params, alone)[0]
        np.testing.assert_allclose(packed[start:stop], separate[: stop - start], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_scan_loop_and_remat_agree(built, family):
    layout, model, params = built[family]
    batch = families.place(families.batch(), layout)

    def value_and_grad(**changes):
        other = Transformer(dataclasses.replace(model.config, **changes), layout)

        def loss(p):
            x, _ = other.apply({"params": p}, batch.inputs, batch.positions, batch.segments)
            return jnp.mean(jnp.square(x)[..., ::3])

        with jax.set_mesh(layout.mesh):
            return jax.jit(jax.value_and_grad(loss))(params)

    loop = value_and_grad(scan_layers=False, remat=False)
    for changes in ({"scan_layers": True, "remat": False}, {"scan_layers": True, "remat": True}):
        other = value_and_grad(**changes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), loop, other)


@pytest.mark.slow
def test_remat_recomputes():
    """The remat setting does something: the compiled step keeps less for the backward pass."""
    layout = families.layout_of()
    batch = families.place(families.batch(), layout)

    def saved(remat):
        config = dataclasses.replace(DECODER, num_layers=8, remat=remat)
        model, params = families.make(config, layout)

        def states(p):
            return model.apply({"params": p}, batch.inputs, batch.positions, batch.segments)[0]

        with jax.set_mesh(layout.mesh):
            _, backward = jax.vjp(states, params)
        return sum(x.size for x in jax.tree.leaves(backward))

    assert saved(remat=True) < 0.5 * saved(remat=False)


@pytest.mark.slow
def test_dropout(built):
    layout, model, params = built["decoder"]
    wet = Transformer(dataclasses.replace(model.config, dropout=0.5), layout)
    batch = families.batch()
    dry = hidden(layout, model, params, batch)
    np.testing.assert_array_equal(dry, hidden(layout, wet, params, batch))  # evaluation drops nothing
    a = hidden(layout, wet, params, batch, jax.random.key(1))
    np.testing.assert_array_equal(a, hidden(layout, wet, params, batch, jax.random.key(1)))
    assert not np.allclose(a, hidden(layout, wet, params, batch, jax.random.key(2)))
    assert not np.allclose(a, dry)


def test_padded_vocabulary_is_out_of_reach(built):
    layout, model, params = built["decoder"]
    x = hidden(layout, model, params, families.batch())
    with jax.set_mesh(layout.mesh):
        logits = model.apply({"params": params}, x, method="logits")
    assert logits.shape[-1] == 128 and logits.dtype == jnp.float32
    assert (np.asarray(logits)[..., VOCAB:] <= -1e29).all()
    assert (np.abs(np.asarray(logits)[..., :VOCAB]) < 1e3).all()


@pytest.mark.slow
def test_initial_parameters():
    """The same on every mesh; of the stated spread; stored in shards."""
    one = families.initial(DECODER, families.layout_of())
    layout = families.layout_of(2, 2, 2)
    eight = families.initial(DECODER, layout)
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    w = eight["blocks"]["mlp"]["in"]
    assert w.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert w.addressable_shards[0].data.size * 4 == w.size
    assert np.std(one["blocks"]["attention"]["query"]) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(one["blocks"]["attention"]["out"]) == pytest.approx(32**-0.5 / 2, rel=0.05)


def test_bfloat16_is_close(built):
    layout, model, params = built["decoder"]
    half = Transformer(dataclasses.replace(model.config, dtype="bfloat16"), layout)
    x = hidden(layout, half, params, families.batch())
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        x.astype(jnp.float32), hidden(layout, model, params, families.batch()), atol=0.1
    )


def test_init_params_needs_no_batch():
    layout = families.layout_of(2, 2, 2)
    with jax.set_mesh(layout.mesh):
        shapes = jax.eval_shape(lambda key: init_params(Transformer(DECODER, layout), key), jax.random.key(0))
    assert shapes["embedding"].shape == (128, 32)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "2x2x2"])
def test_small_tables_are_read_by_a_product(sizes, family):
    """On an accelerator; values and gradients are those of looking up, on any mesh."""
    layout = families.layout_of(**sizes)
    config = dataclasses.replace(FAMILIES[family], kernel="dense")
    model, params = families.make(config, layout)
    other = Transformer(config, dataclasses.replace(layout, platform="gpu"))
    batch = families.place(families.batch(), layout)

    def embedded(model, params):
        x = model.apply({"params": params}, batch.inputs, batch.positions, method="embed")
        return jnp.sum(jnp.sin(x)), x

    with jax.set_mesh(layout.mesh):
        one, two = (
            jax.jit(jax.value_and_grad(lambda p, m=m: embedded(m, p), has_aux=True))(params)
            for m in (model, other)
        )
        assert "dot_general" in str(jax.make_jaxpr(lambda p: embedded(other, p)[1])(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), one, two)


def test_gradients_of_a_token_s_places_add_up_in_float32():
    """In bfloat16, 256 + 1 is 256: a token of 1,000 places would have a quarter of its gradient."""
    layout = families.layout_of()
    config = dataclasses.replace(DECODER, dtype="bfloat16", max_length=1000)
    model, params = families.make(config, layout)
    tokens = jnp.full((1, 1000), 7, jnp.int32)

    def total(params):
        x = model.apply({"params": params}, tokens, jnp.arange(1000)[None], method="embed")
        return jnp.sum(x.astype(jnp.float32))

    with jax.set_mesh(layout.mesh):
        gradient = jax.jit(jax.grad(total))(params)["embedding"]
    np.testing.assert_allclose(gradient[7], 1000.0, rtol=0.01)


def test_the_head_s_gradients_are_products_in_its_dtype():
    """Though the scores, and so what comes back from them, are float32."""
    layout = families.layout_of()
    model, params = families.make(dataclasses.replace(DECODER, dtype="bfloat16"), layout)
    hidden = jnp.ones((2, LENGTH, DECODER.model_dim), jnp.bfloat16)

    def total(params, hidden):
        scores = model.apply({"params": params}, hidden, method="logits")
        assert scores.dtype == jnp.float32
        return jnp.sum(jnp.sin(scores))

    with jax.set_mesh(layout.mesh):
        equations = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, hidden).jaxpr.eqns
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(products) >= 2
    assert {str(x.aval.dtype) for e in products for x in e.invars} == {"bfloat16"}


def test_a_gpu_s_scores_are_rounded_where_they_are_differentiated():
    """And only there: an evaluation's are what the products give."""
    layout, draw = families.layout_of(), np.random.default_rng(0)
    hidden_bld = jnp.asarray(draw.normal(size=(2, 8, 16)), jnp.bfloat16)
    head_vd = jnp.asarray(draw.normal(size=(32, 16)), jnp.bfloat16)
    with jax.set_mesh(layout.mesh):
        score = partial(head_product.scores, layout.spec("batch", "length", "vocab"))
        exact, whole = jax.vjp(partial(score, False), hidden_bld, head_vd)
        rounded, back = jax.vjp(partial(score, True), hidden_bld, head_vd)
        np.testing.assert_array_equal(score(True, hidden_bld, head_vd), exact)
        assert rounded.dtype == jnp.float32
        np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16))
        np.testing.assert_allclose(rounded, exact, rtol=2**-8)
        assert (rounded != exact).any()
        for one, other in zip(back(exact), whole(exact), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"stage": 2, "fsdp": 2}, {"data": 2, "tensor": 2}, {"context": 2}])
@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_what_a_gpu_keeps_in_memory_changes_no_gradient(sizes, dtype, off):
    """Barriers, rounded scores, and products for small tables, on any mesh. off: of the largest entry."""
    changes = {"kernel": "dense", "norm": "layernorm", "num_layers": 4, "remat": True, "dtype": dtype}
    config, objective, found = dataclasses.replace(DECODER, **changes), CLM(), []
    for platform in ("cpu", "gpu"):
        layout = dataclasses.replace(families.layout_of(**sizes), platform=platform)
        model, params = families.make(config, layout)
        batch = families.place(families.batch(8), layout)

        def loss(params, batch, model=model):
            weights = step.loss_weights(model, objective, batch)
            return step.make_losses(model, objective)(params, batch, weights, None)["loss"]

        with jax.set_mesh(layout.mesh):
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(params, batch)))
    for here, there in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(there, here, rtol=0, atol=off * max(1.0, np.abs(here).max()))


@pytest.mark.parametrize(
    ("platform", "changes", "joined"),
    [
        ("cpu", {"positions": "learnt"}, True),
        ("gpu", {"positions": "learnt"}, False),
        ("gpu", {"positions": "learnt", "qk_norm": True}, True),
        ("gpu", {"positions": "rotary"}, True),
    ],
)
def test_what_a_gpu_s_kernel_takes_untouched_has_products_of_its_own(platform, changes, joined):
    """Queries, keys and values; the same numbers either way."""
    config = dataclasses.replace(DECODER, kernel="dense", **changes)
    one = families.layout_of()
    model, params = families.make(config, one)
    other = Transformer(config, dataclasses.replace(one, platform=platform))
    batch = families.place(families.batch(2), one)

    def hidden(model):
        return model.apply({"params": params}, batch.inputs, batch.positions, batch.segments)[0]

    with jax.set_mesh(one.mesh):
        text = str(jax.make_jaxpr(lambda: hidden(other))())
        assert text.count(" split[") == 1 + joined  # of the scanned layer: gate and input, and these
        np.testing.assert_allclose(hidden(other), hidden(model), rtol=1e-5, atol=1e-6)
