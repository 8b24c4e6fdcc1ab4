"""Shard sets of one text: what is in them, and what is refused."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from prepared import TEXTS, listing, make, read

from llm_jax.data.source import TokenSource
from llm_jax.errors import UserError
from llm_jax.text import prepare, shards, tokenizers
from llm_jax.text.sources import DataConfig
from llm_jax.text.tokenizers import BOS, EOS, ByteConfig, CharConfig


def test_every_document_is_in_one_split(folder):
    header = make(folder)
    train, validation = read(folder, "train")[1], read(folder, "validation")[1]
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train]  # in order
    assert 3 < len(validation) < 20
    for split, texts in (("train", train), ("validation", validation)):
        assert header["splits"][split]["documents"] == len(texts)
        assert header["splits"][split]["text_bytes"] == len("".join(texts).encode())


def test_markers(folder):
    make(folder)
    for ids in read(folder, "train")[0]:
        assert ids[0] == BOS and ids[-1] == EOS and not {BOS, EOS} & set(ids[1:-1].tolist())


def test_no_markers(folder):
    make(folder, markers=False)
    assert all(ids.min() >= tokenizers.FIRST_TEXT_ID for ids in read(folder, "train")[0])


def test_document_split_is_independent_of_the_other_documents(folder, tmp_path_factory):
    make(folder)
    held = set(read(folder, "validation")[1])
    fewer = tmp_path_factory.mktemp("fewer")
    (fewer / "text").mkdir()
    for i, text in enumerate(reversed(TEXTS[::2])):
        (fewer / "text" / f"{i}.txt").write_text(text)
    make(fewer)
    assert set(read(fewer, "validation")[1]) == held & set(TEXTS[::2])


def test_larger_fraction_holds_out_the_same_and_more():
    texts = [str(i) for i in range(2000)]
    held = {f: {t for t in texts if prepare.held_out(t, f)} for f in (0.0, 0.1, 0.5, 1.0)}
    assert held[0.0] == set() and held[1.0] == set(texts) and held[0.1] < held[0.5]
    assert 140 < len(held[0.1]) < 260 and 900 < len(held[0.5]) < 1100


def test_position_split_is_the_first_part_of_every_document(folder):
    make(folder, validation="position", validation_fraction=0.1)
    cuts = [len(text) * 9 // 10 for text in TEXTS]
    assert read(folder, "train")[1] == [text[:cut] for text, cut in zip(TEXTS, cuts, strict=True)]
    assert read(folder, "validation")[1] == [text[cut:] for text, cut in zip(TEXTS, cuts, strict=True)]


def test_tokenizer_learns_from_training_text_alone(folder):
    """A character of the validation part alone is unknown."""
    (folder / "one.txt").write_text("abc" * 30 + "z" * 10)
    make(folder, CharConfig(), text="one.txt", validation="position", validation_fraction=0.1)
    assert tokenizers.load(folder / "data" / "tokenizer.json").vocab_size == tokenizers.FIRST_TEXT_ID + 3
    assert set(read(folder, "validation")[1][0]) == {"\ufffd"}


@pytest.mark.parametrize("tokenizer", [ByteConfig(), CharConfig()])
@pytest.mark.parametrize("markers", [True, False])
def test_document_too_short_to_share(folder, tokenizer, markers):
    """Its part of one split is empty, and stays a document there."""
    (folder / "text" / "999.txt").write_text("a")
    make(folder, tokenizer, validation="position", validation_fraction=0.1, markers=markers)
    assert read(folder, "train")[1][-1] == "" and read(folder, "validation")[1][-1] == "a"


def test_same_call_again_reads_nothing(folder, monkeypatch):
    first = make(folder)
    monkeypatch.setattr(prepare, "_write", None)  # would raise
    before = {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}
    assert make(folder) == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()} == before


def test_same_text_elsewhere_is_the_same_set(folder):
    first = make(folder)
    (folder / "text").rename(folder / "moved")
    assert make(folder, text="moved") == first


def test_prepared_twice_is_equal_byte_for_byte(folder):
    make(folder)
    first = {path.name: path.read_bytes() for path in (folder / "data").iterdir()}
    (folder / "data").rename(folder / "before")
    make(folder)
    assert {path.name: path.read_bytes() for path in (folder / "data").iterdir()} == first


def test_other_text_is_refused(folder):
    make(folder)
    (folder / "other.txt").write_text("something else " * 100)
    with pytest.raises(UserError, match=f"{folder / 'data'} was prepared from .*other text"):
        make(folder, text="other.txt")


@pytest.mark.parametrize(
    "key, changes",
    [
        ("tokenizer", {"tokenizer": CharConfig()}),
        ("validation", {"validation": "position"}),
        ("validation_fraction", {"validation_fraction": 0.3}),
        ("markers", {"markers": False}),
    ],
)
def test_other_recipe_is_refused(folder, key, changes):
    make(folder)
    with pytest.raises(UserError, match=f"{folder / 'data'} was prepared with another {key} "):
        make(folder, **changes)


def test_recipe_has_what_decides_the_content():
    """A field added to DataConfig must be thought of: part of the recipe, or of no effect on shards."""
    recipe = prepare.recipe_of(DataConfig(), ByteConfig())
    without_effect = {"shards", "rows", "sequence_length"}
    compared_as_text = {"text", "text_key", "sources"}
    known = set(recipe) - {"tokenizer"} | without_effect | compared_as_text
    assert {f.name for f in dataclasses.fields(DataConfig)} == known


@pytest.mark.parametrize("where", ["add", "finish"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_stopped_in_the_middle_leaves_nothing(folder, monkeypatch, where, error):
    def stop(*args):
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(shards.SplitWriter, where, stop)
        make(folder)
    assert listing(folder) == ["text"]
    make(folder)
    assert sorted(read(folder, "train")[1] + read(folder, "validation")[1]) == sorted(TEXTS)


def test_killed_in_the_middle_leaves_what_the_next_call_clears(folder, monkeypatch):
    """A kill runs no ``finally``: here the clearing itself is taken away."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shards, "write_header", lambda *args: exit())
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        make(folder)
    leftover = [name for name in listing(folder) if name != "text"]
    assert len(leftover) == 1 and leftover[0].startswith(".data.")
    with pytest.raises(UserError, match=r"header\.json is missing"):
        TokenSource(folder / "data", "train")
    make(folder)
    assert listing(folder) == ["data", "text"]


