import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.data.batch import Batch
from llm_jax.layout import Layout
from llm_jax.mesh import AXES, MeshConfig, make_layout
from llm_jax.objectives import cross_entropy as loss_module
from llm_jax.objectives.cross_entropy import PredictsTokens, cross_entropy

BATCH, LENGTH, DIM, VOCAB = 4, 12, 8, 20
ONE = make_layout(MeshConfig(), jax.devices()[:1])
EIGHT = make_layout(MeshConfig(2, 2, 2), jax.devices())
CUT = make_layout(MeshConfig(fsdp=2, tensor=2, context=2), jax.devices())
WHOLE = make_layout(MeshConfig(data=2, fsdp=2, context=2), jax.devices())
LAYOUTS = pytest.mark.parametrize("layout", [ONE, EIGHT, CUT], ids=["1", "2x2x2", "length cut"])
LIMITS = {"whole": 1 << 26, "4 chunks": BATCH * VOCAB * 3, "one token": 1}


def make_arrays(scale=1.0, vocab=VOCAB):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
    table = (scale * rng.normal(size=(vocab, DIM))).astype(np.float32)
    targets = rng.integers(0, vocab, (BATCH, LENGTH)).astype(np.int32)
    weights = (rng.random((BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) < 0.7)).astype(np.float32)
    return hidden, table, targets, weights


def reference(hidden, table, targets, weights):
    """((loss, correct), gradients by hidden and table), in float64, by the definition."""
    table = table.astype(np.float64)
    logits = hidden @ table.T
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    one_hot = np.eye(len(table))[targets]
    loss = -np.sum(weights * np.sum(log_p * one_hot, -1))
    correct = np.sum(weights * (logits.argmax(-1) == targets))
    slope = weights[..., None] * (np.exp(log_p) - one_hot)
    return (loss, correct), (slope @ table, np.einsum("blv,bld->vd", slope, hidden))


def make_loss(layout, max_logits):
    """(hidden, table, targets, weights) -> (loss, right first guesses); the vocabulary lies on tensor."""

    def loss(hidden, table, targets, weights):
        def logits_fn(hidden):
            out = layout.spec("batch", "length", "vocab")
            return jnp.einsum("bld,vd->blv", hidden, table, out_sharding=out)

        sums = cross_entropy(logits_fn, layout.enter(hidden), targets, weights, max_logits)
        return sums["loss"], sums["accuracy"]

    return loss


def place(layout, arrays):
    axes = [("batch", "residual", None), ("vocab", None), ("batch", None), ("batch", None)]
    return [jax.device_put(x, layout.named(*names)) for x, names in zip(arrays, axes, strict=True)]


