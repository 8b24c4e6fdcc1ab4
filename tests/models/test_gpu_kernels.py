"""The kernels for GPUs, interpreted or replaced on a CPU: they give what the dense kernel gives; and all of
flash's are compiled as far as Triton's own code without a GPU."""

import dataclasses
from functools import partial

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import ONE, check, check_model, inputs, run

from llm_jax.errors import UserError
from llm_jax.models import attend, attention, context, flash_kernel, layers
from llm_jax.models.attend import Mask, Scoring
from llm_jax.models.cudnn import cudnn
from llm_jax.models.flash import flash

GPU = dataclasses.replace(ONE, platform="gpu")
ENDS = np.repeat([1, 0], [220, 36]).astype(np.int32)  # one segment a row, padded
OPTIONS = {
    "causal": {},
    "window": {"window": 40, "windows": (0, 40)},
    "encoder's window": {"causal": False, "window": 40, "windows": (40,)},
    "encoder": {"causal": False},
}


def test_dense_in_bfloat16_has_the_gradients_of_float32():
    check(attend.dense, ONE, inputs(2, 2, 2, head=16), atol=0.02, dtype=jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flash_equals_dense(options):
    """Packed rows with padding, two query heads to a key-value head, of a length in no whole blocks."""
    pattern = np.repeat([1, 2, 3, 0], [70, 5, 20, 15]).astype(np.int32)
    check(flash, ONE, inputs(2, 2, 2, length=110, head=16), pattern=pattern, **options)


@pytest.mark.slow
def test_flash_on_a_mesh():
    arrays = inputs(2, 2, 1, head=16)
    check(flash, families.layout_of(data=2, tensor=2), arrays, atol=0.02, dtype=jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS["window"], OPTIONS["encoder"]])
def test_flash_along_context(options):
    """A device's queries start at other places of the keys: in a decoder it has two pieces of 128."""
    check(flash, families.layout_of(context=2), inputs(1, 1, 1, length=512, head=16), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window", "encoder"])
def test_cudnn_equals_dense(name):
    check(cudnn, ONE, inputs(2, 2, 2, head=16), pattern=ENDS, **OPTIONS[name])


def test_cudnn_on_a_mesh():
    check(cudnn, families.layout_of(data=2, tensor=2), inputs(2, 2, 1, head=16), pattern=ENDS)


@pytest.mark.slow
def test_cudnn_of_unpadded_rows_reads_no_segments():
    """Of an encoder's, as of rows that are one segment to their end."""
    q, k, v, _ = inputs(2, 2, 2, head=16)
    ends, ones = (jnp.asarray(np.tile(row, (2, 1))) for row in (ENDS, np.ones_like(ENDS)))

    @partial(jax.jit, static_argnums=1)
    def attended(segments, unpadded):
        return cudnn(q, k, v, Mask(segments, segments, False, unpadded=unpadded), Scoring(), ONE)

    with jax.set_mesh(ONE.mesh):
        np.testing.assert_array_equal(attended(ends, True), attended(ones, True))
        np.testing.assert_allclose(attended(ends, True), attended(ones, False), atol=2e-5)
        assert np.abs(attended(ends, True) - attended(ends, False))[:, :220].max() > 0.1


def test_cudnn_sees_no_documents():
    """What its docstring says: packed rows are not for it."""
    arrays = inputs(1, 1, 1, head=16)
    one, other = run(cudnn, ONE, arrays)[0], run(attend.dense, ONE, arrays)[0]
    assert np.abs(one - other)[:, 170:220].max() > 0.1


def test_blocks_of_other_documents_are_not_visited():
    """Three documents of two blocks each: of the 36 pairs of blocks, 9 are left by a causal mask."""
    segments = jnp.asarray(np.repeat([1, 2, 3], 2 * flash_kernel.BLOCK)[None].astype(np.int32))
    zero = jnp.zeros(1, jnp.int32)
    of = flash_kernel._Of(segments, segments, zero, zero)
    visible = flash_kernel._visible(flash_kernel.Static(causal=True, interpret=True), of)
    bounds = flash_kernel._bounds(visible)
    assert int(visible.sum()) == 9
    assert int((bounds[..., 1] - bounds[..., 0]).sum()) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{}, {"data": 2, "tensor": 2}, {"fsdp": 2}, {"context": 2}, {"stage": 2}], ids=str
)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_gains_have_the_same_gradients_by_groups(family, mesh):
    """What a GPU sums by groups of tokens, on any mesh."""
    biases = {"biases": True} if family == "encoder" else {}
    config = dataclasses.replace(families.FAMILIES[family], kernel="dense", max_length=256, **biases)
    found, tokens = [], np.random.default_rng(0).integers(5, families.VOCAB, (4, 256), np.int32)
    places, ones = np.tile(np.arange(256, dtype=np.int32), (4, 1)), np.ones_like(tokens)
    for layout in (ONE, dataclasses.replace(families.layout_of(**mesh), platform="gpu")):
        model, params = families.make(config, layout)

        def loss(params, *batch, model=model, layout=layout):
            dealt = context.deal(batch, layout, config.causal)
            hidden = context.restore(model.apply({"params": params}, *dealt)[0], layout, config.causal)
            return jnp.sum(jnp.sin(layout.shard(hidden, *[None] * 3) + jnp.arange(256.0)[:, None]))

        batch = jax.device_put((tokens, places, ones), layout.named("batch"))
        with jax.set_mesh(layout.mesh):
            found.append(jax.device_get(jax.jit(jax.grad(loss))(params, *batch)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=3e-3, rtol=1e-3), *found)


