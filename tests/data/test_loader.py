"""Batch s is a function of (config, s) alone: not of devices, grouping, horizon or where one begins."""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llm_jax.data import loader
from llm_jax.data.batch import Batch
from llm_jax.data.packing import Packed
from llm_jax.data.source import TokenSource
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_layout
from llm_jax.objectives.clm import CLM
from llm_jax.objectives.mlm import MLM
from llm_jax.text import shards
from llm_jax.text.words import Vocabulary

LENGTH, VOCAB, ROWS, SEED = 8, 100, 37, 3
VOCABULARY = Vocabulary(VOCAB, np.ones(VOCAB, bool), np.ones(VOCAB, bool))
MESHES = {
    "1": (MeshConfig(), 1),
    "2": (MeshConfig(), 2),
    "8": (MeshConfig(), 8),
    "2x2x2": (MeshConfig(2, 2, 2), 8),
    "tensor": (MeshConfig(1, 1, 8), 8),
}


def sharding(mesh):
    config, count = MESHES[mesh]
    return make_layout(config, jax.devices()[:count]).named(None, None, "batch")


@pytest.fixture(scope="module")
def rows():
    """37 rows, the last one padded, with documents of many lengths."""
    rng = np.random.default_rng(0)
    stream = rng.integers(5, VOCAB, ROWS * LENGTH - 2).astype(np.int32)
    ends = np.array([*np.unique(rng.integers(1, len(stream), 40)), len(stream)])
    source = SimpleNamespace(tokens=len(stream), ends=ends, read=lambda a, b: stream[a:b])
    assert len(Packed(source, LENGTH)) == ROWS
    return Packed(source, LENGTH)


def make(rows, mesh="1", shape=(1, 1, 8), seed=SEED):
    """The batches of an objective that draws at random."""
    to_batch = partial(MLM(mask_rate=0.4).to_batch, seed=seed, vocabulary=VOCABULARY)
    return loader.TrainBatches(rows, to_batch, seed, shape, sharding(mesh))


def flat(batches):
    """Batches as one of [rows, length] in the order in which they are trained on."""
    host = [jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1]), batch) for batch in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *host)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("start", [1, 4, 6])
def test_same_batches_from_the_middle(rows, start):
    batches = make(rows)
    whole = list(batches.iterate(0, 8))
    rest = list(batches.iterate(start, 8))
    assert len(whole) == 8 and len(rest) == 8 - start
    for index, batch in zip(range(start, 8), rest, strict=True):
        assert_equal(batch, whole[index])
        assert_equal(batch, batches[index])


def test_horizon_does_not_matter(rows):
    batches = make(rows)
    assert_equal(flat(batches.iterate(0, 3)), flat(itertools.islice(batches.iterate(0, 40), 3)))


def test_nothing_to_read(rows):
    assert list(make(rows).iterate(4, 4)) == [] and list(make(rows).iterate(5, 4)) == []


