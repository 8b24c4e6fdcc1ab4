from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from llm_jax.data import packing
from llm_jax.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19], [], [20, 21, 22, 23, 24, 25]]


def source_of(documents):
    stream = np.array([*chain(*documents)], np.int32)
    ends = np.cumsum([len(document) for document in documents])
    return SimpleNamespace(tokens=len(stream), ends=ends, read=lambda start, stop: stream[start:stop])


def read_all(documents, kind, length):
    rows = packing.pack(source_of(documents), kind, length)
    return rows.read(np.arange(len(rows)))


def slow_rows(documents, length):
    """(token, document, place in the document) of every cell, None in padding; straight from the words."""
    cells = [
        (token, number, place)
        for number, document in enumerate(documents)
        for place, token in enumerate(document)
    ]
    starts = range(0, max(len(cells) - 1, 0), length)
    rows = [cells[start : start + length + 1] for start in starts]
    return [row + [None] * (length + 1 - len(row)) for row in rows]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 7, 20, 21, 100])
@pytest.mark.parametrize("documents", [DOCUMENTS, [[1] * 9, [2] * 12], [[1, 2]], [[7]] * 21])
def test_packed_equals_a_slow_computation(documents, length):
    got = read_all(documents, "packed", length)
    wanted = slow_rows(documents, length)
    assert got.tokens.shape == (len(wanted), length + 1) and got.tokens.dtype == np.int32
    for tokens, segments, positions, row in zip(*got, wanted, strict=True):
        first_place, number = {}, {}
        for token, segment, position, cell in zip(tokens, segments, positions, row, strict=True):
            if cell is None:
                assert (token, segment, position) == (0, 0, 0)
                continue
            first_place.setdefault(cell[1], cell[2])
            number.setdefault(cell[1], segment)
            assert (token, position) == (cell[0], cell[2] - first_place[cell[1]])
            assert segment == number[cell[1]]  # the same within a document
        assert len(set(number.values())) == len(number)  # another for every document
        assert segments[0] == 1 and list(number.values()) == sorted(number.values())


@pytest.mark.parametrize("kind", ["packed", "contiguous"])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 7, 20, 21, 100])
def test_every_token_but_the_first_is_a_target_once(kind, length):
    stream = [*chain(*DOCUMENTS)]
    rows = read_all(DOCUMENTS, kind, length)
    real = rows.segments[:, 1:] > 0
    assert rows.tokens[:, 1:][real].tolist() == stream[1:]
    assert rows.tokens[:, :-1][real].tolist() == stream[:-1]  # behind the token it follows


def test_segments_of_a_small_example():
    rows = read_all([[5, 6, 7], [8], [9, 10, 11]], "packed", 4)
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 9], [9, 10, 11, 0, 0]]
    assert rows.segments.tolist() == [[1, 1, 1, 2, 3], [1, 1, 1, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 0, 0]]


def test_document_cut_by_a_row_begins_anew_there():
    rows = read_all([[1] * 20], "packed", 8)
    assert rows.positions.tolist() == [[*range(9)], [*range(9)], [0, 1, 2, 3, 0, 0, 0, 0, 0]]


def test_contiguous_rows_are_one_segment():
    packed, contiguous = (read_all(DOCUMENTS, kind, 6) for kind in ("packed", "contiguous"))
    np.testing.assert_array_equal(contiguous.tokens, packed.tokens)
    real = packed.segments > 0
    np.testing.assert_array_equal(contiguous.segments, real.astype(int))
    np.testing.assert_array_equal(contiguous.positions, np.where(real, np.arange(7), 0))


def test_packed_rows_are_full_but_the_last():
    """What a document a row would waste: of these, of 2 to 30 tokens in rows of 32, more than half."""
    draw = np.random.default_rng(0)
    documents = [[1] * size for size in draw.integers(2, 31, 500)]
    fill = {kind: np.mean(read_all(documents, kind, 32).segments > 0) for kind in ("packed", "document")}
    assert fill["packed"] > 0.99 and fill["document"] < 0.55


def test_document_rows_are_cut_and_padded():
    rows = read_all(DOCUMENTS, "document", 5)
    assert len(rows.tokens) == len(DOCUMENTS)
    for document, tokens, segments, positions in zip(DOCUMENTS, *rows, strict=True):
        size = min(len(document), 6)
        padding = [0] * (6 - size)
        assert tokens.tolist() == document[:size] + padding
        assert segments.tolist() == [1] * size + padding
        assert positions.tolist() == [*range(size), *padding]


@pytest.mark.parametrize("kind", packing.PACKINGS)
def test_rows_in_any_order_and_number(kind):
    rows = packing.pack(source_of(DOCUMENTS), kind, 4)
    together = rows.read(np.arange(len(rows)))
    chosen = np.array([3, 0, 3, len(rows) - 1])
    for part, whole in zip(rows.read(chosen), together, strict=True):
        np.testing.assert_array_equal(part, whole[chosen])


@pytest.mark.parametrize("kind", ["packed", "contiguous"])
def test_too_little_text_for_a_row(kind):
    with pytest.raises(UserError, match="1 tokens, too few"):
        packing.pack(source_of([[5]]), kind, 8)


def test_shifted_rows_are_cut_elsewhere_in_each_epoch():
    """Of 21 tokens in rows of 4: the first epoch as "contiguous", the others whole, too, at other places."""
    stream = np.arange(5, 26).tolist()
    shifted, fixed = (packing.pack(source_of([stream]), kind, 4) for kind in ("shifted", "contiguous"))
    count, starts = len(shifted), []
    np.testing.assert_array_equal(
        shifted.draw(7, np.arange(count)).tokens, fixed.draw(7, np.arange(count)).tokens
    )
    for epoch in range(1, 9):
        rows = shifted.draw(7, epoch * count + np.arange(count))
        real = rows.tokens[rows.segments > 0]
        missing = set(stream) - set(real.tolist())
        assert missing <= set(stream[:4])  # what comes before the first cut, if no row is free for it
        starts.append(int(rows.tokens[:, 0].min()))
        for tokens, segments in zip(rows.tokens, rows.segments, strict=True):
            size = int(segments.sum())
            assert size >= 2 and tokens[:size].tolist() == list(range(tokens[0], tokens[0] + size))
    assert len(set(starts)) > 1
    one = shifted.draw(7, np.array([3 * count + 2])).tokens  # any draw on its own
    np.testing.assert_array_equal(one[0], shifted.draw(7, 3 * count + np.arange(count)).tokens[2])


@pytest.mark.parametrize("kind", packing.WHOLE)
@pytest.mark.parametrize("count", [3, 22, 23])
def test_filled_rows_have_no_padding(kind, count):
    """What was padding is the beginning of the text, again and again if that is short."""
    rows = packing.pack(source_of([np.arange(5, 5 + count).tolist()]), kind, 4)
    draws = np.arange(6 * len(rows))
    before, after = rows.draw(7, draws), packing.Filled(rows).draw(7, draws)
    real = before.segments > 0
    np.testing.assert_array_equal(after.tokens[real], before.tokens[real])
    for tokens, kept in zip(after.tokens, real, strict=True):
        assert tokens[~kept].tolist() == [5 + i % count for i in range(int((~kept).sum()))]
    assert (after.segments == 1).all() and not real.all()
    assert (after.positions == np.arange(5)).all()
