"""Splash attention, interpreted on a CPU: it gives what the dense kernel gives, forwards and backwards."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import pytest
from kernels import ONE, check, check_model, inputs

from llm_jax.errors import UserError
from llm_jax.models import attention
from llm_jax.models.attend import Mask, Scoring
from llm_jax.models.splash import splash

HEAD = 128
TPU = dataclasses.replace(ONE, platform="tpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("llm_jax.models.splash.BLOCKS", (128,))


def shapes(queries=128, keys=0, q_start=0, slopes=False, window=None):
    """Arguments of a kernel. q_start None: not known when tracing."""
    k = jnp.zeros((1, keys or queries, 1, HEAD))
    segments = jnp.ones(k.shape[:2], jnp.int32)
    start = jnp.zeros((), jnp.int32) if q_start is None else q_start
    mask = Mask(segments[:, :queries], segments, True, start, None if window is None else jnp.asarray(window))
    return k[:, :queries, :, None], k, k, mask, Scoring(jnp.ones(1) if slopes else None)


def chosen(layout, arguments):
    """What "auto" traces to."""
    traced = jax.make_jaxpr(lambda q, k, v: attention.auto(q, k, v, *arguments[3:], layout))(*arguments[:3])
    return "splash" if "splash" in str(traced) else "blockwise or dense"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 40, "windows": (0, 40), "softcap": 2.0},
        {"causal": False, "window": 40, "windows": (40,)},
        {"causal": False},
    ],
    ids=["causal", "window, soft cap", "encoder's window", "encoder"],
)
def test_equals_the_dense_kernel(options):
    """Packed rows with padding, four query heads to a key-value head."""
    check(splash, ONE, inputs(1, 1, 4), **options)


@pytest.mark.slow
def test_on_a_mesh():
    """In bfloat16, beside the dense kernel in float32."""
    check(
        splash,
        families.layout_of(data=2, tensor=2),
        inputs(2, 2, 1),
        atol=0.02,
        dtype=jnp.bfloat16,
        softcap=2.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"window": 40, "windows": (0, 40)}, {"causal": False}])
def test_along_context(options):
    """A device's queries start at other places of the keys: in a decoder it has two pieces of 128."""
    check(splash, families.layout_of(context=2), inputs(1, 1, 1, length=512), **options)


@pytest.mark.slow
def test_window_is_chosen_by_layer():
    check_model("splash", HEAD)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"queries": 96}, "96 queries at a time are no multiple of 128"),
        ({"queries": 256, "keys": 384}, "384 keys are no multiple of the 256 queries"),
        ({"keys": 256, "q_start": 100}, "the queries start at any of the 256 keys"),
        ({"slopes": True}, "ALiBi"),
        ({"window": 5}, "what the window may be is not known"),
    ],
)
def test_what_it_cannot_take_is_said(changes, reason):
    """By name it is an error; the automatic choice takes another kernel."""
    arguments = shapes(**changes)
    with jax.set_mesh(ONE.mesh):
        with pytest.raises(UserError, match=f"kernel is splash, but .*{reason}"):
            splash(*arguments, ONE)
        assert chosen(TPU, arguments) == "blockwise or dense"


@pytest.mark.parametrize(
    ("layout", "changes", "kernel"),
    [
        (TPU, {}, "splash"),
        (TPU, {"keys": 256, "q_start": 128}, "splash"),
        (TPU, {"keys": 256, "q_start": None}, "blockwise or dense"),  # decoding
        (ONE, {}, "blockwise or dense"),
    ],
)
def test_automatic_choice(layout, changes, kernel):
    with jax.set_mesh(ONE.mesh):
        assert chosen(layout, shapes(**changes)) == kernel
