"""The mixture of experts: against a loop over experts, on any mesh, and what it does in training."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import DECODER, ENCODER, LENGTH

from llm_jax import config as configs
from llm_jax.errors import UserError
from llm_jax.inference.cache import empty_cache
from llm_jax.mesh import MeshConfig
from llm_jax.models import experts, flops, moe
from llm_jax.models.moe import MoE
from llm_jax.objectives.clm import CLM
from llm_jax.training import experiment, fitting, optimizers, step
from llm_jax.training.schedules import WarmupCosine
from llm_jax.training.state import State

ONE = families.layout_of()
EXPERTS = 4
MIXED = dataclasses.replace(DECODER, num_experts=EXPERTS, mlp_dim=16)
ENOUGH = {"capacity_factor": float(EXPERTS)}  # room for every token in every expert
SEGMENTS = np.tile(np.repeat(np.array([1, 2, 0], np.int32), (7, 6, 3)), (4, 1))
REAL = SEGMENTS > 0


@functools.cache
def one_layer(**changes):
    """A layer alone on random tokens: (config, parameters, x, y, values), on the host."""
    config = dataclasses.replace(MIXED, **changes)
    layer = MoE(config, ONE, "float32")
    x = np.random.default_rng(0).normal(size=(4, LENGTH, config.model_dim)).astype(np.float32)
    with jax.set_mesh(ONE.mesh):
        params = jax.jit(layer.init)(jax.random.key(0), x, SEGMENTS)
        y, values = jax.jit(layer.apply)(params, x, SEGMENTS)
    return config, *jax.device_get((params["params"], x, y, values))


def loop(config, params, x):
    """The same by a loop over tokens, experts and groups. Also the share of the choices dropped."""

    def mlp(weights, x):
        gate = x @ weights["gate"]
        return (gate / (1 + np.exp(-gate)) * (x @ weights["in"])) @ weights["out"]

    y, k = np.zeros_like(x), config.experts_per_token
    group = config.routing_group or LENGTH
    room = int(np.ceil(config.capacity_factor * group * k / EXPERTS)) if config.capacity_factor else group
    dropped = 0
    for row in range(len(x)):
        for i in range(LENGTH):
            if i % group == 0:
                used = np.zeros(EXPERTS, int)
            logits = x[row, i] @ params["router"]
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            best = np.argsort(-p, kind="stable")[:k]
            for e in best if REAL[row, i] else ():
                used[e] += 1
                dropped += used[e] > room
                if used[e] <= room:
                    weight = p[e] if k == 1 else p[e] / p[best].sum()
                    y[row, i] += weight * mlp(
                        {name: params[name][e] for name in ("in", "gate", "out")}, x[row, i]
                    )
            if config.shared_experts:
                y[row, i] += mlp(params["shared"], x[row, i])
    return y, dropped / (k * REAL.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"experts_per_token": 1},
        {"experts_per_token": 2, "shared_experts": 1},
        {"experts_per_token": 1, "capacity_factor": 0.7, "shared_experts": 2},
        {"experts_per_token": 2, "capacity_factor": 1.0},
        {"experts_per_token": 2, "capacity_factor": 0.8, "routing_group": 8},
    ],
    ids=["switch", "top 2, shared", "switch, capacity, shared", "capacity", "groups"],
)
def test_equals_a_loop(changes):
    config, params, x, y, values = one_layer(**changes)
    expected, dropped = loop(config, params, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
    if config.capacity_factor:
        assert values["dropped"] == pytest.approx(dropped, abs=1e-6) and dropped > 0.02


@pytest.mark.slow
def test_enough_capacity_drops_nothing():
    *_, y, values = one_layer(**ENOUGH)
    np.testing.assert_allclose(y, one_layer()[3], rtol=0, atol=2e-6)
    assert values["dropped"] == 0.0


@pytest.mark.slow
def test_later_tokens_push_nobody_out():
    """With room for few, a causal model stays causal."""
    config = dataclasses.replace(MIXED, capacity_factor=0.5)
    model, params = families.make(config, ONE)
    batch = families.batch(2)
    other = batch.replace(inputs=np.concatenate([batch.inputs[:, :9], batch.inputs[:, :7]], axis=1))
    with jax.set_mesh(ONE.mesh):
        apply = jax.jit(lambda b: model.apply({"params": params}, b.inputs, b.positions, b.segments))
        (x, aux), (changed, _) = apply(batch), apply(other)
    np.testing.assert_array_equal(x[:, :9], changed[:, :9])
    assert np.abs(x - changed)[:, 9:].max() > 1e-3
    total, weight = aux.losses["dropped"]
    assert weight == batch.inputs.size and total / weight > 0.2


@pytest.mark.slow
def test_routing_values():
    """Even routing, and all tokens to one expert; padding counts for nothing."""
    even = np.zeros((4, LENGTH, EXPERTS), np.float32)
    ids = np.cumsum(REAL.reshape(-1)).reshape(REAL.shape) % EXPERTS  # 52 real tokens, 13 an expert
    np.put_along_axis(even, ids[..., None], 1e-4, axis=2)
    even[~REAL] = [50.0, 0.0, 0.0, 0.0]
    choices, values = moe.route(jnp.asarray(even), jnp.asarray(REAL), 1)
    assert values["balance_loss"] == pytest.approx(1.0, abs=1e-6)
    assert values["load_entropy"] == pytest.approx(1.0, abs=1e-6)
    assert values["router_z_loss"] == pytest.approx(np.log(EXPERTS) ** 2, rel=1e-3)
    assert (np.asarray(choices.ids)[~REAL] == EXPERTS).all()
    collapsed = np.tile(np.array([9.0, 0.0, 0.0, 0.0], np.float32), (4, LENGTH, 1))
    _, values = moe.route(jnp.asarray(collapsed), jnp.asarray(REAL), 1)
    assert values["balance_loss"] == pytest.approx(EXPERTS, rel=1e-2)
    assert values["load_entropy"] == pytest.approx(0.0, abs=1e-6)


# ---- a step on any mesh ---------------------------------------------------------------------

MASKED = dataclasses.replace(
    ENCODER, num_experts=EXPERTS, shared_experts=1, experts_per_token=1, scan_layers=True
)
UNTAUGHT = dataclasses.replace(MIXED, balance_loss=0.0, router_z_loss=0.0)
ROOM = dataclasses.replace(MIXED, capacity_factor=1.0, routing_group=4, remat=True)
LAYOUTS = {
    "fsdp x expert x tensor": (MIXED, {"fsdp": 2, "expert": 2, "tensor": 2}, 1),
    "capacity, fsdp x expert x tensor": (ROOM, {"fsdp": 2, "expert": 2, "tensor": 2}, 2),
    "capacity, zero 2": (ROOM, {"fsdp": 2, "expert": 2, "tensor": 2, "zero": 2}, 2),
    "capacity, expert x context": (ROOM, {"expert": 2, "context": 2}, 2),
    "encoder, fsdp x expert": (MASKED, {"fsdp": 2, "expert": 2}, 1),
}


def batch_with_padding():
    """Packed rows that end in padding."""
    batch = families.batch(16, segments=np.tile(SEGMENTS, (4, 1)))
    return batch.replace(weights=batch.weights * (batch.segments > 0))


@functools.cache
def gradients(config, mesh, accumulation):
    """Means and gradients of one step, on the host."""
    layout = families.layout_of(**dict(mesh))
    model, params = families.make(config, layout)
    batch = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch_with_padding())
    with jax.set_mesh(layout.mesh):

        @jax.jit
        def compute(params, batch):
            weights = step.loss_weights(model, CLM(), batch)
            return step.make_gradients(model, CLM(), 0)(State.create(params, ()), batch, weights)

        means, grads = compute(params, families.place(batch, layout, lead=1))
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)
    into = params["blocks"]["mlp"]["in"]
    cuts = [layout.mesh.shape[axis] for axis in ("expert", "fsdp", "tensor")]
    assert into.addressable_shards[0].data.size * np.prod(cuts) == into.size
    return jax.device_get((means, grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_many_devices_equal_one(name):
    config, mesh, accumulation = LAYOUTS[name]
    means, grads = gradients(config, tuple(mesh.items()), accumulation)
    expected, expected_grads = gradients(config, (), accumulation)
    for value in expected:
        np.testing.assert_allclose(means[value], expected[value], rtol=1e-5, atol=1e-6)

    def compare(got, wanted):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    jax.tree.map(compare, grads, expected_grads)


@pytest.mark.slow
def test_gradients_reach_routers_and_experts():
    for config in (MIXED, UNTAUGHT):
        grads = gradients(config, (), 1)[1]["blocks"]["mlp"]
        assert np.abs(grads["router"]).max(axis=(1, 2)).min() > 1e-4
        for name in ("in", "gate", "out"):
            assert np.abs(grads[name]).max(axis=(2, 3)).min() > 1e-5


@pytest.mark.slow
def test_own_losses_are_trained_on():
    """The gradient has those of every layer's own losses, each with the whole coefficient."""
    model, params = families.make(MIXED, ONE)
    batch = batch_with_padding()

    def own(params):
        _, aux = model.apply({"params": params}, batch.inputs, batch.positions, batch.segments)
        means = {name: total / weight for name, (total, weight) in aux.losses.items()}
        layers = MIXED.num_layers  # the means are over them
        return layers * (0.01 * means["balance_loss"] + 0.001 * means["router_z_loss"])

    with jax.set_mesh(ONE.mesh):
        expected = jax.jit(jax.grad(own))(params)["blocks"]["mlp"]["router"]
    taught, untaught = (gradients(c, (), 1)[1]["blocks"]["mlp"]["router"] for c in (MIXED, UNTAUGHT))
    np.testing.assert_allclose(taught - untaught, expected, rtol=0, atol=1e-6)
    assert np.abs(expected).max(axis=(1, 2)).min() > 1e-4
    assert moe.coefficients(DECODER) == {}