@pytest.mark.parametrize("shape", [(2, 1, 8), (8, 1, 8), (1, 2, 4), (4, 4, 2), (2, 8, 1)])
def test_grouping_changes_no_row(rows, shape):
    """64 rows, well into the second epoch, however they are cut into steps and micro-batches."""
    grouped = list(make(rows, shape=shape).iterate(0, 8 // shape[0]))
    assert all(batch.inputs.shape == (*shape, LENGTH) for batch in grouped)
    assert_equal(flat(grouped), flat(make(rows).iterate(0, 8)))


@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_has_the_same_global_arrays(rows, mesh):
    shape = (2, 2, 8)
    on_mesh, on_one = make(rows, mesh, shape), make(rows, "1", shape)
    for got, wanted in zip(on_mesh.iterate(0, 3), on_one.iterate(0, 3), strict=True):
        assert_equal(got, wanted)
        assert all(leaf.sharding == sharding(mesh) for leaf in jax.tree.leaves(got))
    assert got.inputs.dtype == np.int32 and got.weights.dtype == np.float32


@pytest.mark.parametrize("mesh, parts", [("1", 1), ("2", 2), ("8", 8), ("2x2x2", 4), ("tensor", 1)])
def test_a_process_reads_each_row_that_its_devices_hold_once(rows, mesh, parts):
    width = 8 // parts
    wanted = [(start, start + width) for start in range(0, 8, width)]
    assert list(make(rows, mesh).host(0)) == wanted


def test_every_epoch_has_every_row_in_an_order_of_its_own(rows):
    to_batch = partial(CLM().to_batch, seed=0, vocabulary=VOCABULARY)
    batches = loader.TrainBatches(rows, to_batch, SEED, (1, 1, ROWS), sharding("1"))
    whole = rows.read(np.arange(ROWS)).tokens[:, :-1].tolist()
    first, second = (np.asarray(batches[epoch].inputs)[0, 0].tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == sorted(whole)
    assert first != second and whole not in (first, second)


def test_a_row_read_again_is_masked_anew(rows):
    """Random choices follow the draw, which never comes again, not the row."""
    batches = make(rows, shape=(1, 1, ROWS))
    first, second = (flat([batches[epoch]]) for epoch in (0, 1))
    a, b = (np.lexsort(batch.targets.T) for batch in (first, second))
    np.testing.assert_array_equal(first.targets[a], second.targets[b])
    assert np.mean(first.weights[a] != second.weights[b]) > 0.3


def test_seeds_differ(rows):
    assert np.any(make(rows)[0].targets != make(rows, seed=4)[0].targets)


def evaluation(rows, mesh="1", objective=None, size=8, limit=0):
    to_batch = partial((objective or CLM()).to_batch, seed=0, vocabulary=VOCABULARY)
    return list(loader.evaluation_batches(rows, to_batch, size, sharding(mesh), limit))


@pytest.mark.parametrize("mesh, size", [("1", 1), ("1", 5), ("1", ROWS), ("2", 8), ("8", 16), ("2x2x2", 40)])
def test_evaluation_covers_every_target_once(rows, mesh, size):
    batches = evaluation(rows, mesh, size=size)
    assert all(batch.inputs.shape == (1, 1, size, LENGTH) for batch in batches)
    got = flat(batches)
    wanted = CLM().to_batch(rows.read(np.arange(ROWS)), np.arange(ROWS), 0, VOCABULARY)
    assert_equal(jax.tree.map(lambda x: x[:ROWS], got), wanted)
    assert np.all(got.weights[ROWS:] == 0) and len(got.weights) - ROWS < size


def test_evaluation_masks_are_of_the_row(rows):
    """The same for any batch size and mesh, so that validation losses can be compared."""
    small, large = evaluation(rows, "1", MLM(), size=3), evaluation(rows, "8", MLM(), size=16)
    assert_equal(*(jax.tree.map(lambda x: x[:ROWS], flat(batches)) for batches in (small, large)))


def test_evaluation_limit(rows):
    assert_equal(flat(evaluation(rows, limit=2)), flat(evaluation(rows)[:2]))
    assert len(evaluation(rows, limit=100)) == len(evaluation(rows)) == 5


def test_damage_found_by_the_reading_thread_reaches_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 8)
    writer = shards.SplitWriter(tmp_path, "train", VOCAB)
    writer.add(np.arange(5, 90), 85)
    shards.write_header(
        tmp_path, {"tokenizer": "", "vocab_size": VOCAB, "splits": {"train": writer.finish()}}
    )
    path = tmp_path / "train.00000.tokens"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    batches = make(Packed(TokenSource(tmp_path, "train"), LENGTH), shape=(1, 1, 2))
    with pytest.raises(UserError, match=r"train\.00000\.tokens is corrupt"):
        list(batches.iterate(0, 20))


def test_rows_are_placed_by_index_not_by_device_number(rows):
    """Each device of a mesh in another order holds the rows that the sharding gives it."""
    layout = make_layout(MeshConfig(), jax.devices()[::-1])
    batches = make(rows)
    to_batch = partial(MLM(mask_rate=0.4).to_batch, seed=SEED, vocabulary=VOCABULARY)
    turned = loader.TrainBatches(rows, to_batch, SEED, (1, 1, 8), layout.named(None, None, "batch"))[0]
    assert_equal(turned, batches[0])
    assert isinstance(turned, Batch)
    for shard in turned.inputs.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(batches[0].inputs)[shard.index])