def run(layout, max_logits, arrays):
    """((loss, correct), gradients by hidden and table). max_logits: over all devices."""
    with jax.set_mesh(layout.mesh):
        loss = make_loss(layout, max(1, max_logits // layout.mesh.size))
        step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.device_get(jax.jit(step)(*place(layout, arrays)))


def assert_close(got, wanted, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), got, wanted)


@pytest.mark.parametrize("limit", LIMITS)
@LAYOUTS
def test_equals_the_definition(layout, limit):
    """In value and gradient, in any number of chunks, with the vocabulary and the length whole or cut."""
    arrays = make_arrays()
    assert_close(run(layout, LIMITS[limit], arrays), reference(*arrays))


@pytest.mark.parametrize(("vocab", "groups"), [(1152, 3), (2560, 4), (1000, 0), (128, 0)])
@pytest.mark.parametrize("layout", [ONE, WHOLE, CUT], ids=["1", "vocabulary whole", "vocabulary cut"])
def test_a_gpu_puts_groups_of_scores_together(monkeypatch, layout, vocab, groups):
    """In two passes where a group divides the vocabulary and it is whole; the same by the definition."""
    monkeypatch.setattr(loss_module, "platform_of", lambda _: "gpu")
    arrays, seen = make_arrays(vocab=vocab), []
    kept = loss_module._barrier
    monkeypatch.setattr(loss_module, "_barrier", lambda x: seen.append(x.shape[-1]) or kept(x))
    assert_close(run(layout, 1 << 26, arrays), reference(*arrays))
    assert {*seen} == ({groups} if groups and layout is not CUT else set())


def test_chunked_equals_whole():
    arrays = make_arrays()
    whole = run(ONE, LIMITS["whole"], arrays)
    for limit in (1, BATCH * VOCAB, BATCH * VOCAB * 5, BATCH * VOCAB * (LENGTH - 1)):
        assert_close(run(ONE, limit, arrays), whole, 1e-6)


@pytest.mark.parametrize(
    "limit, chunk",
    [
        (BATCH * LENGTH * VOCAB, 12),
        (BATCH * LENGTH * VOCAB - 1, 6),
        (BATCH * VOCAB * 5, 4),  # a divisor of the length
        (BATCH * VOCAB, 1),
        (1, 1),
    ],
)
def test_no_more_logits_than_allowed(limit, chunk):
    """In forward and backward: the largest array of anything by the vocabulary, stacked ones included."""
    with jax.set_mesh(ONE.mesh):
        step = jax.grad(make_loss(ONE, limit), argnums=(0, 1), has_aux=True)
        text = str(jax.make_jaxpr(step)(*place(ONE, make_arrays())))
    text = re.sub(r"@(\([^)]*\)|\w+)", "", text)  # shapes without their shardings
    shapes = [list(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]", text)]
    sizes = [math.prod(shape) for shape in shapes if len(shape) > 2 and shape[-1] == VOCAB]
    assert max(sizes) == BATCH * chunk * VOCAB


def test_a_cut_length_is_not_moved():
    """Every chunk takes as much of each shard: on 4 devices along context nothing but sums is exchanged."""
    layout = make_layout(MeshConfig(context=4), jax.devices()[:4])
    with jax.set_mesh(layout.mesh):
        arrays = place(layout, make_arrays())
        text = jax.jit(make_loss(layout, BATCH * VOCAB)).lower(*arrays).compile().as_text()
    assert "while(" in text
    assert set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)[-\w]*\(", text)) == {"all-reduce"}


@pytest.mark.parametrize(
    "sizes, chunks", [({"fsdp": 128}, 8), ({"fsdp": 32, "context": 4}, 2), ({"fsdp": 32, "tensor": 4}, 8)]
)
def test_chunks_by_what_one_device_holds(sizes, chunks):
    """Llama 3's vocabulary on 128 chips, a row of 4,096 tokens on each: 2^26 logits are 523 of its tokens."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    layout = Layout(jax.sharding.AbstractMesh(shape, AXES, axis_types=explicit))
    rows = 128 // sizes.get("context", 1)

    def loss(hidden, table, targets, weights):
        def logits_fn(hidden):
            out = layout.spec("batch", "length", "vocab")
            return jnp.einsum("bld,vd->blv", hidden, table, out_sharding=out)

        hidden = layout.shard(hidden, "batch", "length", None)
        return cross_entropy(logits_fn, hidden, targets, weights)["loss"]

    with jax.sharding.use_abstract_mesh(layout.mesh):
        arrays = [(rows, 4096, 8), (128_256, 8), (rows, 4096), (rows, 4096)]
        dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
        types = [jax.ShapeDtypeStruct(*one) for one in zip(arrays, dtypes, strict=True)]
        jaxpr = jax.make_jaxpr(loss)(*types).jaxpr
    assert [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"] == [chunks]


@pytest.mark.parametrize("limit", LIMITS)
def test_large_logits_stay_finite_and_right(limit):
    """Logits of thousands, whose exponential no float32 holds."""
    arrays = make_arrays(scale=500.0)
    sums, grads = run(ONE, LIMITS[limit], arrays)
    assert_close(sums, reference(*arrays)[0])
    assert all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.parametrize("limit", LIMITS)
def test_nothing_to_predict_is_zero_with_zero_gradient(limit):
    hidden, table, targets, weights = make_arrays()
    sums, grads = run(ONE, LIMITS[limit], (hidden, table, targets, 0 * weights))
    assert sums == (0.0, 0.0)
    assert all(not np.any(grad) for grad in grads)


def test_weights_scale_each_token():
    hidden, table, targets, weights = make_arrays()
    total = run(ONE, LIMITS["whole"], (hidden, table, targets, weights))
    parts = [weights * (np.arange(LENGTH) % 2 == i) for i in (0, 1)]
    halves = [run(ONE, LIMITS["whole"], (hidden, table, targets, part)) for part in parts]
    assert_close(jax.tree.map(np.add, *halves), total)


def test_entries_that_pad_the_vocabulary_change_nothing():
    hidden, table, targets, weights = make_arrays()

    def loss(padding):
        def logits_fn(hidden):
            logits = jnp.einsum("bld,vd->blv", hidden, table)
            return jnp.concatenate([logits, jnp.full((BATCH, LENGTH, padding), -1e30)], axis=-1)

        extras = ("z_loss", "smoothed_loss")
        states = jnp.asarray(hidden)
        return cross_entropy(logits_fn, states, targets, weights, extras=extras, smoothing=0.2)

    with jax.set_mesh(ONE.mesh):
        assert jax.jit(loss, static_argnums=0)(0) == jax.jit(loss, static_argnums=0)(12)


def test_objective_reports_sums_and_their_weights():
    hidden, table, targets, weights = make_arrays()
    (loss, correct), _ = reference(hidden, table, targets, weights)
    batch = Batch(targets, targets, weights, targets, targets)
    with jax.set_mesh(ONE.mesh):
        hidden = jnp.asarray(hidden)
        sums = PredictsTokens().sums(lambda h: jnp.einsum("bld,vd->blv", h, table), hidden, batch)
        totals = PredictsTokens().weights(batch)
    assert_close(sums, {"loss": loss, "accuracy": correct})
    assert_close(totals, {"loss": weights.sum(), "accuracy": weights.sum()})
    assert PredictsTokens().coefficients == {"loss": 1.0}


def smoothed_and_z(hidden, table, targets, weights, smoothing):
    """By the definitions, in float64: cross-entropy against a mixed target, log^2 of the sum of exp."""
    logits = (hidden @ table.T).astype(np.float64)
    log_total = np.log(np.exp(logits).sum(-1))
    mixed = (1 - smoothing) * np.eye(VOCAB)[targets] + smoothing / VOCAB
    return -np.sum(weights[..., None] * mixed * (logits - log_total[..., None])), np.sum(
        weights * log_total**2
    )


@pytest.mark.parametrize("limit", LIMITS)
def test_label_smoothing_and_z_loss(limit):
    """They are trained on beside the plain loss, which is still reported."""
    hidden, table, targets, weights = make_arrays()
    objective = PredictsTokens(z_loss=1e-3, label_smoothing=0.2)
    assert objective.coefficients == {"smoothed_loss": 1.0, "z_loss": 1e-3}
    with jax.set_mesh(ONE.mesh):
        sums = cross_entropy(
            lambda h: jnp.einsum("bld,vd->blv", h, table),
            *(jnp.asarray(hidden), targets, weights),
            *(LIMITS[limit], ("z_loss", "smoothed_loss"), 0.2),
        )
        totals = objective.weights(Batch(targets, targets, weights, targets, targets))
    smoothed, z = smoothed_and_z(hidden, table, targets, weights, 0.2)
    (loss, correct), _ = reference(hidden, table, targets, weights)
    assert_close(sums, {"loss": loss, "accuracy": correct, "z_loss": z, "smoothed_loss": smoothed})
    assert totals.keys() == sums.keys()


@LAYOUTS
def test_the_loss_at_predicted_places_is_the_loss(layout):
    """In value and gradient, with places of weight 0 among them and a number that a cut length does not
    divide; other places cost no logits."""
    hidden, table, targets, weights = make_arrays()
    weights = weights * (np.argsort(np.argsort(-weights, axis=1), axis=1) < 4)
    predict = np.argsort(-weights, axis=1, kind="stable")[:, :5].astype(np.int32)

    def sums(hidden, table, targets, weights, predict):
        def logits_fn(x):
            out = layout.spec("batch", "length", "vocab")
            return jnp.einsum("bld,vd->blv", x, table, out_sharding=out)

        batch = Batch(targets, targets, weights, targets, targets, predict)
        return PredictsTokens().sums(logits_fn, layout.enter(hidden), batch)["loss"]

    with jax.set_mesh(layout.mesh):
        placed = place(layout, (hidden, table, targets, weights))
        placed_predict = jax.device_put(predict, layout.named("batch", None))
        step = jax.jit(jax.value_and_grad(sums, argnums=(0, 1)))
        assert_close(step(*placed, placed_predict), step(*placed, None))


def test_top5_accuracy():
    """In evaluation alone: targets among the five largest scores."""
    hidden, table, targets, weights = make_arrays()
    batch = Batch(targets, targets, weights, targets, targets)
    with jax.set_mesh(ONE.mesh):
        sums = PredictsTokens().sums(
            lambda h: jnp.einsum("bld,vd->blv", h, table), jnp.asarray(hidden), batch, evaluating=True
        )
        totals = PredictsTokens().weights(batch, evaluating=True)
    best = np.argsort(-(hidden @ table.T), axis=-1)[..., :5]
    found = (best == targets[..., None]).any(-1)
    assert sums["top5_accuracy"] == pytest.approx(np.sum(weights * found), rel=1e-6)
    assert sums.keys() == totals.keys()


@pytest.mark.parametrize(
    ("kind", "platform", "count"),
    [
        ("NVIDIA H200", "gpu", 141_000_000_000 // 16),
        ("NVIDIA X9", "gpu", loss_module.MAX_LOGITS),
        ("TPU v5p", "tpu", loss_module.MAX_LOGITS),
    ],
)
def test_a_gpu_holds_its_share_of_logits(kind, platform, count):
    """By the table of chips; of an unknown one as much as elsewhere."""
    device = jax.sharding.AbstractDevice(kind, None, platform)
    assert loss_module.most_logits(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)) == count
    assert loss_module.most_logits(ONE.mesh) == loss_module.MAX_LOGITS
