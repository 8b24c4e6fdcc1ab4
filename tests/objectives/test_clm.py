from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from llm_jax.data import packing
from llm_jax.objectives.clm import CLM

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18], [19, 20, 21, 22, 23, 24, 25]]


def batch_of(kind, length, documents=DOCUMENTS):
    stream = np.array([*chain(*documents)], np.int32)
    ends = np.cumsum([len(document) for document in documents])
    source = SimpleNamespace(tokens=len(stream), ends=ends, read=lambda a, b: stream[a:b])
    rows = packing.pack(source, kind, length)
    numbers = np.arange(len(rows))
    return CLM().to_batch(rows.read(numbers), numbers, seed=0, vocabulary=None)


def predicted(batch):
    """Every (token, the token it should predict), in order."""
    real = batch.weights > 0
    return list(zip(batch.inputs[real].tolist(), batch.targets[real].tolist(), strict=True))


def pairs(documents):
    return [pair for document in documents for pair in pairwise(document)]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 20, 50])
def test_packed_predicts_every_next_token_of_each_document(length):
    """All of them, once, wherever the rows are cut, and none across documents or into padding."""
    assert predicted(batch_of("packed", length)) == pairs(DOCUMENTS)


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_contiguous_predicts_across_documents(length):
    assert predicted(batch_of("contiguous", length)) == pairs([[*chain(*DOCUMENTS)]])


@pytest.mark.parametrize("length", [1, 3, 8, 50])
def test_document_rows_predict_up_to_their_cut(length):
    cut = [document[: length + 1] for document in DOCUMENTS]
    assert predicted(batch_of("document", length)) == pairs(cut)


def test_batch_by_a_slow_loop():
    batch = batch_of("packed", 5)
    stream = [(token, n) for n, document in enumerate(DOCUMENTS) for token in document]
    for r, row in enumerate(batch.inputs):
        for i in range(len(row)):
            here, following = (
                stream[j] if j < len(stream) else (0, None) for j in (5 * r + i, 5 * r + i + 1)
            )
            assert (batch.inputs[r, i], batch.targets[r, i]) == (here[0], following[0])
            assert batch.weights[r, i] == float(here[1] is not None and here[1] == following[1])


def test_shapes_and_types():
    batch = batch_of("packed", 5)
    assert batch.predict is None
    shapes = {name: getattr(batch, name).shape for name in vars(batch) if name != "predict"}
    assert set(shapes.values()) == {(4, 5)}
    types = {name: getattr(batch, name).dtype.name for name in shapes}
    assert types.pop("weights") == "float32" and set(types.values()) == {"int32"}


def test_draws_change_nothing():
    rows = packing.Packed(
        SimpleNamespace(tokens=9, ends=np.array([9]), read=lambda a, b: np.arange(5, 14)[a:b]), 4
    ).read(np.arange(2))
    first = CLM().to_batch(rows, np.array([0, 1]), 0, 100)
    second = CLM().to_batch(rows, np.array([7, 8]), 1, 100)
    assert all(np.array_equal(getattr(first, n), getattr(second, n)) for n in first.__dataclass_fields__)