@pytest.mark.parametrize("norm", layers.NORMS)
def test_gains_by_groups_keep_no_more_for_the_backward_pass(norm):
    """A broadcast of the gains would be kept for every layer of a scan."""
    x, kept = jnp.ones((2, 256, 8)), []
    for layout in (ONE, GPU):
        module = layers.NORMS[norm](layout, "float32", biases=True)
        with jax.set_mesh(layout.mesh):
            params = module.init(jax.random.key(0), x)
            _, pull = jax.vjp(module.apply, params, x)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    assert kept[1] < kept[0] + x.size // 2


def test_flash_becomes_triton_code():
    """Forward, gradients of queries and of keys, for a GPU that is not there."""
    static = flash_kernel.Static(causal=True, interpret=False)
    zero, segments = jnp.zeros(1, jnp.int32), jnp.ones((2, 256), jnp.int32)

    def loss(q, k, v):
        o = flash_kernel._attention(static, q, k, v, flash_kernel._Of(segments, segments, zero, zero))
        return jnp.sum(o.astype(jnp.float32))

    q, k = jnp.zeros((2, 4, 256, 64), jnp.bfloat16), jnp.zeros((2, 2, 256, 64), jnp.bfloat16)
    h200 = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=h200)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_a_model_with_it(kernel):
    check_model(kernel, 16)


@pytest.mark.parametrize(
    ("layout", "one_segment", "changes", "kernel"),
    [
        (GPU, True, {}, "cudnn"),
        (GPU, False, {}, "auto"),  # packed rows: flash, when it is traced
        (GPU, True, {"kernel": "dense"}, "dense"),
        (GPU, True, {"dtype": "float32"}, "auto"),
        (GPU, True, {"positions": "alibi"}, "auto"),
        (GPU, True, {"causal": False}, "cudnn"),
        (GPU, True, {"causal": False, "window": (8, 0)}, "auto"),
        (dataclasses.replace(families.layout_of(stage=2), platform="gpu"), True, {}, "auto"),
        (ONE, True, {}, "auto"),
    ],
)
def test_cudnn_is_for_whole_rows(layout, one_segment, changes, kernel):
    config = dataclasses.replace(families.DECODER, **{"dtype": "bfloat16", **changes})
    assert attention.choose_kernel(config, layout, one_segment) == kernel


def arguments(head=16, queries=128, dtype=jnp.bfloat16, scoring=Scoring(), causal=True, **mask):  # noqa: B008
    k, segments = jnp.zeros((1, 128, 1, head), dtype), jnp.ones((1, 128), jnp.int32)
    return k[:, :queries, :, None], k, k, Mask(segments[:, :queries], segments, causal, **mask), scoring


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        ("flash", {"head": 24}, "head_dim=24 is no power of 2"),
        ("flash", {"scoring": Scoring(softcap=3.0)}, "it has neither ALiBi slopes nor a soft-cap"),
        ("cudnn", {"head": 136}, "head_dim=136 is no multiple of 8 up to 128"),
        ("cudnn", {"dtype": jnp.float32}, "float32 is not among its types"),
        ("cudnn", {"q_start": jnp.zeros((), jnp.int32)}, "the queries do not start with the first key"),
        ("cudnn", {"window": jnp.ones((), jnp.int32)}, "what the window may be is not known"),
        ("cudnn", {"causal": False, "window": 8}, "an encoder's window is none of its masks"),
    ],
)
def test_what_they_cannot_take_is_said(kernel, changes, reason):
    with jax.set_mesh(ONE.mesh), pytest.raises(UserError, match=f"kernel is {kernel}, but {reason}"):
        attention.KERNELS[kernel](*arguments(**changes), GPU)


@pytest.mark.parametrize(
    ("layout", "changes", "expected"),
    [(GPU, {}, 1), (GPU, {"queries": 1}, 0), (GPU, {"head": 24}, 0), (ONE, {}, 0)],
    ids=["packed", "decoding", "unfit", "cpu"],
)
def test_automatic_choice(layout, changes, expected):
    given = arguments(**changes)
    with jax.set_mesh(ONE.mesh):
        traced = jax.make_jaxpr(lambda q, k, v: attention.auto(q, k, v, *given[3:], layout))(*given[:3])
    assert str(traced).count("pallas_call") == expected
