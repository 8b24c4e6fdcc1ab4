"""Reading shards back, and every kind of damage to them."""

import os

import numpy as np
import pytest

from llm_jax import storage
from llm_jax.data.source import TokenSource, damage
from llm_jax.errors import UserError
from llm_jax.text import shards, tokenizers

LENGTHS = {"train": [5, 0, 14, 30, 1], "validation": [9, 4]}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(shards, "FILE_TOKENS", 20)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 8)


def write(directory, vocab_size=1000):
    """A shard set with random documents; gives {split: its token stream}."""
    rng, splits, streams = np.random.default_rng(0), {}, {}
    tokenizer = tokenizers.CharTokenizer("ab")
    tokenizers.save(tokenizer, directory / "tokenizer.json")
    for split, lengths in LENGTHS.items():
        documents = [rng.integers(0, vocab_size, length) for length in lengths]
        with shards.SplitWriter(directory, split, vocab_size) as writer:
            for document in documents:
                writer.add(document, len(document))
            splits[split], streams[split] = writer.finish(), np.concatenate(documents)
    content = {"tokenizer": tokenizers.fingerprint(tokenizer), "vocab_size": vocab_size, "splits": splits}
    shards.write_header(directory, content)
    return streams


def flip(path, byte, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def read_everything(directory):
    tokenizers.load(directory / "tokenizer.json")
    for split in LENGTHS:
        TokenSource(directory, split).check_all()


@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_every_range_across_file_borders(tmp_path, vocab_size):
    stream = write(tmp_path, vocab_size)["train"]
    assert len(list(tmp_path.glob("train.*.tokens"))) == 3
    source = TokenSource(tmp_path, "train")
    assert source.tokens == len(stream) == 50
    assert source.ends.tolist() == [5, 5, 19, 49, 50]
    for start in range(51):
        for stop in range(start, 51):
            got = source.read(start, stop)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, stream[start:stop])


def test_splits_are_apart(tmp_path):
    for split, stream in write(tmp_path).items():
        source = TokenSource(tmp_path, split)
        np.testing.assert_array_equal(source.read(0, source.tokens), stream)
        assert source.text_bytes == len(stream)


def test_every_flipped_byte_is_noticed(tmp_path):
    """A bit of each byte; of sealed files every 11th, as tests/test_storage.py flips all of one."""
    write(tmp_path)
    read_everything(tmp_path)
    tried = 0
    for path in sorted(tmp_path.iterdir()):
        good = path.read_bytes()
        for byte in range(0, len(good), 11 if path.name.endswith(".json") else 1):
            flip(path, byte, byte % 8)
            with pytest.raises(UserError, match=path.name):
                read_everything(tmp_path)
            path.write_bytes(good)
            tried += 1
    read_everything(tmp_path)
    assert tried > 350


def test_a_flipped_token_is_noticed_when_its_block_is_touched(tmp_path):
    """... and before it is given out; other blocks stay readable."""
    stream = write(tmp_path)["train"]
    flip(tmp_path / "train.00001.tokens", 17)  # token 28, in the block of tokens 28 to 31
    source = TokenSource(tmp_path, "train")
    np.testing.assert_array_equal(source.read(0, 28), stream[:28])
    np.testing.assert_array_equal(source.read(32, 50), stream[32:])
    for start, stop in ((31, 32), (27, 29), (0, 50)):
        for _ in range(2):  # a block found bad stays bad
            with pytest.raises(UserError, match=r"train\.00001\.tokens is corrupt in bytes 16 to 24"):
                source.read(start, stop)


@pytest.mark.parametrize("name", ["train.00000.tokens", "train.00002.tokens", "validation.00000.tokens"])
@pytest.mark.parametrize("change", [-20, -2, -1, 1, 2])
def test_token_file_of_another_size_is_named(tmp_path, name, change):
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(UserError, match=f"{name} has {max(0, len(data) + change)} bytes, not {len(data)}"):
        TokenSource(tmp_path, name.split(".")[0])


@pytest.mark.parametrize("name", ["train.ends", "train.crc"])
@pytest.mark.parametrize("change", [-8, -4, -1, 8])
def test_index_of_another_size_is_named(tmp_path, name, change):
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(UserError, match=f"{name} is corrupt"):
        TokenSource(tmp_path, "train")


