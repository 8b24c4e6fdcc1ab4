"""Every optimiser over several steps against numpy in float64, written a matrix at a time."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import config as configs
from llm_jax.errors import UserError
from llm_jax.training import muon, optimizers, rules
from llm_jax.training.optimizers import OPTIMIZERS, Moments, Rule
from llm_jax.training.schedules import Linear

pytestmark = pytest.mark.slow

STEPS = 6
SHAPES = {  # two layers, d = 4, two heads of 3
    "blocks/attention/query": (2, 4, 2, 3),
    "blocks/attention/query_bias": (2, 2, 3),
    "blocks/attention/out": (2, 2, 3, 4),
    "blocks/attention_norm/scale": (2, 4),
    "blocks/mlp/in": (2, 4, 7),
    "blocks/mlp/out": (2, 7, 4),
    "embedding": (6, 4),
    "final_norm/scale": (4,),
}
# How a parameter is seen by those who care: (layers, inputs, outputs).
MATRICES = {
    "blocks/attention/query": (2, 4, 6),
    "blocks/attention/out": (2, 6, 4),
    "blocks/mlp/in": (2, 4, 7),
    "blocks/mlp/out": (2, 7, 4),
    "embedding": (1, 6, 4),
}
LAYERS = {name: 2 if name.startswith("blocks/") else 1 for name in SHAPES}


def draw(seed, scale=1.0):
    numbers = np.random.default_rng(seed)
    return {name: (scale * numbers.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


PARAMS = draw(0)
GRADIENTS = [draw(seed + 1, scale=10.0 ** (seed % 3 - 1)) for seed in range(STEPS)]


def nest(flat):
    tree = {}
    for name, x in flat.items():
        *parents, leaf = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = x
    return tree


def flatten(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def run(config, steps=STEPS, names=tuple(SHAPES)):
    """Parameters of these names after ``steps``, and the rates that were used."""
    schedule = Linear(warmup_steps=2).build(config.learning_rate, STEPS)
    optimizer = optimizers.build(config, schedule)

    @jax.jit
    def one(params, state, gradients):
        updates, new = optimizer.transformation.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), new, optimizer.learning_rate(state)

    rates = []
    with jax.set_mesh(families.layout_of().mesh):
        params = nest({name: PARAMS[name] for name in names})
        state = jax.jit(optimizer.transformation.init)(params)
        for gradients in GRADIENTS[:steps]:
            params, state, rate = one(params, state, nest({name: gradients[name] for name in names}))
            rates.append(float(rate))
    return flatten(params), rates


# ---- the same by hand -----------------------------------------------------------------------


def adam(c, name, g, p, s, t):
    s["m"] = c.beta1 * s.get("m", 0) + (1 - c.beta1) * g
    s["v"] = c.beta2 * s.get("v", 0) + (1 - c.beta2) * g**2
    return s["m"] / (1 - c.beta1**t) / (np.sqrt(s["v"] / (1 - c.beta2**t)) + c.epsilon)


def sgd(c, name, g, p, s, t):
    s["m"] = c.momentum * s.get("m", 0) + g
    return g + c.momentum * s["m"] if c.nesterov else s["m"]


def lion(c, name, g, p, s, t):
    m = s.get("m", np.zeros_like(g))
    s["m"] = c.beta2 * m + (1 - c.beta2) * g
    return np.sign(c.beta1 * m + (1 - c.beta1) * g)


def adafactor(c, name, g, p, s, t):
    """A layer at a time; row and column sums, whose outer product over the total is the estimate."""
    decay = 1 - t**-c.decay_rate
    layers, out = LAYERS[name], []
    shape = MATRICES.get(name, (layers, 1, g.size // layers))
    for i, (g_io, p_io) in enumerate(zip(g.reshape(shape), p.reshape(shape), strict=True)):
        square = g_io**2 + 1e-30
        if min(g_io.shape) >= c.min_factored:
            rows = s[i, "rows"] = decay * s.get((i, "rows"), 0) + (1 - decay) * square.sum(1)
            columns = s[i, "columns"] = decay * s.get((i, "columns"), 0) + (1 - decay) * square.sum(0)
            v = np.outer(rows, columns) / rows.sum()
        else:
            v = s[i] = decay * s.get(i, 0) + (1 - decay) * square
        u = g_io / np.sqrt(v)
        u /= max(1.0, np.sqrt(np.mean(u**2)) / c.clip_threshold)
        out.append(u * max(1e-3, np.sqrt(np.mean(p_io**2))) if c.relative else u)
    return np.stack(out).reshape(g.shape)


def newton_schulz(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon_or_adamw(c, name, g, p, s, t):
    if not name.startswith(("blocks/attention/", "blocks/mlp/")) or name.endswith("bias"):
        return adam(c.adamw, name, g, p, s, t)
    s["m"] = c.momentum * s.get("m", 0) + g
    m = g + c.momentum * s["m"] if c.nesterov else s["m"]
    layers, inputs, outputs = MATRICES[name]
    ratio = 0.2 * max(inputs, outputs) ** 0.5 if c.match_adamw else max(1.0, outputs / inputs) ** 0.5
    return ratio * np.stack([newton_schulz(x) for x in m.reshape(layers, inputs, outputs)]).reshape(g.shape)


def by_hand(config, core, rates):
    """PyTorch's order: clip, L2 decay or decoupled decay, step; in float64."""
    params = {name: x.astype(np.float64) for name, x in PARAMS.items()}
    states = {name: {} for name in params}
    for t, (rate, gradients) in enumerate(zip(rates, GRADIENTS, strict=True), 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        for name, p in params.items():
            g = gradients[name].astype(np.float64) * min(1.0, (config.clip_norm or np.inf) / norm)
            decay = 0.0 if name.endswith(("scale", "bias")) else config.weight_decay
            if isinstance(config, optimizers.Adam | optimizers.SGD):
                g, decay = g + decay * p, 0.0
            params[name] = p * (1 - rate * decay) - rate * core(config, name, g, p, states[name], t)
    return params


CASES = {
    "adamw": (OPTIMIZERS["adamw"](learning_rate=0.1, weight_decay=0.3, clip_norm=0.5), adam),
    "adamw without clipping": (OPTIMIZERS["adamw"](learning_rate=0.1, clip_norm=0.0), adam),
    "adam": (OPTIMIZERS["adam"](learning_rate=0.1, weight_decay=0.3, clip_norm=0.5), adam),
    "sgd": (OPTIMIZERS["sgd"](weight_decay=0.3, clip_norm=2.0), sgd),
    "sgd, nesterov": (OPTIMIZERS["sgd"](momentum=0.8, nesterov=True), sgd),
    "sgd, plain": (OPTIMIZERS["sgd"](momentum=0.0), sgd),
    "lion": (OPTIMIZERS["lion"](learning_rate=0.05), lion),
    "adafactor": (OPTIMIZERS["adafactor"](learning_rate=0.1, weight_decay=0.2, min_factored=4), adafactor),
    "adafactor, absolute": (
        OPTIMIZERS["adafactor"](relative=False, clip_threshold=0.7, min_factored=5),
        adafactor,
    ),
    "muon": (OPTIMIZERS["muon"](learning_rate=0.1, weight_decay=0.3, clip_norm=0.5), muon_or_adamw),
    "muon, spectral": (
        OPTIMIZERS["muon"](momentum=0.8, nesterov=False, match_adamw=False, adamw=Moments(0.8, 0.9)),
        muon_or_adamw,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_numpy(case):
    config, core = CASES[case]
    params, rates = run(config)
    expected = by_hand(config, core, rates)
    assert rates[0] < rates[2] > rates[5] > 0
    for name, value in expected.items():
        assert np.abs(value - PARAMS[name]).max() > 1e-3, name  # it moved
        np.testing.assert_allclose(params[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_every_optimizer_has_a_case():
    assert {type(config) for config, _ in CASES.values()} == set(OPTIMIZERS.values())


@functools.cache
def on_mesh(name, mesh):
    """Two updates of the small decoder's parameters, by made-up gradients; and the state."""
    layout = families.layout_of(*mesh)
    _, params = families.make(families.DECODER, layout)
    factored = {"min_factored": 8} if name == "adafactor" else {}
    config = OPTIMIZERS[name](weight_decay=0.0, **factored)  # decay would lend updates the parameters' layout
    optimizer = optimizers.build(config, lambda _: 1.0)

    @jax.jit
    def two(params):
        state = optimizer.transformation.init(params)
        updates = []
        for i in range(2):
            gradients = jax.tree.map(lambda p, i=i: jnp.sin(50 * p + i), params)
            update, state = optimizer.transformation.update(gradients, state, params)
            updates.append(update)
        return updates, state

    with jax.set_mesh(layout.mesh):
        return params, *two(params)


MESHES = [*((name, (2, 2, 2)) for name in OPTIMIZERS), ("muon", (1, 8, 1)), ("adafactor", (1, 8, 1))]


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_one_device_equals_many(name, mesh):
    """What is known of a whole matrix does not depend on where its parts lie; no update gathers."""
    _, alone, _ = on_mesh(name, (1, 1, 1))
    params, many, _ = on_mesh(name, mesh)
    for one, other in zip(map(flatten, alone), map(flatten, many), strict=True):
        for key, value in one.items():
            np.testing.assert_allclose(other[key], value, rtol=1e-3, atol=1e-5, err_msg=key)
    jax.tree.map(
        lambda u, p: u.sharding.is_equivalent_to(p.sharding, p.ndim) or pytest.fail(), many[1], params
    )


def test_states_are_sharded():
    params, _, state = on_mesh("muon", (2, 2, 2))
    momentum = state[1].inner_states["own"].inner_state.trace["blocks"]["attention"]["out"]
    assert momentum.sharding == params["blocks"]["attention"]["out"].sharding
    _, _, state = on_mesh("adafactor", (2, 2, 2))
    by_input, by_output = state[1].moments["blocks"]["attention"]["query"]
    assert by_input.shape == (2, 32, 1, 1) and by_output.shape == (2, 1, 4, 8)
    assert by_input.addressable_shards[0].data.shape == (2, 16, 1, 1)  # fsdp
    assert by_output.addressable_shards[0].data.shape == (2, 1, 2, 8)  # tensor


# ---- rules ----------------------------------------------------------------------------------

FROZEN = ("blocks/attention/out", "blocks/mlp/in")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_have_no_state_and_count_in_no_norm(name):
    """With two parameters frozen, the others move as if these were not there."""
    plain = OPTIMIZERS[name](weight_decay=0.5, clip_norm=0.5)
    frozen = dataclasses.replace(plain, rules=(Rule("|".join(FROZEN), learning_rate=0.0), *plain.rules))
    state = optimizers.build(frozen, lambda _: 1.0).transformation.init(nest(PARAMS))
    assert [key for key in flatten(state) if "mlp/out" in key]
    assert not [key for key in flatten(state) for name in FROZEN if name in key]
    params, _ = run(frozen, steps=2)
    for key in FROZEN:
        np.testing.assert_array_equal(params[key], PARAMS[key])
    alone, _ = run(plain, steps=2, names=set(SHAPES) - set(FROZEN))
    for key, value in alone.items():
        np.testing.assert_allclose(params[key], value, rtol=1e-6, err_msg=key)


def test_rules_multiply():
    chosen = (Rule(".*scale", 0.0), Rule(".*in", 0.5), Rule("embedding", weight_decay=2.0), Rule())
    config = OPTIMIZERS["sgd"](momentum=0.0, clip_norm=0.0, weight_decay=0.0, rules=chosen)
    params, (rate,) = run(config, steps=1)
    move = {name: (PARAMS[name] - x) / rate for name, x in params.items()}
    np.testing.assert_allclose(move["blocks/mlp/in"], GRADIENTS[0]["blocks/mlp/in"] / 2, atol=1e-4)
    np.testing.assert_allclose(move["blocks/mlp/out"], GRADIENTS[0]["blocks/mlp/out"], atol=1e-4)
    decaying, (rate,) = run(dataclasses.replace(config, weight_decay=0.25), steps=1)
    extra = {name: (params[name] - x) / rate for name, x in decaying.items()}
    np.testing.assert_allclose(extra["embedding"], 0.5 * PARAMS["embedding"], atol=1e-4)
    np.testing.assert_allclose(extra["blocks/mlp/in"], 0.125 * PARAMS["blocks/mlp/in"], atol=1e-4)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    state = optimizers.build(OPTIMIZERS["muon"](), lambda _: 1.0).transformation.init(nest(PARAMS))
    core = state[1].inner_states
    of_muon = set(flatten(core["own"].inner_state.trace))
    hidden = {name for name in MATRICES if name != "embedding"}
    assert of_muon == hidden
    assert set(flatten(core["adamw"].inner_state.mu)) == set(SHAPES) - hidden


def test_muon_refuses_vectors():
    config = OPTIMIZERS["muon"](rules=(Rule("blocks/.*"), Rule(optimizer="adamw")))
    with pytest.raises(UserError, match=r"query_bias \[2, 2, 3\] to muon, which takes matrices"):
        run(config, steps=1)


def test_every_parameter_needs_a_rule_and_every_rule_a_parameter():
    with pytest.raises(UserError, match=r"no rule .* matches parameter blocks/attention/out"):
        rules.match_rules((Rule(".*in"),), nest(PARAMS))
    with pytest.raises(UserError, match=r"'\.\*gain' decides no parameter"):
        rules.match_rules((Rule(".*gain"), Rule()), nest(PARAMS))


def test_names_match_as_a_whole():
    tree = rules.match_rules((Rule("blocks/mlp/in"), Rule(weight_decay=0.0)), nest(PARAMS))
    assert tree["blocks"]["mlp"]["in"].weight_decay == 1.0
    assert tree["blocks"]["mlp"]["out"].weight_decay == 0.0


def test_rules_are_checked_before_parameters_are_known():
    with pytest.raises(UserError, match=r"asks for optimizer 'adam'; this section has '', 'adamw'"):
        optimizers.check(OPTIMIZERS["muon"](rules=(Rule(optimizer="adam"),)))
    with pytest.raises(UserError, match=r"'\(' is no regular expression"):
        optimizers.check(OPTIMIZERS["adamw"](rules=(Rule("("),)))


def test_state_is_the_core_alone_where_nothing_is_routed():
    """So that checkpoints of AdamW from before there were secondary optimisers can be read."""
    state = optimizers.build(OPTIMIZERS["adamw"](), lambda _: 1.0).transformation.init(nest(PARAMS))
    names = {name.split("/blocks")[0] for name in flatten(state) if "blocks" in name}
    assert names == {"1/mu", "1/nu"} and "1/count" in flatten(state) and "3/count" in flatten(state)


def test_a_new_field_of_a_rule_leaves_old_fingerprints():
    """Hash over match, learning_rate and weight_decay alone, as before ``optimizer`` was added."""
    old = dataclasses.make_dataclass(
        "Rule",
        [(f.name, f.type, configs.identity(f.default)) for f in dataclasses.fields(Rule)[:3]],
        frozen=True,
    )
    values = (("a", 1.0, 0.0), ("b", 0.5, 1.0))
    before = OPTIMIZERS["adamw"](rules=tuple(old(*each) for each in values))
    after = OPTIMIZERS["adamw"](rules=tuple(Rule(*each) for each in values))
    assert configs.fingerprint(before) == configs.fingerprint(after)
    routed = dataclasses.replace(after, rules=(Rule("a", optimizer="x"), Rule("b", 0.5)))
    assert configs.fingerprint(routed) != configs.fingerprint(after)


# ---- orthogonalisation ----------------------------------------------------------------------


def orthogonalize(x):
    with jax.set_mesh(families.layout_of().mesh):
        return np.asarray(jax.jit(muon.orthogonalize)(jnp.asarray(x, jnp.float32)))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 12)])
def test_singular_values_come_close_to_one(shape):
    """Jordan's band, wherever singular values are at least 1% of the norm; directions as by SVD."""
    x = np.random.default_rng(0).normal(size=shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = np.maximum(s, 0.02 * np.linalg.norm(s))
    (y,) = orthogonalize(((u * s) @ vt)[None])
    values = np.linalg.svd(y, compute_uv=False)
    assert values.min() > 0.67 and values.max() < 1.21
    exact = u @ vt
    cosine = np.sum(y * exact) / np.linalg.norm(y) / np.linalg.norm(exact)
    assert cosine > 0.98
    # The singular vectors are those of x: in their basis the result is diagonal.
    inside = u.T @ y @ vt.T
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=2e-5)


def test_a_stack_is_one_matrix_at_a_time():
    """Also when sizes differ by far; and nothing comes of nothing."""
    x = np.random.default_rng(1).normal(size=(4, 6, 9)) * np.array([1e-6, 1.0, 1e4, 0.0])[:, None, None]
    alone = np.concatenate([orthogonalize(one[None]) for one in x])
    np.testing.assert_allclose(orthogonalize(x), alone, atol=1e-5)
    assert (alone[3] == 0).all() and np.linalg.norm(alone[0]) > 2
