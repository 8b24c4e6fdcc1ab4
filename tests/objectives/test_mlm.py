import numpy as np
import pytest

from llm_jax.data.batch import Rows
from llm_jax.objectives import masking
from llm_jax.objectives.mlm import MLM
from llm_jax.text.tokenizers import BOS, EOS, FIRST_TEXT_ID, MASK, PAD, UNKNOWN
from llm_jax.text.words import Vocabulary

VOCAB, COUNT, LENGTH = 1000, 200, 256


def make_rows(count=COUNT, length=LENGTH):
    """Random text with special tokens here and there, and padding at the end of every third row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(FIRST_TEXT_ID, VOCAB, (count, length + 1)).astype(np.int32)
    special = rng.random(tokens.shape) < 0.1
    tokens = np.where(special, rng.integers(0, FIRST_TEXT_ID, tokens.shape), tokens).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[::3, -50:] = 0
    positions = np.broadcast_to(np.arange(length + 1, dtype=np.int32), tokens.shape)
    return Rows(tokens, segments, positions)


ROWS = make_rows()
DRAWS = np.arange(COUNT)


def vocabulary(size=VOCAB):
    """Every third token ends a word, every fourth begins one."""
    return Vocabulary(size, np.arange(size) % 4 != 0, np.arange(size) % 3 != 0)


def mask(rows=ROWS, draws=DRAWS, seed=0, vocab_size=VOCAB, **rates):
    return MLM(**rates).to_batch(rows, draws, seed, vocabulary(vocab_size))


def is_text(rows):
    return ((rows.tokens >= FIRST_TEXT_ID) & (rows.segments > 0))[:, :-1]


def near(count, total, rate, others=1.0):
    """Within 4.5 standard deviations of a binomial count (others: the share that shows)."""
    return abs(count - total * rate * others) < 4.5 * np.sqrt(total * rate * (1 - rate))


@pytest.mark.parametrize("mask_rate", [0.15, 0.4])
def test_rates(mask_rate):
    batch = mask(mask_rate=mask_rate)
    chosen, text = batch.weights > 0, is_text(ROWS)
    np.testing.assert_array_equal(chosen.sum(axis=1), np.round(mask_rate * text.sum(axis=1)))
    masked, kept = chosen & (batch.inputs == MASK), chosen & (batch.inputs == batch.targets)
    swapped = chosen & ~masked & ~kept
    assert near(masked.sum(), chosen.sum(), 0.8)
    assert near(swapped.sum(), chosen.sum(), 0.1)  # one in 995 draws its own token and counts as kept
    assert near(kept.sum(), chosen.sum(), 0.1)
    assert chosen.sum() > 5000


def test_every_place_is_chosen_alike():
    rows = make_rows(2000, 32)
    batch, text = mask(rows, np.arange(2000)), is_text(rows)
    rate = batch.weights.sum() / text.sum()  # rows are short, so rounding moves it off 0.15
    assert all(near((batch.weights[:, i] > 0).sum(), text[:, i].sum(), rate) for i in range(32))


def test_special_tokens_and_padding_are_never_chosen():
    batch = mask(mask_rate=1.0)
    np.testing.assert_array_equal(batch.weights > 0, is_text(ROWS))
    np.testing.assert_array_equal(batch.inputs[~is_text(ROWS)], ROWS.tokens[:, :-1][~is_text(ROWS)])
    assert {PAD, BOS, EOS, MASK, UNKNOWN} <= set(batch.inputs[~is_text(ROWS)].tolist())


def test_targets_are_the_original_tokens():
    batch = mask()
    np.testing.assert_array_equal(batch.targets, ROWS.tokens[:, :-1])
    np.testing.assert_array_equal(batch.positions, ROWS.positions[:, :-1])
    np.testing.assert_array_equal(batch.segments, ROWS.segments[:, :-1])
    untouched = batch.weights == 0
    np.testing.assert_array_equal(batch.inputs[untouched], batch.targets[untouched])
    assert batch.inputs.dtype == batch.targets.dtype == np.int32 and batch.weights.dtype == np.float32


def test_random_tokens_are_of_the_whole_text_vocabulary():
    swapped = mask(mask_rate=1.0, mask_share=0.0, random_share=1.0, vocab_size=25).inputs[is_text(ROWS)]
    counts = np.bincount(swapped, minlength=25)
    assert counts[:FIRST_TEXT_ID].sum() == 0 and len(counts) == 25
    assert all(near(count, len(swapped), 1 / 20) for count in counts[FIRST_TEXT_ID:])


@pytest.mark.parametrize("share, wanted", [((1.0, 0.0), "mask"), ((0.0, 0.0), "keep")])
def test_shares_at_their_ends(share, wanted):
    batch = mask(mask_share=share[0], random_share=share[1])
    chosen = batch.weights > 0
    assert np.all(batch.inputs[chosen] == (MASK if wanted == "mask" else batch.targets[chosen]))


def test_same_draw_same_mask_other_draw_another():
    first, again, other, seeded = mask(), mask(), mask(draws=DRAWS + COUNT), mask(seed=1)
    np.testing.assert_array_equal(first.inputs, again.inputs)
    np.testing.assert_array_equal(first.weights, again.weights)
    text = is_text(ROWS)
    for batch in (other, seeded):  # as unlike as chance has it: 2 * 0.15 * 0.85
        assert near((first.weights != batch.weights)[text].sum(), text.sum(), 0.255)


def test_a_row_is_masked_by_its_own_draw_alone():
    whole, chosen = mask(), np.array([7, 100, 3])
    part = mask(Rows(*(x[chosen] for x in ROWS)), DRAWS[chosen])
    np.testing.assert_array_equal(part.inputs, whole.inputs[chosen])
    np.testing.assert_array_equal(part.weights, whole.weights[chosen])


@pytest.mark.parametrize("settings", [{}, {"unit": "word"}, {"max_ngram": 3}, {"mask_rate": 0.01}])
def test_predict_holds_every_target(settings):
    batch = mask(**settings)
    k = MLM(**settings).targets_of_row(LENGTH)
    assert batch.predict.shape == (COUNT, k) and batch.predict.dtype == np.int32
    assert all(len(set(row)) == k for row in batch.predict)
    found = np.take_along_axis(batch.weights, batch.predict, axis=1)
    np.testing.assert_array_equal(found.sum(axis=1), batch.weights.sum(axis=1))
    assert (batch.weights.sum(axis=1) >= 1).all()


def units_of(rows, unit):
    """[rows][(start, stop)] of the units of text, by a slow walk."""
    tokens, text, v = rows.tokens[:, :-1], is_text(rows), vocabulary()
    found = []
    for row in range(len(tokens)):
        starts = [
            i
            for i in range(LENGTH)
            if unit == "token"
            or i == 0
            or rows.segments[row, i] != rows.segments[row, i - 1]
            or not (v.closes[tokens[row, i - 1]] and v.opens[tokens[row, i]])
        ]
        spans = zip(starts, [*starts[1:], LENGTH], strict=True)
        found.append([span for span in spans if text[row, span[0]]])
    return found


def test_whole_words_are_masked_whole():
    """Every word is hidden whole or not at all, but for what of it is no text; close to the rate."""
    batch, text = mask(unit="word"), is_text(ROWS)
    chosen = batch.weights > 0
    for row, spans in enumerate(units_of(ROWS, "word")):
        for start, stop in spans:
            solid = text[row, start:stop]
            solid = solid[: np.flatnonzero(~solid)[0]] if (~solid).any() else solid
            assert len(set(chosen[row, start : start + len(solid)])) == 1
    assert 0.145 < chosen.sum() / text.sum() <= 0.151
    assert (chosen.sum(axis=1) <= np.round(0.15 * text.sum(axis=1))).all()


def test_ngrams_are_longer():
    """Runs up to 3 come out longer than single draws do, at the same rate."""

    def run_length(batch):
        chosen = np.pad(batch.weights > 0, ((0, 0), (1, 1)))
        return chosen.sum() / (chosen[:, 1:] & ~chosen[:, :-1]).sum()

    single, runs = mask(), mask(max_ngram=3)
    assert 1.05 < run_length(single) < 1.25 < 1.4 < run_length(runs) < 1.9
    assert abs(runs.weights.sum() / single.weights.sum() - 1) < 0.02


def test_sizes_of_runs_fall_as_one_over_n():
    eligible = np.ones((4000, 12), bool)
    begins = np.ones_like(eligible)
    chosen = masking.choose_spans(0, np.arange(4000), begins, eligible, np.full(4000, 3), 3)
    assert (chosen.sum(axis=1) == 3).mean() > 0.95 and chosen.sum(axis=1).max() == 3
    np.testing.assert_allclose(np.diff(masking._cumulative(3), prepend=0, append=1), np.array([6, 3, 2]) / 11)


def test_row_without_text_weighs_nothing():
    tokens = np.tile(np.arange(FIRST_TEXT_ID, dtype=np.int32), (2, 3))
    batch = mask(Rows(tokens, np.ones_like(tokens), tokens), np.arange(2), mask_rate=1.0)
    assert batch.weights.sum() == 0
    np.testing.assert_array_equal(batch.inputs, tokens[:, :-1])
