"""Pipelines: the schedule, what a stage holds, and what is not a training step."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import DECODER, LENGTH

from llm_jax import config as configs
from llm_jax.errors import UserError
from llm_jax.inference.cache import empty_cache
from llm_jax.mesh import AXES, MeshConfig, make_layout
from llm_jax.models import pipeline
from llm_jax.objectives.clm import CLM
from llm_jax.training import experiment, fitting, step
from llm_jax.training.evaluate import make_evaluation
from llm_jax.training.state import State

DEEP = dataclasses.replace(DECODER, num_layers=4)
ONE = families.layout_of()
TWO = families.layout_of(stage=2, fsdp=2, zero=3)


@pytest.mark.parametrize("stages, rounds, parts", [(2, 1, 2), (4, 1, 8), (2, 3, 4), (4, 2, 12)])
def test_every_part_passes_every_run_in_order(stages, rounds, parts):
    """And without a wait: a part is worked on in every tick from its entry to its end."""
    seen = {part: [] for part in range(parts)}
    idle = 0
    ticks = parts * rounds + stages - 1
    for tick in range(ticks):
        for stage, (part, turn, real) in enumerate(
            np.stack(pipeline.schedule(tick, stages, rounds, parts), 1)
        ):
            idle += not real
            if real:
                seen[int(part)].append((tick, int(turn) * stages + stage))
    for part, visits in seen.items():
        assert [run for _, run in visits] == list(range(rounds * stages))
        assert [tick - visits[0][0] for tick, _ in visits] == list(range(rounds * stages))
        assert visits[-1][0] == pipeline._done(part, stages, rounds)
    assert idle == stages * (stages - 1)


def test_the_bubble():
    """Of Narayanan et al. 2021, section 2.2.2: rounds divide it."""
    layout = families.layout_of(stage=4)
    assert layout.parts(32) == 16 and pipeline.bubble(layout, 32) == pytest.approx(3 / 19)
    layout = families.layout_of(stage=4, stage_rounds=2, stage_parts=8)
    assert layout.parts(32) == 8 and pipeline.bubble(layout, 32) == pytest.approx(3 / 19)
    assert layout.parts(4) == 4


@pytest.mark.slow
def test_a_stage_holds_its_own_layers():
    params = families.initial(DEEP, TWO)
    for leaf in jax.tree.leaves(params["blocks"]):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}
    alone = families.initial(DEEP, ONE)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(alone))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "mlp_dim": 16}], ids=["dense", "experts"])
def test_evaluation_and_decoding(changes):
    """The same numbers as on one device: evaluation through the pipeline, decoding without it."""
    config = dataclasses.replace(DEEP, **changes)

    def both(layout):
        model, params = families.make(config, layout)
        batch = jax.tree.map(lambda x: x[None, None], families.batch(8))
        with jax.set_mesh(layout.mesh):
            found = jax.jit(make_evaluation(model, CLM()))(params, families.place(batch, layout, lead=2))

            def decode(params, cache, ids):
                positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
                hidden, _ = model.apply(
                    {"params": params}, ids, positions, jnp.ones_like(ids), cache=cache, cache_index=0
                )
                return hidden

            ids = families.place(families.batch(8), layout).inputs
            model = model.clone(layout=layout.decoding())
            hidden = jax.jit(decode)(params, empty_cache(config, model.layout, 8, LENGTH), ids)
        return jax.device_get((found["loss"], hidden))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both(TWO), both(ONE))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, mesh",
    [
        ({}, {"stage": 2, "stage_parts": 2}),
        ({"balance_loss": 0.0}, {"stage": 2, "stage_parts": 2, "expert": 2, "fsdp": 2, "zero": 3}),
    ],
    ids=["parts are micro-batches", "dropless"],
)
def test_experts(changes, mesh):
    """A part has its own shares of the experts, as a micro-batch has: alike where the rows are the same."""
    config = dataclasses.replace(DEEP, num_experts=4, mlp_dim=16, **changes)

    def gradients(layout, accumulation):
        model, params = families.make(config, layout)
        batch = jax.tree.map(lambda x: x.reshape(accumulation, -1, LENGTH), families.batch(8))
        with jax.set_mesh(layout.mesh):

            @jax.jit
            def compute(params, batch):
                weights = step.loss_weights(model, CLM(), batch)
                return step.make_gradients(model, CLM(), 0)(State.create(params, ()), batch, weights)

            return jax.device_get(compute(params, families.place(batch, layout, lead=1)))

    means, grads = gradients(families.layout_of(**mesh), 1)
    expected, expected_grads = gradients(ONE, 2)
    names = expected if config.balance_loss else ("loss", "router_z_loss")
    for name in names:
        np.testing.assert_allclose(means[name], expected[name], rtol=1e-5)

    def compare(got, wanted):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    jax.tree.map(compare, grads, expected_grads)


@pytest.mark.parametrize(
    "mesh, words",
    [
        ({"stage": 2, "stage_rounds": 0}, "stage_rounds=0"),
        ({"stage_rounds": 2}, "is of a pipeline"),
        ({"stage": 2, "stage_parts": 3}, "stage_parts=3 must be a multiple"),
    ],
)
def test_bad_meshes(mesh, words):
    config = MeshConfig(**mesh)
    with pytest.raises(UserError, match=words):
        make_layout(config, jax.devices()[: mesh.get("stage", 1)])


def test_layers_that_cannot_be_dealt_out():
    config = experiment.override(experiment.default_config(), {"model.num_layers": 6, "mesh.stage_rounds": 2})
    sizes = dict.fromkeys(AXES, 1) | {"stage": 2}
    with pytest.raises(UserError, match="stage_rounds = 4, the runs"):
        fitting.check_mesh(configs.from_dict(experiment.Experiment, config), sizes)
