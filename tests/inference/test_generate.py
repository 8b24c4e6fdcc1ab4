"""Decoding with a cache equals reading everything again; blanks are filled where they stand."""

import dataclasses

import families
import jax
import numpy as np
import pytest

from llm_jax.inference.generate import fill_blanks, generate
from llm_jax.inference.sampling import Sampling
from llm_jax.text.tokenizers import EOS, FIRST_TEXT_ID, MASK

pytestmark = pytest.mark.slow

LENGTH = 12


def forward(model, params, ids):
    """Scores [len(ids), vocab] by a full pass."""
    with jax.set_mesh(model.layout.mesh):
        tokens = families.place(np.tile(ids, (model.layout.ways("batch"), 1)), model.layout)
        places = families.place(np.tile(np.arange(len(ids)), (len(tokens), 1)), model.layout)
        x, _ = model.apply({"params": params}, tokens, places, np.ones_like(tokens))
        return np.asarray(model.apply({"params": params}, x, method="logits"))[0]


@pytest.fixture(scope="module")
def decoder():
    return families.make(dataclasses.replace(families.DECODER, scan_layers=False), families.layout_of())


def write(model, params, prompt, tokens, sampling=Sampling(temperature=0), seed=0, count=1):  # noqa: B008
    prompt = np.array(prompt, np.int32)
    settings = {"tokens": tokens, "count": count, "length": LENGTH, "seed": seed, "sampling": sampling}
    return generate(model, params, prompt, **settings)


def greedy_by_hand(model, params, prompt, tokens):
    """Reads all again for every token; when the window is full, keeps its second half."""
    window, out = list(prompt), []
    for _ in range(tokens):
        if len(window) == LENGTH:
            window = window[-LENGTH // 2 :]
        padded = np.array(window + [0] * (LENGTH - len(window)), np.int32)
        scores = forward(model, params, padded)[len(window) - 1].copy()
        scores[:FIRST_TEXT_ID] = np.where(np.arange(FIRST_TEXT_ID) == EOS, scores[:FIRST_TEXT_ID], -np.inf)
        best = int(scores.argmax())
        if best == EOS:
            break
        window.append(best)
        out.append(best)
    return out


def test_cached_decoding_equals_full_passes(decoder):
    """Within the window, across its end and for a prompt longer than it."""
    for prompt, tokens in (([7, 8, 9], 6), ([20], 20), (list(range(5, 30)), 4)):
        model, params = decoder
        expected = greedy_by_hand(
            model, params, prompt[-LENGTH // 2 :] if len(prompt) > LENGTH else prompt, tokens
        )
        assert write(model, params, prompt, tokens)[0].tolist() == expected


@pytest.mark.slow
def test_the_first_layer_s_values_need_no_cache_of_their_own():
    """Those of a token are mixed as it is read, and cached mixed: as full passes give them."""
    config = dataclasses.replace(families.DECODER, value_residual=True)
    model, params = families.make(config, families.layout_of())
    expected = greedy_by_hand(model, params, [7, 8, 9], 6)
    assert write(model, params, [7, 8, 9], 6)[0].tolist() == expected
    plain, _ = families.make(families.DECODER, families.layout_of())
    own = {k: v for k, v in params["blocks"]["attention"].items() if k != "value_mix_scale"}
    without = params | {"blocks": params["blocks"] | {"attention": own}}
    assert greedy_by_hand(plain, without, [7, 8, 9], 6) != expected  # so the mixing was seen


@pytest.mark.parametrize("mesh", [(2, 2, 2)])
def test_cached_decoding_on_a_mesh(decoder, mesh):
    """Sampled tokens are those of one device: scanned layers, sharded heads, batch and vocabulary."""
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    config = dataclasses.replace(families.DECODER, scan_layers=True)
    model, params = families.make(config, families.layout_of(*mesh))
    many = write(model, params, [7, 8, 9], 8, sampling, count=4)
    alone = write(*decoder, [7, 8, 9], 8, sampling, count=4)
    assert [x.tolist() for x in many] == [x.tolist() for x in alone]


def test_seeds(decoder):
    hot = Sampling(temperature=1.0)
    a, again = (write(*decoder, [7], 8, hot, seed=1)[0].tolist() for _ in range(2))
    assert a == again
    assert a != write(*decoder, [7], 8, hot, seed=2)[0].tolist()


def test_text_ends_at_eos_and_holds_no_other_special(decoder):
    model, params = decoder
    out = write(model, params, [7], 60, Sampling(temperature=5.0), count=4)
    assert all((ids >= FIRST_TEXT_ID).all() and (ids < families.VOCAB).all() for ids in out)
    assert any(len(ids) < 60 for ids in out)  # at this temperature EOS comes about every 56 tokens


def test_blanks():
    model, params = families.make(families.ENCODER, families.layout_of())
    ids = np.array([9, MASK, 11, 12, MASK], np.int32)
    guesses, shares = fill_blanks(model, params, ids, best=3)
    assert guesses.shape == shares.shape == (2, 3)
    scores = forward(model, params, ids)[[1, 4]]
    scores[:, :FIRST_TEXT_ID] = -np.inf
    assert guesses[:, 0].tolist() == scores.argmax(-1).tolist()
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(shares, -np.sort(-p, axis=-1)[:, :3], rtol=1e-4)
