"""The FLOP counter against the matrix products of the traced training step."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import DECODER, ENCODER, LENGTH

from llm_jax.errors import UserError
from llm_jax.models import attend, flops
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Transformer, init_params
from llm_jax.objectives.clm import CLM
from llm_jax.objectives.mlm import MLM
from llm_jax.training import step

ONE = dataclasses.replace(DECODER, num_layers=1)
MASKED = MLM().targets_of_row(LENGTH)
CONFIGS = {
    "grouped heads, gated, tied": DECODER,
    "every head its own": dataclasses.replace(ONE, num_kv_heads=0),
    "one head of keys": dataclasses.replace(ONE, num_kv_heads=1),
    "untied, wider": dataclasses.replace(ONE, tied_head=False, model_dim=64),
    "GPT-2": dataclasses.replace(ONE, activation="gelu", biases=True, positions="learnt", norm="layernorm"),
    "sizes of its own": dataclasses.replace(ONE, head_dim=24, mlp_dim=40),
    "parallel, softcaps": dataclasses.replace(ONE, block="parallel", attention_softcap=30.0),
    "values mixed, queries normed": dataclasses.replace(ONE, value_residual=True, qk_norm=True),
    "slopes": dataclasses.replace(ONE, positions="alibi"),
    "experts": dataclasses.replace(ONE, num_experts=4, experts_per_token=2, shared_experts=1),
    "one expert a token": dataclasses.replace(ONE, num_experts=4, experts_per_token=1, activation="relu2"),
    "encoder": ENCODER,
    "encoder, norms behind": dataclasses.replace(ENCODER, block="postnorm", num_layers=1),
}


@functools.cache
def traced(config: ModelConfig, **runtime):
    """FLOPs a token of the gradients of what is trained on, layers unrolled. Nothing is run."""
    config = dataclasses.replace(config, **{"scan_layers": False, "kernel": "dense"} | runtime)
    layout, objective = families.layout_of(), CLM() if config.causal else MLM()
    model, batch = Transformer(config, layout), families.batch()
    if not config.causal:
        batch = batch.replace(predict=np.zeros((families.ROWS, MASKED), np.int32))
    with jax.set_mesh(layout.mesh):
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        losses = step.make_losses(model, objective)
        weights = step.loss_weights(model, objective, batch)
        gradients = jax.grad(lambda params: losses(params, batch, weights, None)["loss"])
        return flops.traced_flops(jax.make_jaxpr(gradients)(params)) / batch.inputs.size


def counted(config: ModelConfig):
    scored = 1.0 if config.causal else MASKED / LENGTH
    return flops.training_flops_per_token(config, LENGTH, scored=scored)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_counts_every_product_of_the_step(name):
    assert counted(CONFIGS[name]) == pytest.approx(traced(CONFIGS[name]), rel=1e-3)


def test_recomputation_is_not_counted():
    forward = counted(DECODER) / 3
    assert traced(DECODER, remat=True) > counted(DECODER) + 0.5 * forward


def test_a_scan_counts_as_often_as_it_runs():
    assert traced(DECODER, scan_layers=True) == traced(DECODER)


def test_a_window_counts_for_what_it_lets_be_seen():
    """The dense kernel multiplies with hidden keys, too: it costs what it costs without a window."""
    config = dataclasses.replace(ONE, window=(5,))
    assert traced(config) == counted(ONE) > counted(config)
    ids = jnp.ones((1, LENGTH), jnp.int32)
    for causal in (False, True):
        seen = attend.Mask(ids, ids, causal, window=5).dense().sum() / LENGTH
        assert flops.keys(LENGTH, 5, causal) == pytest.approx(float(seen))


def test_empty_places_of_experts_are_not_counted():
    """An expert has ceil(1.5 * 16 * 2 / 4) = 12 places of a row; a token has two experts, not 4 * 12 / 16."""
    config = dataclasses.replace(ONE, num_experts=4, experts_per_token=2, capacity_factor=1.5)
    empty = 3 * 2 * 3 * config.model_dim * config.mlp_size * (4 * 12 / LENGTH - 2)
    assert traced(config) == pytest.approx(counted(config) + empty)


def test_causal_is_half_the_attention():
    full, causal = (flops.training_flops_per_token(DECODER, 1024, causal) for causal in (False, True))
    products = 6 * flops.matmul_parameters(DECODER)
    assert (causal - products) / (full - products) == pytest.approx(0.5, rel=1e-2)


def test_programs_within_programs():
    x, y = jnp.ones((2, 3)), jnp.ones((3, 5))

    def chosen(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: jax.jit(jnp.dot)(x, y), lambda: jnp.zeros((2, 5)))

    assert flops.traced_flops(jax.make_jaxpr(chosen)(x, y)) == 2 * 2 * 3 * 5

    mesh = jax.make_mesh((2, 4), ("one", "other"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.sharding.PartitionSpec("one")
    cut = jax.shard_map(lambda x: x @ y, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"one"})
    assert flops.traced_flops(jax.make_jaxpr(jax.jit(cut))(x)) == 2 * 2 * 3 * 5

    def endless(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ (x.T @ x), x)

    with pytest.raises(UserError, match="while"):
        flops.traced_flops(jax.make_jaxpr(endless)(x))
