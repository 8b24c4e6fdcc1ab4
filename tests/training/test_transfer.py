"""Transfer of hyperparameters: how far a model moves in a few steps does not depend on width and depth."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import config as configs
from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.transformer import Transformer, init_params
from llm_jax.training import experiment, optimizers, rules
from llm_jax.training.optimizers import AdamW, Rule
from llm_jax.training.transfer import TRANSFERS, transfer

BASE = ModelConfig(num_layers=2, model_dim=16, num_heads=2, vocab_size=families.VOCAB, dtype="float32")


def grown(width=16, layers=2, base=BASE):
    return dataclasses.replace(base, model_dim=width, num_heads=width // 8, num_layers=layers)


def changed(name, model, base=BASE):
    """(model, optimiser) as the recipe's changes make them, through the config."""
    values = {f"model.{key}": value for key, value in configs.leaves(model)}
    config = experiment.override(experiment.default_config(), values | transfer(name, model, base))
    e = experiment.resolve(config, find_text=False)
    return e.model, e.optimizer


@functools.cache
def moved(name, model, steps=3):
    """RMS of what a few steps of AdamW at a rate of 0.001 add: to the stream behind the blocks, to logits."""
    config, optimizer = changed(name, model)
    layout, batch = families.layout_of(), families.batch()
    model = Transformer(config, layout)
    schedule = optax.constant_schedule(1e-3)
    update = optimizers.build(dataclasses.replace(optimizer, clip_norm=0.0), schedule).transformation

    def loss(params):
        variables, own = {"params": params}, (batch.inputs, batch.positions, batch.segments)
        x_bld, aux = model.apply(variables, *own, capture=("hidden",))
        logits = model.apply(variables, x_bld, method="logits")[..., : families.VOCAB]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.mean(losses), (aux.layers.hidden[-1], logits)

    @jax.jit
    def one(params, state):
        gradients, outputs = jax.grad(loss, has_aux=True)(params)
        updates, state = update.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, outputs

    with jax.set_mesh(layout.mesh):
        params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
        state, outputs = update.init(params), []
        for _ in range(steps + 1):
            params, state, found = one(params, state)
            outputs.append(found)
    return np.array([np.sqrt(np.mean((new - old) ** 2)) for old, new in zip(*outputs[::steps], strict=True)])


WIDE, DEEP = grown(width=128), grown(layers=16)


@pytest.mark.slow
def test_how_far_a_model_moves():
    """Yang's check of coordinates: 8 times as wide, and 8 times as deep, it moves by as much as the base. By
    the standard parameterisation it moves by 4.6 times as much, the logits by 5.2 and 3.7."""
    base = moved("standard", BASE)
    for name, model in (("mup", WIDE), ("completep", DEEP)):
        stream, logits = moved(name, model) / base
        assert 0.5 < stream < 1.2, name
        assert 0.2 < logits < 1.4, name
        assert (moved("standard", model) / base > 3).all(), name


@pytest.mark.parametrize("name", TRANSFERS)
def test_nothing_changes_at_the_base(name):
    base = dataclasses.replace(BASE, init_std=0.02, logit_scale=0.5)
    model, optimizer = changed(name, base, base)
    assert model.std(16) == base.std(16) and model.std(16, residual=True) == base.std(16, residual=True)
    assert (model.embedding_std or model.std(16)) == base.std(16)
    assert (model.residual_scale, model.logit_scale) == (1.0, 0.5)
    assert {(r.learning_rate, r.epsilon) for r in optimizer.rules} == {(1.0, 1.0)}
    assert {r.weight_decay for r in optimizer.rules} == {0.0, 1.0}


def factors(name, model, base=BASE):
    """{parameter: (rate, decay, epsilon)} of all parameters, and the model."""
    config, optimizer = changed(name, model, base)
    layout = families.layout_of()
    with jax.set_mesh(layout.mesh):
        shapes = jax.eval_shape(lambda key: init_params(Transformer(config, layout), key), jax.random.key(0))
    tree = jax.tree_util.tree_flatten_with_path(rules.match_rules(optimizer.rules, shapes))[0]
    return {
        rules.parameter_name(path): (rule.learning_rate, rule.weight_decay, rule.epsilon)
        for path, rule in tree
    }, config