@pytest.mark.slow
def test_training_keeps_the_experts_busy():
    """100 steps on 8 rows: the loss falls, the load is even (entropy 0.971 without balance_loss)."""
    config = dataclasses.replace(MIXED, num_experts=8, experts_per_token=1, capacity_factor=1.25)

    model, params = families.make(config, ONE)
    optimizer = optimizers.build(optimizers.AdamW(), WarmupCosine().build(1e-2, 100))
    one = step.make_step(model, CLM(), optimizer, seed=0)
    batch = jax.tree.map(lambda x: np.stack([x[None]] * 100), families.batch())
    with jax.set_mesh(ONE.mesh):
        state = State.create(params, optimizer.transformation.init(params))
        metrics = jax.device_get(jax.jit(step.make_steps(one))(state, batch)[1])
    assert metrics["loss"][-1] < 0.1 * metrics["loss"][0]
    assert metrics["load_entropy"][0] < 0.95 and metrics["load_entropy"][-1] > 0.985
    assert metrics["dropped"][-1] < 0.5 * metrics["dropped"][0]


# ---- decoding, FLOPs, config ----------------------------------------------------------------


@pytest.mark.slow
def test_cached_decoding_equals_the_full_pass():
    layout = families.layout_of(expert=2, tensor=2).decoding()
    model, params = families.make(dataclasses.replace(MIXED, capacity_factor=0.5), layout)
    full = dataclasses.replace(model, config=MIXED)  # decoding drops nothing
    batch = families.batch(2)
    with jax.set_mesh(layout.mesh):
        tokens, places, ones = (
            layout.shard(x, "batch") for x in (batch.inputs, batch.positions, batch.segments)
        )
        expected, _ = jax.jit(lambda p: full.apply({"params": p}, tokens, places, ones))(params)

        @functools.partial(jax.jit, static_argnums=3)
        def read(params, cache, start, length):
            part = [jax.lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in (tokens, places, ones)]
            x, aux = model.apply({"params": params}, *part, cache=cache, cache_index=start)
            return x, aux.layers.cache

        cache = jax.jit(lambda: empty_cache(MIXED, layout, 2, LENGTH))()
        x, cache = read(params, cache, 0, 10)
        steps = [x]
        for i in range(10, LENGTH):
            x, cache = read(params, cache, i, 1)
            steps.append(x)
    got = np.concatenate([np.asarray(x) for x in steps], axis=1)
    np.testing.assert_allclose(got, np.asarray(expected), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [0.0, 1.0], ids=["dropless", "capacity"])
