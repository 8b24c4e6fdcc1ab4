import zlib
from itertools import chain

import numpy as np
import pytest

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.text import shards


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(shards, "FILE_TOKENS", 20)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 8)


def write(directory, documents, vocab_size=1000, split="train"):
    """A split's entry of the header."""
    directory.mkdir(exist_ok=True)
    with shards.SplitWriter(directory, split, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document, np.int32), 2 * len(document))
        return writer.finish()


def make_documents(lengths, vocab_size=1000):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def header(**splits):
    return {"tokenizer": "t", "vocab_size": 1000, "splits": splits}


# Shorter and longer than a file, ends on a file border, an empty document, nothing at all.
@pytest.mark.parametrize("lengths", [[3, 4], [7, 0, 33, 0], [20], [19, 1, 20, 40], [100], [1] * 45, [0], []])
@pytest.mark.parametrize("vocab_size, itemsize", [(1000, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_files_hold_the_documents_in_order(tmp_path, lengths, vocab_size, itemsize):
    documents = make_documents(lengths, vocab_size)
    documents[-1:] = [[*document[:-1], vocab_size - 1][: len(document)] for document in documents[-1:]]
    entry = write(tmp_path, documents, vocab_size)
    dtype = np.dtype(entry["dtype"])
    assert dtype.itemsize == itemsize and entry["dtype"].startswith("<")

    data = [(tmp_path / file["file"]).read_bytes() for file in entry["files"]]
    stream = np.concatenate([np.frombuffer(part, dtype) for part in data])
    np.testing.assert_array_equal(stream, np.array([*chain(*documents)], int))
    sizes = [file["tokens"] for file in entry["files"]]
    assert [len(part) for part in data] == [size * itemsize for size in sizes]
    assert all(size == 20 for size in sizes[:-1]) and (0 < sizes[-1] <= 20 or sum(lengths) == 0)

    ends = np.fromfile(tmp_path / entry["ends"]["file"], "<i8")
    np.testing.assert_array_equal(ends, np.cumsum(lengths))
    crcs = [zlib.crc32(part[i : i + 8]) for part in data for i in range(0, len(part), 8)]
    assert np.fromfile(tmp_path / entry["crc"]["file"], "<u4").tolist() == crcs
    counts = {"tokens": sum(lengths), "documents": len(lengths), "text_bytes": 2 * sum(lengths)}
    assert {key: entry[key] for key in counts} == counts


@pytest.mark.parametrize("lengths", [[3], [15], [50]])  # nothing, one block, two files on the disk
def test_an_exception_leaves_no_half_written_file(tmp_path, lengths):
    with pytest.raises(RuntimeError), shards.SplitWriter(tmp_path, "train", 1000) as writer:
        for document in make_documents(lengths):
            writer.add(np.array(document, np.int32), 0)
        raise RuntimeError
    whole = [tmp_path / f"train.{i:05d}.tokens" for i in range(sum(lengths) // 20)]
    assert sorted(tmp_path.iterdir()) == whole
    assert all(path.stat().st_size == 40 for path in whole)


@pytest.mark.parametrize("tokens", [15, 20_000])  # noticed when the file is closed, and at once
def test_a_full_disk_is_named(tmp_path, monkeypatch, full_disk, tokens):
    monkeypatch.setattr(shards, "FILE_TOKENS", 1 << 20)
    message = f"cannot write {tmp_path}/train.00000.tokens: File too large; free some space or use another"
    with pytest.raises(UserError, match=message), full_disk(after=20):
        write(tmp_path, make_documents([tokens]))
    assert list(tmp_path.iterdir()) == []


def test_header_round_trip(tmp_path):
    content = header(train=write(tmp_path, make_documents([30, 5])))
    with pytest.raises(UserError, match=r"header\.json is missing"):
        shards.read_header(tmp_path)
    shards.write_header(tmp_path, content)
    assert shards.read_header(tmp_path) == {"format": shards.FORMAT, **content}


def test_other_format_is_refused(tmp_path, monkeypatch):
    shards.write_header(tmp_path, header())
    monkeypatch.setattr(shards, "FORMAT", shards.FORMAT + 1)
    with pytest.raises(UserError, match=f"{tmp_path} has shard format"):
        shards.read_header(tmp_path)


def test_another_sealed_file_is_no_header(tmp_path):
    storage.write_sealed(tmp_path / "header.json", {"kind": "byte"})
    with pytest.raises(UserError, match="has shard format None"):
        shards.read_header(tmp_path)


def test_content_id_is_of_content_alone(tmp_path):
    documents = make_documents([30, 5])

    def content_id(name, documents, tokenizer="t", split="train"):
        entry = write(tmp_path / name, documents, split=split)
        return shards.content_id({"tokenizer": tokenizer, "splits": {split: entry}, "text": [name]})

    base = content_id("a", documents)
    assert content_id("b", documents) == base
    swapped = [[*documents[0][:9], 999, *documents[0][10:]], documents[1]]
    moved = [documents[0][:-1], [documents[0][-1], *documents[1]]]
    others = [
        content_id("c", swapped),
        content_id("d", moved),
        content_id("e", documents, tokenizer="u"),
        content_id("f", documents, split="validation"),
    ]
    assert len({base, *others}) == 5