def test_factors_of_every_parameter():
    """4 times as wide and 3 times as deep; the feed-forward part 168 / 48 as wide, as it is rounded."""
    found, config = factors("completep", grown(64, 6))
    hidden = (1 / 4, 4.0, 1 / 12)
    outputs = config.mlp_size / BASE.mlp_size
    assert found == {
        "embedding": (1.0, 1.0, 1 / 4),
        "final_norm/scale": (1.0, 0.0, 1 / 4),
        "blocks/attention_norm/scale": (1.0, 0.0, 1 / 12),
        "blocks/mlp_norm/scale": (1.0, 0.0, 1 / 12),
        **{f"blocks/attention/{part}": hidden for part in ("query", "key", "value", "out")},
        **{f"blocks/mlp/{part}": hidden for part in ("in", "gate")},
        "blocks/mlp/out": (1 / outputs, outputs, 1 / 12),
    }
    assert (config.residual_scale, config.logit_scale) == (1 / 3, 1 / 4)
    assert config.embedding_std == BASE.std(16)
    assert config.std(64, residual=True) == pytest.approx(BASE.std(16, residual=True) / 2)


@pytest.mark.parametrize("block", ["postnorm", "prenorm"])
def test_every_rule_decides_something(block):
    """match_rules raises for a rule that does not, and for a parameter without one."""
    base = dataclasses.replace(BASE, block=block, biases=True, tied_head=False, positions="learnt")
    base = dataclasses.replace(base, max_length=64, init_std=0.02, norm="layernorm")
    found, config = factors("mup", grown(64, 6, base), base)
    assert found["position_embedding"] == found["head"] == found["embedding"] == (1.0, 1.0, 1 / 4)
    assert found["blocks/mlp/in_bias"] == (1.0, 0.0, 1 / 4)
    assert (config.embedding_std, config.init_std) == (0.02, 0.01)
    assert config.residual_scale == 1.0


def test_what_does_not_transfer_is_refused():
    wrong = {
        "'mu' is none of": ("mu", WIDE),
        "keeps head_dim": ("mup", dataclasses.replace(WIDE, num_heads=2)),
        "experts": ("mup", dataclasses.replace(WIDE, num_experts=4)),
        "block='postnorm'": ("completep", dataclasses.replace(WIDE, block="postnorm")),
    }
    for message, (name, model) in wrong.items():
        with pytest.raises(UserError, match=message):
            transfer(name, model, BASE)


def test_epsilon_by_rule_is_adams():
    """A rule's epsilon of 0.25 gives the updates of an Adam whose epsilon is a quarter."""
    draw, shapes = np.random.default_rng(0), {"a": (3, 4), "b": (5,)}
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [{name: x / np.float32(size) for name, x in params.items()} for size in (1, 10, 100)]

    def updates(epsilon, *own):
        config = AdamW(epsilon=epsilon, clip_norm=0.0, rules=own)
        update = optimizers.build(config, optax.constant_schedule(0.1)).transformation
        state = update.init(params)
        for g in gradients:
            found, state = update.update(g, state, params)
        return found

    by_rule = updates(1e-2, Rule("a", epsilon=0.25), Rule())
    np.testing.assert_allclose(by_rule["a"], updates(2.5e-3, Rule())["a"], rtol=1e-5)
    np.testing.assert_array_equal(by_rule["b"], updates(1e-2, Rule())["b"])
    assert np.abs(by_rule["a"] / updates(1e-2, Rule())["a"] - 1).max() > 0.01


def test_epsilon_is_of_adam_alone():
    for config in (
        optimizers.Lion(rules=(Rule(epsilon=0.5),)),
        optimizers.Muon(rules=(Rule("blocks/.*", epsilon=0.5), Rule(optimizer="adamw"))),
        AdamW(rules=(Rule(epsilon=0.0),)),
    ):
        with pytest.raises(UserError, match="epsilon"):
            optimizers.check(config)
    optimizers.check(optimizers.Muon(rules=(Rule("blocks/.*"), Rule(optimizer="adamw", epsilon=0.5))))
