"""The guard: what it finds bad, that bad steps change nothing, and when it gives up."""

import dataclasses

import families
import injection
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from injection import KINDS, PLACES, Fault

from llm_jax.errors import UserError
from llm_jax.objectives.clm import CLM
from llm_jax.training import optimizers, step
from llm_jax.training.guard import GuardConfig
from llm_jax.training.loss_scale import LossScaleConfig
from llm_jax.training.schedules import WarmupCosine
from llm_jax.training.state import State

SIGMA, WINDOW = 6.0, 8
GUARD = GuardConfig(SIGMA, WINDOW, patience=3)
SMALL = dataclasses.replace(families.DECODER, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2)


def judged(config, norms, losses=None, scales=None):
    """(applied, bad in row, limit) of every step, from the device, and the last guard."""
    norms = np.asarray(norms, np.float32)
    losses = np.ones_like(norms) if losses is None else np.asarray(losses, np.float32)
    scales = np.ones_like(norms) if scales is None else np.asarray(scales, np.float32)

    def one(guard, numbers):
        verdict = config.judge(guard, *numbers)
        return verdict.guard, (verdict.applied, verdict.metrics["bad_in_row"], config.limit(guard))

    guard, seen = jax.jit(lambda *numbers: jax.lax.scan(one, config.create(), numbers))(losses, norms, scales)
    return *jax.device_get(seen), jax.device_get(guard)


def test_the_window_equals_a_loop():
    """Against numpy: only applied steps are remembered, and nothing is limited before there are enough."""
    draw = np.random.default_rng(0)
    norms = draw.lognormal(size=300) * np.where(draw.random(300) < 0.1, 30.0, 1.0)
    norms[draw.random(300) < 0.05] = np.nan
    norms[20:24] = np.inf
    kept, wanted, limits = [], [], []
    for norm in norms.astype(np.float32):
        last = np.float64(kept[-WINDOW:])
        limits.append(last.mean() + SIGMA * last.std() if len(kept) >= WINDOW else np.inf)
        wanted.append(bool(np.isfinite(norm) and norm <= limits[-1]))
        if wanted[-1]:
            kept.append(norm)
    applied, in_row, limit, guard = judged(GuardConfig(SIGMA, WINDOW, patience=1000), norms)
    np.testing.assert_array_equal(applied, wanted)
    np.testing.assert_allclose(limit, limits, rtol=1e-5)
    assert 0 < np.sum(~applied & np.isfinite(norms)) < 60  # spikes were among them
    np.testing.assert_array_equal(np.sort(guard.norms), np.sort(kept[-WINDOW:]))
    streak = 0
    for good, count in zip(wanted, in_row, strict=True):
        streak = 0 if good else streak + 1
        assert count == streak


