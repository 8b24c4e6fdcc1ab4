"""Every way to lay a step over devices gives the numbers of one device."""

import dataclasses

import families
import jax
import numpy as np
import pytest
from families import DECODER, ENCODER

from llm_jax.objectives.clm import CLM
from llm_jax.training import step
from llm_jax.training.state import State

REMAT = dataclasses.replace(DECODER, remat=True)
LAYOUTS = {
    "ddp": (REMAT, {"data": 8}, 2),
    "fsdp": (REMAT, {"fsdp": 8}, 1),
    "zero 2": (REMAT, {"data": 2, "fsdp": 4, "zero": 2}, 2),
    "zero 1": (REMAT, {"data": 2, "fsdp": 4, "zero": 1}, 2),
    "tensor": (REMAT, {"tensor": 2}, 1),
    "fsdp_tp": (REMAT, {"data": 2, "fsdp": 2, "tensor": 2}, 2),
    "multislice": (REMAT, {"replica": 2, "fsdp": 4}, 1),
    "encoder": (ENCODER, {"replica": 2, "fsdp": 2, "tensor": 2}, 1),
}


def gradients(config, layout, accumulation):
    """Loss and gradients of one step, on the host; packed rows."""
    model, params = families.make(config, layout)
    segments = np.repeat(np.arange(1, 5, dtype=np.int32), families.LENGTH // 4)
    batch = families.batch(16, segments=np.tile(segments, (16, 1)))
    batch = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
    objective = CLM()
    with jax.set_mesh(layout.mesh):

        @jax.jit
        def compute(params, batch):
            state = State.create(params, ())
            return step.make_gradients(model, objective, 0)(state, batch, step.loss_weights(model, objective, batch))

        means, grads = compute(params, families.place(batch, layout, lead=1))
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.sharding.is_equivalent_to(param.sharding, grad.ndim)
    return jax.device_get((means["loss"], grads))


@pytest.mark.parametrize("name", LAYOUTS)
def test_many_devices_equal_one(name):
    config, mesh, accumulation = LAYOUTS[name]
    loss, grads = gradients(config, families.layout_of(**mesh), accumulation)
    expected, expected_grads = gradients(config, families.layout_of(), 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

    def compare(got, wanted):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    jax.tree.map(compare, grads, expected_grads)
