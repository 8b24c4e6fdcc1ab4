"""Ways to lay a step over devices give the numbers of one device; benchmarks/parallel.py tries all."""

import dataclasses
import functools
from types import SimpleNamespace

import families
import jax
import numpy as np
import pytest
from families import DECODER, ENCODER

from llm_jax.models import blockwise
from llm_jax.objectives.clm import CLM
from llm_jax.objectives.mlm import MLM
from llm_jax.training import insides, step
from llm_jax.training.evaluate import make_evaluation
from llm_jax.training.state import State

REMAT = dataclasses.replace(DECODER, remat=True)
LOCAL = dataclasses.replace(REMAT, window=(5, 0), attention_softcap=5.0)
ALIBI = dataclasses.replace(REMAT, positions="alibi", qk_norm=True, biases=True, kernel="blockwise")
DEEP = dataclasses.replace(REMAT, num_layers=4)
DEEP_LOCAL = dataclasses.replace(LOCAL, num_layers=4, kernel="blockwise")
LEARNT = dataclasses.replace(REMAT, positions="learnt", window=(0, 3), kernel="blockwise")
LAYOUTS = {
    "ddp": (REMAT, {"data": 8}, 2),
    "fsdp": (REMAT, {"fsdp": 8}, 1),
    "zero 2": (REMAT, {"data": 2, "fsdp": 4, "zero": 2}, 2),
    "zero 1": (REMAT, {"data": 2, "fsdp": 4, "zero": 1}, 2),
    "tensor": (REMAT, {"tensor": 2}, 1),
    "fsdp_tp": (REMAT, {"data": 2, "fsdp": 2, "tensor": 2}, 2),
    "encoder": (ENCODER, {"replica": 2, "fsdp": 2, "tensor": 2}, 1),
    "context x tensor": (LEARNT, {"context": 4, "tensor": 2}, 1),
    "long_context": (ALIBI, {"fsdp": 4, "context": 2}, 2),
    "data x context x tensor": (LOCAL, {"data": 2, "context": 2, "tensor": 2}, 2),
    "encoder, context x tensor": (ENCODER, {"fsdp": 2, "context": 2, "tensor": 2}, 1),
    "pipeline": (DEEP, {"data": 2, "stage": 4}, 1),
    "pipeline x fsdp x tensor, two rounds": (
        DEEP,
        {"stage": 2, "stage_rounds": 2, "fsdp": 2, "tensor": 2, "zero": 3},
        1,
    ),
    "pipeline, zero 1, two rounds": (DEEP, {"stage": 2, "stage_rounds": 2, "fsdp": 2, "zero": 1}, 2),
    "pipeline x context": (DEEP_LOCAL, {"stage": 2, "context": 2, "data": 2}, 1),
    "encoder, pipeline x tensor": (ENCODER, {"stage": 2, "tensor": 2}, 1),
}
FAST = ("fsdp",)


def gradients(config, layout, accumulation):
    """Loss and gradients of one step, on the host; packed rows, whose documents end at odd places."""
    model, params = families.make(config, layout)
    segments = np.repeat(np.arange(1, 5, dtype=np.int32), (3, 6, 5, 2))
    batch = families.batch(16, segments=np.tile(segments, (16, 1)))
    objective = CLM() if config.causal else MLM()
    if not config.causal:
        predict = np.argsort(-batch.weights, axis=1, kind="stable")[:, :5].astype(np.int32)
        kept = np.zeros_like(batch.weights)
        np.put_along_axis(kept, predict, np.take_along_axis(batch.weights, predict, 1), 1)
        batch = batch.replace(weights=kept, predict=predict)
    batch = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
    with jax.set_mesh(layout.mesh):

        @jax.jit
        def compute(params, batch):
            state = State.create(params, ())
            weights = step.loss_weights(model, objective, batch)
            return step.make_gradients(model, objective, 0)(state, batch, weights)

        means, grads = compute(params, families.place(batch, layout, lead=1))
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)
    return jax.device_get((means["loss"], grads))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the blockwise kernel has several even here."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)


@functools.cache
def on_one_device(config):
    return gradients(config, families.layout_of(), 1)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_many_devices_equal_one(name):
    config, mesh, accumulation = LAYOUTS[name]
    loss, grads = gradients(config, families.layout_of(**mesh), accumulation)
    expected, expected_grads = on_one_device(config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    def compare(got, wanted):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    jax.tree.map(compare, grads, expected_grads)


def on_cut_length(config, function, lead):
    """What ``function`` (model, params, batch of packed rows) gives on one device and with the length cut."""
    segments = np.tile(np.repeat(np.arange(1, 4, dtype=np.int32), (3, 8, 5)), (4, 1))
    batch = jax.tree.map(lambda x: x[(None,) * lead], families.batch(4, segments=segments))
    for layout in (families.layout_of(), families.layout_of(context=4)):
        model, params = families.make(config, layout)
        with jax.set_mesh(layout.mesh):
            run = jax.jit(functools.partial(function, model))
            yield jax.device_get(run(params, families.place(batch, layout, lead)))


@pytest.mark.slow
def test_evaluation_with_the_length_cut():
    one, cut = on_cut_length(DECODER, lambda model, *args: make_evaluation(model, CLM())(*args), lead=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), cut, one)


@pytest.mark.slow
def test_a_look_inside_names_tokens_by_their_place():
    """Where a token's embedding is not finite, and every token's own loss, in the order of the text."""
    config = dataclasses.replace(DECODER, tied_head=False)
    bad = int(families.batch(4).inputs[0, 5])

    def forward(model, params, batch):
        params = params | {"embedding": params["embedding"].at[bad].set(np.nan)}
        experiment = SimpleNamespace(objective=CLM())
        program = SimpleNamespace(model=model, layout=model.layout, experiment=experiment)
        return insides._forward(program, params, batch, jax.random.key(0))

    one, cut = on_cut_length(config, forward, lead=0)
    assert not one[1][0, 0, 5] and one[1][0].any() and np.isfinite(one[2]).any()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), cut, one)