def test_patience_ends_everything():
    """After three bad steps in a row good ones change nothing either; two and a good one are forgiven."""
    nan, config = np.nan, GuardConfig(patience=3)
    applied, in_row, _, guard = judged(config, np.ones(9), [1, nan, nan, 1, nan, nan, nan, 1, 1])
    np.testing.assert_array_equal(applied, [1, 0, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(in_row, [0, 1, 2, 0, 1, 2, 3, 3, 3])
    assert guard.in_row == 3 and guard.norms is None and guard.count is None


def test_an_overflow_under_a_scale_is_not_bad():
    """It is not applied, not counted and not remembered, and ends no streak. At scale 1, and where the loss
    itself is not finite, it is as bad as any."""
    inf, nan = np.inf, np.nan
    norms = [1, inf, nan, inf, 2, inf, 3]
    losses = [1, 1, 1, nan, 1, 1, 1]
    scales = [8, 8, 4, 2, 1, 1, 1]
    applied, in_row, _, guard = judged(GuardConfig(SIGMA, WINDOW), norms, losses, scales)
    np.testing.assert_array_equal(applied, [1, 0, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(in_row, [0, 0, 0, 1, 0, 1, 0])
    assert guard.count == 3 and sorted(guard.norms)[-3:] == [1, 2, 3]
    between = judged(GuardConfig(patience=9), [nan, inf, nan], scales=[1, 8, 1])
    np.testing.assert_array_equal(between[1], [1, 0, 2])


def test_the_judgement_needs_no_other_device():
    """Compiled for eight devices it communicates nothing and sends nothing to the host."""
    layout, config = families.layout_of(2, 2, 2), GuardConfig(SIGMA)
    everywhere = layout.named()

    def judge(guard, loss, norm):
        return config.judge(guard, loss, norm, 1.0)

    with jax.set_mesh(layout.mesh):
        numbers = jax.device_put((config.create(), jnp.ones(()), jnp.ones(())), everywhere)
        text = jax.jit(judge).lower(*numbers).compile().as_text()
    for word in ("all-", "collective", "reduce-scatter", "infeed", "outfeed", "send(", "custom-call"):
        assert word not in text


def test_bad_values():
    for bad in (GuardConfig(sigma=-1.0), GuardConfig(window=1), GuardConfig(patience=0)):
        with pytest.raises(UserError, match=r"config\.guard"):
            bad.check()


# ---- in a training step -----------------------------------------------------------------------


def machine(monkeypatch, mesh, faults=(), guard=GUARD):
    """A compiled step with faults, as a function of (state, number of the batch), and its first state."""
    layout = families.layout_of(*mesh)
    model, params = families.make(SMALL, layout)
    optimizer = optimizers.build(optimizers.AdamW(), WarmupCosine(warmup_steps=2).build(1e-3, 100))
    monkeypatch.setattr(step, "make_gradients", injection.faulty(step.make_gradients, faults))
    compiled = jax.jit(step.make_step(model, CLM(), optimizer, seed=0, ema_decay=0.9, guard=guard))

    def run(state, number):
        batch = jax.tree.map(lambda x: x[None], families.batch(seed=number))
        with jax.set_mesh(layout.mesh):
            return compiled(state, families.place(batch, layout, lead=1))

    with jax.set_mesh(layout.mesh):
        opt_state = optimizer.transformation.init(params)
        scale = LossScaleConfig(initial=1.0).create()  # at its floor: it changes no number
        return run, State.create(params, opt_state, guard.create(), ema=True, loss_scale=scale)


def numbers_of(state):
    """All that a bad step must not change."""
    return jax.device_get((state.params, state.opt_state, state.ema, state.guard.norms, state.guard.count))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_faults_change_nothing(monkeypatch, mesh):
    """NaN, infinity and a spike; in the loss, in one gradient, in one device's rows. Every step between
    them is applied. At last three in a row: the state is the one from before them, for good."""
    cases = [(kind, place) for kind in KINDS for place in PLACES]
    faults = [Fault(WINDOW + 2 * i, *case, number=i) for i, case in enumerate(cases)]
    last = faults[-1].step + 2
    faults += [Fault(last + i, "nan", "loss") for i in range(3)]
    at = {fault.step: fault for fault in faults}
    run, state = machine(monkeypatch, mesh, faults)
    for number in range(last):
        new, metrics = run(state, number)
        assert metrics["skipped"] == metrics["bad_in_row"] == (number in at), at.get(number)
        assert new.step == number + 1
        finite = number not in at or at[number].kind == "spike"
        assert new.loss_scale.good == (state.loss_scale.good + 1 if finite else 0)
        if number in at:
            jax.tree.map(np.testing.assert_array_equal, numbers_of(new), numbers_of(state))
            assert np.isfinite(metrics["loss"] + metrics["grad_norm"]) == finite
        else:
            assert not np.array_equal(new.params["embedding"], state.params["embedding"])
            assert new.guard.count == state.guard.count + 1
        state = new
    before = numbers_of(state)
    for number, streak in zip(range(last, last + 5), (1, 2, 3, 3, 3), strict=True):
        state, metrics = run(state, number)
        assert metrics["bad_in_row"] == streak and metrics["skipped"] == 1
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] < metrics["grad_norm_limit"]
    jax.tree.map(np.testing.assert_array_equal, numbers_of(state), before)


@pytest.mark.slow
def test_a_limit_that_nothing_exceeds_changes_no_bit(monkeypatch):
    parts = []
    for guard in (GuardConfig(), GuardConfig(sigma=1e6, window=2)):
        run, state = machine(monkeypatch, (1, 1, 1), guard=guard)
        for number in range(4):
            state, metrics = run(state, number)
            assert metrics["skipped"] == 0
        parts.append(jax.device_get((state.params, state.opt_state, state.ema)))
    jax.tree.map(np.testing.assert_array_equal, *parts)
