"""The step: the same numbers on any mesh and in any number of micro-batches, nothing from bad numbers."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES

from llm_jax.objectives.clm import CLM
from llm_jax.training import optimizers, step
from llm_jax.training.evaluate import evaluate, make_evaluation
from llm_jax.training.loss_scale import LossScale, LossScaleConfig
from llm_jax.training.schedules import WarmupCosine
from llm_jax.training.state import State

MESHES = {
    "decoder": [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)],
    "encoder": [(1, 1, 1), (2, 2, 2)],
}
CASES = [(family, mesh) for family, meshes in MESHES.items() for mesh in meshes]


@functools.cache
def trained(family, mesh, accumulation=1, steps=3):
    """Metrics of a few steps, on the host, and the last state."""
    layout = families.layout_of(*mesh)
    model, params = families.make(FAMILIES[family], layout)
    optimizer = optimizers.build(optimizers.AdamW(), WarmupCosine().build(1e-3, 100))
    one = step.make_step(model, CLM(), optimizer, seed=0)
    batches = [families.batch(seed=s) for s in range(steps)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    stacked = jax.tree.map(lambda x: x.reshape(steps, accumulation, -1, *x.shape[2:]), stacked)
    with jax.set_mesh(layout.mesh):
        state = State.create(params, optimizer.transformation.init(params))
        state, metrics = jax.jit(step.make_steps(one))(state, families.place(stacked, layout, lead=2))
    return jax.device_get(metrics), state


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), CASES[1:])
def test_one_device_equals_many(family, mesh):
    alone, _ = trained(family, (1, 1, 1))
    many, state = trained(family, mesh)
    np.testing.assert_allclose(many["loss"], alone["loss"], rtol=1e-5)
    np.testing.assert_allclose(many["grad_norm"], alone["grad_norm"], rtol=1e-4)
    w = state.params["blocks"]["mlp"]["in"]
    assert w.addressable_shards[0].data.size * mesh[1] * mesh[2] == w.size
    moment = state.opt_state[1].mu["blocks"]["mlp"]["in"]
    assert moment.sharding == w.sharding


@pytest.mark.slow
def test_accumulation_equals_the_big_batch():
    big, _ = trained("decoder", (1, 1, 1))
    for accumulation in (2, 4):
        small, _ = trained("decoder", (1, 1, 1), accumulation)
        np.testing.assert_allclose(small["loss"], big["loss"], rtol=2e-6)
        np.testing.assert_allclose(small["grad_norm"], big["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(small["accuracy"], big["accuracy"], rtol=1e-6)


@pytest.mark.slow
def test_accumulation_on_a_mesh():
    big, _ = trained("decoder", (1, 1, 1))
    small, _ = trained("decoder", (2, 2, 2), 2)
    np.testing.assert_allclose(small["loss"], big["loss"], rtol=1e-5)


@pytest.mark.slow
def test_several_steps_in_one_dispatch_are_the_steps():
    three, _ = trained("decoder", (1, 1, 1), steps=3)
    two, _ = trained("decoder", (1, 1, 1), steps=2)
    np.testing.assert_allclose(three["loss"][:2], two["loss"], rtol=1e-6)


@pytest.fixture(scope="module")
def machine():
    """A compiled step on one device, as a function of numpy batches."""
    layout = families.layout_of()
    model, params = families.make(families.DECODER, layout)
    optimizer = optimizers.build(optimizers.AdamW(), WarmupCosine().build(1e-2, 100))
    compiled = jax.jit(step.make_step(model, CLM(), optimizer, seed=0))

    def run(state, batch):
        with jax.set_mesh(layout.mesh):
            return compiled(state, families.place(jax.tree.map(lambda x: x[None], batch), layout, lead=1))

    with jax.set_mesh(layout.mesh):
        state = State.create(params, optimizer.transformation.init(params))
    return run, state, model, layout


def test_metrics(machine):
    run, state, *_ = machine
    new, metrics = run(state, families.batch())
    assert metrics["target_tokens"] == families.batch().weights.sum()
    assert metrics["learning_rate"] == pytest.approx(1e-2 / 21, rel=1e-5)
    assert metrics["skipped"] == 0 and new.step == 1
    moved = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), new.params, state.params)
    assert metrics["update_norm"] == pytest.approx(float(sum(jax.tree.leaves(moved))) ** 0.5, rel=1e-3)


def test_a_bad_step_changes_nothing(machine):
    """The embedding of one token is not a number: loss and gradients are not, the state stays."""
    run, state, *_ = machine
    state, _ = run(state, families.batch())
    is_token = (jnp.arange(128) == families.batch().inputs[0, 0])[:, None]
    embedding = jnp.where(is_token, jnp.nan, state.params["embedding"])
    bad = state.replace(params=state.params | {"embedding": embedding})
    new, metrics = run(bad, families.batch())
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    assert new.step == bad.step + 1
    jax.tree.map(np.testing.assert_array_equal, new.params, bad.params)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, bad.opt_state)
    _, again = run(new.replace(params=state.params), families.batch(seed=1))
    assert again["skipped"] == 0 and np.isfinite(again["loss"])


def test_nothing_to_predict(machine):
    """A batch whose weights are all 0 has loss 0 and moves the parameters by decay alone."""
    run, state, *_ = machine
    batch = families.batch()
    _, metrics = run(state, batch.replace(weights=np.zeros_like(batch.weights)))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0


def test_it_learns_a_batch_by_heart(machine):
    run, state, *_ = machine
    batch = families.batch(rows=8, seed=3)
    losses = []
    for _ in range(60):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 4.0 and losses[-1] < 1.5


def test_evaluation_is_the_mean_over_targets(machine):
    """Uneven batches count by their targets, and equal the step's own loss on the same batch."""
    run, state, model, layout = machine
    first, second = families.batch(seed=1), families.batch(seed=2)
    second = second.replace(weights=second.weights * (np.arange(16) < 3))
    wanted = [run(state, b)[1] for b in (first, second)]
    sums = jax.jit(make_evaluation(model, CLM()))
    with jax.set_mesh(layout.mesh):
        placed = [
            families.place(jax.tree.map(lambda x: x[None, None], b), layout, lead=2) for b in (first, second)
        ]
        result = evaluate(sums, state.params, placed)
    weights = [float(m["target_tokens"]) for m in wanted]
    mean = np.average([float(m["loss"]) for m in wanted], weights=weights)
    assert result["loss"] == pytest.approx(mean, rel=1e-6)
    assert result["targets"] == sum(weights)
    assert result["perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)


# ---- the running mean, and float16 ------------------------------------------------------------

GROWTH = 3


@pytest.fixture(scope="module")
def half():
    """A compiled float16 step with a loss scale and a running mean; batches as a whole, or cut in two."""
    layout = families.layout_of()
    config = dataclasses.replace(families.DECODER, dtype="float16")
    model, params = families.make(config, layout)
    optimizer = optimizers.build(optimizers.AdamW(), WarmupCosine().build(1e-2, 100))
    scaling = LossScaleConfig(initial=1024.0, growth_interval=GROWTH)
    compiled = jax.jit(step.make_step(model, CLM(), optimizer, 0, ema_decay=0.75, scaling=scaling))

    def run(state, batch, parts=1):
        with jax.set_mesh(layout.mesh):
            cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
            return compiled(state, families.place(cut, layout, lead=1))

    with jax.set_mesh(layout.mesh):
        opt_state = optimizer.transformation.init(params)
        return run, State.create(params, opt_state, ema=True, loss_scale=scaling.create())


def bad_batch():
    """Its loss is not a number, whatever the parameters."""
    batch = families.batch()
    return batch.replace(weights=batch.weights * np.float32(np.nan))


@pytest.mark.slow
def test_running_mean_equals_a_loop(half):
    """In float64, over steps of which one is skipped and counts for nothing."""
    run, state = half
    mean = jax.tree.map(lambda p: np.asarray(p, np.float64), state.params)
    for i in range(5):
        new, metrics = run(state, bad_batch() if i == 2 else families.batch(seed=i))
        assert metrics["skipped"] == (i == 2)
        if i == 2:
            jax.tree.map(np.testing.assert_array_equal, new.ema, state.ema)
        else:
            mean = jax.tree.map(lambda m, p: 0.75 * m + 0.25 * np.asarray(p), mean, new.params)
        state = new
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, mean)
    assert state.judged is state.ema
    assert np.abs(state.ema["embedding"] - state.params["embedding"]).max() > 1e-3