@pytest.mark.parametrize(
    "name", ["header.json", "tokenizer.json", "train.ends", "train.crc", "train.00001.tokens"]
)
def test_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        read_everything(tmp_path)


@pytest.mark.parametrize("name", ["header.json", "tokenizer.json", "train.ends", "train.crc"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Is a directory\)"):
        read_everything(tmp_path)


def test_a_failing_disk_is_named(tmp_path, monkeypatch):
    """When a token file is opened, and when it is read."""
    write(tmp_path)

    def fails(*args):
        raise OSError(5, "Input/output error")

    source = TokenSource(tmp_path, "train")
    for call, use in (("pread", source.check_all), ("open", lambda: TokenSource(tmp_path, "train"))):
        with monkeypatch.context() as patch, pytest.raises(UserError) as raised:
            patch.setattr(os, call, fails)
            use()
        assert "train.00000.tokens cannot be read (Input/output error); delete" in str(raised.value)


def test_damage_is_listed_file_by_file(tmp_path):
    write(tmp_path)
    assert damage(tmp_path) == []
    flip(tmp_path / "train.00002.tokens", 3)
    flip(tmp_path / "validation.ends", 3)
    (tmp_path / "tokenizer.json").unlink()
    found = damage(tmp_path)
    for name in ("train.00002.tokens", "validation.ends", "tokenizer.json"):
        assert sum(str(tmp_path / name) in line for line in found) == 1
    assert len(found) == 3


def test_every_damaged_token_file_of_a_split_is_listed(tmp_path):
    write(tmp_path)
    paths = [tmp_path / f"train.0000{i}.tokens" for i in range(3)]
    flip(paths[0], 3)
    paths[1].unlink()
    flip(paths[2], 3)
    found = damage(tmp_path)
    assert len(found) == 3 and all(str(path) in line for path, line in zip(paths, found, strict=True))
    flip(tmp_path / "train.crc", 0)  # by which the others are judged
    assert [line.partition(" ")[0] for line in damage(tmp_path)] == [str(tmp_path / "train.crc")]


def test_file_cut_short_while_it_is_read_is_named(tmp_path):
    write(tmp_path)
    source = TokenSource(tmp_path, "train")
    source.read(0, 2)
    (tmp_path / "train.00000.tokens").write_bytes(b"")
    for start in (0, 4):  # in a block checked before, and in one not touched yet
        with pytest.raises(UserError, match=r"train\.00000\.tokens was cut short"):
            source.read(start, start + 2)


def test_swapped_token_files_are_noticed(tmp_path):
    write(tmp_path)
    first, second = tmp_path / "train.00000.tokens", tmp_path / "train.00001.tokens"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(UserError, match=r"train\.00000\.tokens is corrupt"):
        TokenSource(tmp_path, "train").check_all()


def test_shards_in_a_bucket(bucket, monkeypatch, tmp_path):
    """Read in ranges, checked like files; a whole file is never fetched for a few tokens."""
    monkeypatch.setattr(storage.bucket, "RANGE_BYTES", 8)
    directory = storage.path("gs://bucket/shards")
    with storage.publish_directory(directory, shards.HEADER) as local:
        stream = write(local)["train"]
    assert damage(directory) == []
    source = TokenSource(directory, "train")
    before = bucket.fetched
    np.testing.assert_array_equal(source.read(22, 23), stream[22:23])
    assert bucket.fetched - before == 8
    for start in range(0, 51, 3):
        for stop in range(start, 51):
            np.testing.assert_array_equal(source.read(start, stop), stream[start:stop])
    assert bucket.fetched - before == 2 * len(stream)
    name = "bucket/shards/train.00001.tokens"
    good = bucket.stored[name][0]
    bucket.put(name, good[:17] + b"!" + good[18:])
    with pytest.raises(
        UserError, match=r"gs://bucket/shards/train\.00001\.tokens is corrupt in bytes 16 to 24"
    ):
        TokenSource(directory, "train").read(28, 32)
    bucket.put(name, good[:-2])
    with pytest.raises(UserError, match=f"{name} has {len(good) - 2} bytes, not {len(good)}"):
        TokenSource(directory, "train")
    bucket.remove(name)
    with pytest.raises(UserError, match=f"{name} is missing"):
        TokenSource(directory, "train")
