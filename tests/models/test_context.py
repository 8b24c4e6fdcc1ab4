"""The length cut along ``context``: attention gives what it gives whole, with equal work and few bytes."""

import dataclasses
import re
from types import SimpleNamespace

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import DECODER

from llm_jax.errors import UserError
from llm_jax.models import attend, blockwise, context
from llm_jax.models.attend import Mask, Scoring
from llm_jax.models.transformer import Transformer, init_params

KERNELS = {"dense": attend.dense, "blockwise": blockwise.blockwise}
BATCH, LENGTH, KV_HEADS, REPEATS, HEAD = 2, 16, 2, 2, 8
ONE = families.layout_of()
SEGMENTS = np.tile(np.repeat([1, 2, 0], [7, 6, 3]), (BATCH, 1)).astype(np.int32)  # they end inside pieces


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 2)


@pytest.mark.parametrize("ways", [2, 4])
def test_dealt_in_zig_zag(ways):
    """Device i holds pieces i and 2 n - 1 - i, in that order; the inverse is one."""
    layout, length = families.layout_of(context=ways), 6 * ways
    with jax.set_mesh(layout.mesh):
        dealt = np.asarray(context.deal(jnp.arange(length)[None], layout, causal=True))
        back = context.restore(jnp.asarray(dealt), layout, causal=True)
    for i, held in enumerate(dealt.reshape(ways, 2, 3)):
        assert held.tolist() == [[3 * p, 3 * p + 1, 3 * p + 2] for p in (i, 2 * ways - 1 - i)]
    assert back.tolist() == [list(range(length))]


def whole(kernel, q, k, v, causal, window, slopes):
    mask = Mask(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), causal, 0, window)
    return kernel(q, k, v, mask, Scoring(jnp.asarray(slopes), 3.0), ONE)


def in_parts(layout, kernel, q, k, v, causal, window, slopes):
    """The same with the length dealt out, put back in order."""
    q, k, v, segments = context.deal((q, k, v, jnp.asarray(SEGMENTS)), layout, causal)
    q, k, v = (layout.shard(x, "batch", "length", "kv_heads", *[None] * (x.ndim - 3)) for x in (q, k, v))
    mask = Mask(segments, segments, causal, 0, window)
    o = context.attend(kernel, q, k, v, mask, Scoring(jnp.asarray(slopes), 3.0), layout)
    return context.restore(layout.shard(o, *[None] * 5), layout, causal)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [attend.dense, blockwise.blockwise], ids=["dense", "blockwise"])
@pytest.mark.parametrize(
    ("mesh", "causal", "window"),
    [
        ({"context": 8}, True, 0),
        ({"context": 2, "data": 2, "tensor": 2}, True, 5),
        ({"context": 4}, False, 3),
    ],
    ids=["8", "2 x 2 x 2", "encoder"],
)
def test_equals_attention_on_one_device(kernel, mesh, causal, window):
    """Output and gradients: grouped heads, ALiBi, soft-capped scores, segments that span the cuts."""
    draw = np.random.default_rng(0)
    q, d_o = draw.normal(size=(2, BATCH, LENGTH, KV_HEADS, REPEATS, HEAD)).astype(np.float32)
    k, v = draw.normal(size=(2, BATCH, LENGTH, KV_HEADS, HEAD)).astype(np.float32)
    d_o *= (SEGMENTS > 0)[:, :, None, None, None]  # what padding sees is nobody's matter
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    layout = families.layout_of(**mesh)

    def run(function, *leading):
        def scalar(q, k, v):
            o = function(*leading, kernel, q, k, v, causal, window, slopes)
            return jnp.sum(o * d_o), o

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))

    with jax.set_mesh(ONE.mesh):
        (_, o), grads = jax.device_get(run(whole)(q, k, v))
    with jax.set_mesh(layout.mesh):
        (_, o_parts), grads_parts = jax.device_get(run(in_parts, layout)(q, k, v))
    real = SEGMENTS > 0
    np.testing.assert_allclose(o_parts[real], o[real], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads_parts, grads)


def test_gradients_of_keys_and_values_are_scattered():
    layout = families.layout_of(context=4)

    def scalar(q, k, v):
        return jnp.sum(in_parts(layout, attend.dense, q, k, v, True, 0, np.zeros(4, np.float32)))

    with jax.set_mesh(layout.mesh):
        k = jnp.zeros((BATCH, LENGTH, KV_HEADS, HEAD))
        backward = jax.make_jaxpr(jax.grad(scalar, argnums=(0, 1, 2)))(jnp.stack([k, k], 3), k, k)
    assert len(re.findall(r" = reduce_scatter\[", str(backward))) == 2
    assert not re.findall(r" = psum\w*\[\s*axes=[^)]*'context'", str(backward))


def count_blocks(q, k, v, mask, scoring, layout):
    """A kernel whose output is the number of blocks of keys that the blockwise kernel would visit."""
    static, arrays = SimpleNamespace(causal=mask.causal), SimpleNamespace(q_start=mask.q_start, window=0)
    visits = 0
    for i in range(q.shape[1] // blockwise.BLOCK):
        first, stop = blockwise._key_blocks(static, arrays, i, k.shape[1] // blockwise.BLOCK)
        visits += stop - first
    return jnp.zeros_like(q) + visits


def test_work_is_shared_equally():
    """16 blocks of queries see 1 + 2 + ... + 16 = 136 blocks of keys: 34 on each of 4 devices. Cut as they
    come, the last device would have 58 and the first 10."""
    layout, length = families.layout_of(context=4), 32
    q = jnp.zeros((1, length, 1, 1, 1))
    segments = jnp.ones((1, length), jnp.int32)
    with jax.set_mesh(layout.mesh):
        q, k = layout.shard(q, None, "length", None, None, None), layout.shard(q[:, :, 0], None, "length")
        mask = Mask(segments, segments, causal=True)
        visit = jax.jit(lambda q, k: context.attend(count_blocks, q, k, k, mask, Scoring(), layout))
        visits = visit(q, k)
        in_order = context.restore(layout.shard(visits, *[None] * 5), layout, causal=True)

    def by_device(x):  # each holds two pieces of 4 places
        return np.asarray(x).reshape(4, 2, 4)[:, :, 0].sum(1).tolist()

    assert by_device(visits) == [34, 34, 34, 34]
    assert by_device(in_order) == [10, 26, 42, 58]


def test_keys_and_values_are_all_that_is_gathered():
    """A forward pass on 4 devices along context has no other collective: of every layer k and v, float32
    [8 rows, 16 places, 2 heads, 8 features]."""
    layout = families.layout_of(context=4)
    model = Transformer(dataclasses.replace(DECODER, scan_layers=False), layout)
    with jax.set_mesh(layout.mesh):
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        b = families.place(families.batch(), layout)
        apply = jax.jit(lambda p: model.apply({"params": p}, b.inputs, b.positions, b.segments)[0])
        text = apply.lower(params).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    collectives = re.findall(rf" = (\S+)\{{\S* ({kinds})\S*\(", text)
    assert collectives == [("f32[8,16,2,8]", "all-gather")] * 4
    assert len(re.findall(rf"({kinds})\S*\(", text)) == 4


def test_attention_weights_are_refused():
    layout = families.layout_of(context=2)
    model = Transformer(DECODER, layout)
    with jax.set_mesh(layout.mesh), pytest.raises(UserError, match="context is 1"):
        ids = jnp.zeros((1, LENGTH), jnp.int32)
        jax.eval_shape(lambda: model.init(jax.random.key(0), ids, ids, ids, capture=("attention",)))