@pytest.mark.slow
def test_float16_is_near_float32(half, machine):
    """Loss and gradients are those of the loss, whatever the scale and the number of micro-batches."""
    batch = families.batch()
    exact = machine[0](machine[1], batch)[1]
    run, state = half
    for scale, parts in ((1024.0, 1), (256.0, 1), (1024.0, 2)):
        scaled = state.replace(loss_scale=LossScale(jnp.float32(scale), jnp.int32(0)))
        _, metrics = run(scaled, batch, parts)
        assert metrics["loss_scale"] == scale and metrics["skipped"] == 0
        assert metrics["loss"] == pytest.approx(float(exact["loss"]), rel=1e-3)
        assert metrics["loss"] != exact["loss"]  # it is float16
        assert metrics["grad_norm"] == pytest.approx(float(exact["grad_norm"]), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_overflow_halves_the_scale_and_changes_nothing_else(half, parts):
    run, state = half
    state, _ = run(state, families.batch())
    huge = state.replace(loss_scale=LossScale(jnp.float32(2.0**30), jnp.int32(2)))
    new, metrics = run(huge, families.batch(seed=1), parts)
    assert metrics["skipped"] == 1 and np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert new.loss_scale.scale == 2.0**29 and new.loss_scale.good == 0 and new.step == huge.step + 1
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, part), getattr(huge, part))
    for _ in range(30):
        new, metrics = run(new, families.batch(seed=1), parts)
        if metrics["skipped"] == 0:
            break
    assert metrics["skipped"] == 0 and 1.0 < new.loss_scale.scale < 2.0**25


@pytest.mark.slow
def test_good_steps_double_the_scale(half):
    run, state = half
    scales = []
    for i in range(2 * GROWTH + 1):
        state, metrics = run(state, families.batch(seed=i))
        scales.append(float(metrics["loss_scale"]))
    assert scales == [1024.0] * GROWTH + [2048.0] * GROWTH + [4096.0]
    state, _ = run(state, bad_batch())
    assert state.loss_scale.scale == 2048.0 and state.loss_scale.good == 0


def test_the_scale_does_not_fall_below_one():
    config, scale = LossScaleConfig(initial=2.0), LossScaleConfig(initial=2.0).create()
    for expected in (1.0, 1.0):
        scale = config.after(scale, jnp.bool_(False))
        assert scale.scale == expected