def test_directory_with_other_files_is_refused(folder):
    make(folder)
    (folder / "data" / "header.json").unlink()
    message = f"header.json is missing: {folder / 'data'} holds something else"
    with pytest.raises(UserError, match=message):
        make(folder)


@pytest.mark.parametrize("fraction, split", [(0.0, "validation"), (1.0, "train")])
@pytest.mark.parametrize("validation", ["document", "position"])
def test_split_without_text_is_named(folder, validation, fraction, split):
    with pytest.raises(UserError, match=f"leaves no {split} text"):
        make(folder, validation=validation, validation_fraction=fraction)
    assert listing(folder) == ["text"]


def test_unwritable_place_is_named(folder):
    config = DataConfig(text=(str(folder / "text"),))
    below = folder / "text" / "000.txt" / "data"
    with pytest.raises(UserError, match=r"cannot write to .*000\.txt"):
        prepare.prepare(config, ByteConfig(), below, lambda line: None)


def test_a_full_disk_leaves_nothing_and_says_what_could_not_be_written(folder, full_disk):
    with (
        pytest.raises(UserError, match=r"cannot write .*\.tokens: .*; free some space"),
        full_disk(after=500),
    ):
        make(folder)
    assert listing(folder) == ["text"]
    make(folder)
    assert listing(folder) == ["data", "text"]


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_read_only_place_is_named(folder, monkeypatch, where):
    """The directory above refuses; or it turns read-only while the set is written."""
    if where == "beside":
        monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    else:
        monkeypatch.setattr(Path, "replace", refuses)
    with pytest.raises(UserError, match=f"cannot write .*{folder}") as raised:
        make(folder)
    assert "read-only" in str(raised.value).lower()
    assert listing(folder) == ["text"]


def refuses(*args):
    raise OSError(30, "Read-only file system")


def test_a_set_that_appears_meanwhile_is_not_overwritten(folder, monkeypatch):
    """Two that prepare the same set: the later one gives way, and says so."""
    write = prepare._write

    def another_is_faster(*args):
        write(*args)
        (folder / "data").mkdir()
        (folder / "data" / "theirs").touch()

    monkeypatch.setattr(prepare, "_write", another_is_faster)
    with pytest.raises(UserError, match=rf"cannot write {folder / 'data'}: Directory not empty; use another"):
        make(folder)
    assert listing(folder) == ["data", "text"] and listing(folder / "data") == ["theirs"]


def test_no_damage_goes_unnoticed_in_a_set_that_is_there(folder):
    make(folder)
    header = folder / "data" / "header.json"
    header.write_bytes(header.read_bytes().replace(b"markers", b"markerz"))
    with pytest.raises(UserError, match=r"header\.json is corrupt"):
        make(folder)


def test_a_tokenizer_of_another_set_is_noticed(tmp_path):
    for name, content in (("one", "to be or not"), ("two", "that is the question")):
        text = tmp_path / f"{name}.txt"
        text.write_text(content * 50)
        config = DataConfig(text=(str(text),), validation="position")
        prepare.prepare(config, tokenizers.CharConfig(), tmp_path / name, lambda _: None)
    assert prepare.load_tokenizer(tmp_path / "one").encode("to").tolist()
    (tmp_path / "one" / "tokenizer.json").write_bytes((tmp_path / "two" / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="is not the tokenizer"):
        prepare.load_tokenizer(tmp_path / "one")
