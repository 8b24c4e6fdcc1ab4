"""Which tokens are kept, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.inference.sampling import Sampling, keep, sample

P = np.array([0.5, 0.05, 0.25, 0.2])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32))[None]


def kept(**settings):
    return (np.asarray(keep(LOGITS, Sampling(**settings)))[0] > -1e29).tolist()


def test_keep():
    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, False, True, False]
    assert kept(top_p=1e-9) == [True, False, False, False]
    assert kept(top_k=3, top_p=0.6) == [True, False, True, False]


def test_frequencies():
    draw = jax.jit(jax.vmap(lambda key: sample(LOGITS, key, Sampling(temperature=0.5))[0]))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    expected = P**2 / (P**2).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), expected, atol=0.012)


def test_greedy_and_bad_settings():
    assert sample(LOGITS, jax.random.key(0), Sampling(temperature=0))[0] == 0
    for settings in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(UserError, match="sampling"):
            Sampling(**settings)