def test_training_flops(capacity):
    """Those of the experts that a token has, with no room to spare."""
    config = dataclasses.replace(MIXED, capacity_factor=capacity, shared_experts=1, scan_layers=False)
    model, params = families.make(config, ONE)
    batch = families.batch()

    def loss(params):
        variables = {"params": params}
        x = model.apply(variables, batch.inputs, batch.positions, batch.segments)[0]
        return model.apply(variables, x, method="logits").sum()

    with jax.set_mesh(ONE.mesh):
        traced = flops.traced_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    counted = flops.training_flops_per_token(config, LENGTH) * batch.inputs.size
    assert counted == pytest.approx(traced, rel=1e-3)


def test_room():
    assert experts.Room(1.25, 0).places(16, 2, 4) == 10
    assert experts.Room(1.0, 0).places(5, 1, 4) == 2  # rounded up
    assert experts.Room(9.0, 0).places(5, 2, 4) == 5  # no more than there are tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared_experts": 1}, "set model.num_experts"),
        ({"capacity_factor": 1.0}, "set model.num_experts"),
        ({"num_experts": 2, "experts_per_token": 3}, "at most num_experts=2"),
        ({"num_experts": 2, "routing_group": 4}, "set model.capacity_factor"),
        (
            {"num_experts": 2, "routing_group": 7, "capacity_factor": 1.0},
            "does not divide data.sequence_length",
        ),
        ({"num_experts": -1}, "at least 0"),
    ],
)
def test_bad_configs(changes, words):
    config = experiment.default_config()
    changes = {f"model.{key}": value for key, value in changes.items()}
    with pytest.raises(UserError, match=words):
        experiment.check_model(configs.from_dict(experiment.Experiment, experiment.override(config, changes)))


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({"num_experts": 6}, {"expert": 4}, "blocks/mlp/in, experts"),
        ({"num_experts": 4, "capacity_factor": 1.0}, {"context": 2}, "routing_group=0: with mesh.context=2"),
        (
            {"num_experts": 4, "capacity_factor": 1.0, "routing_group": 64},
            {"context": 2},
            "the 32 of a piece",
        ),
    ],
)
def test_bad_meshes(changes, mesh, words):
    changes = {f"model.{key}": value for key, value in changes.items()} | {"data.sequence_length": 128}
    config = experiment.override(experiment.default_config(), changes)
    with pytest.raises(UserError, match=words):
        fitting.check_mesh(configs.from_dict(experiment.Experiment, config), MeshConfig(**mesh, data=1).sizes)


def test_dense_models_keep_their_fingerprints():
    model = dataclasses.replace(DECODER, num_experts=0)
    assert not [
        key for key, _ in configs.leaves(model, only_identity=True) if "expert" in key or "rout" in key
    ]
    _, params = families.make(DECODER, ONE)
    assert set(params["blocks"]["mlp"]) == {"in", "gate", "out"}
