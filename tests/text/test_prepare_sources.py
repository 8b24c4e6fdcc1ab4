"""Shard sets of several sources, and evaluation sets beside them."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from prepared import TEXTS, listing, make, read

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.text import prepare, shards, tokenizers
from llm_jax.text.sources import DataConfig, SetConfig, SourceConfig
from llm_jax.text.tokenizers import ByteConfig, CharConfig

OTHER = [f"Anderer Text, Nummer {i}. " * (i % 5 + 2) for i in range(30)]
JUDGED = ["Document one more", "and a word"]


@pytest.fixture
def two(folder):
    """A second source beside the first, and an evaluation set."""
    lines = "".join(json.dumps({"body": text}) + "\n" for text in OTHER)
    (folder / "other.jsonl").write_text(lines)
    (folder / "judged.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"body": text}) + "\n" for text in JUDGED).encode())
    )
    return folder


def mix(two, names=("english", "german"), sets=("news",), text="text", **changes):
    places = {"english": text, "german": "other.jsonl", "french": "judged.jsonl.gz"}
    sources = tuple(SourceConfig(name, (str(two / places[name]),)) for name in names)
    changes = {"validation_fraction": 0.25, "text_key": "body", **changes}
    config = DataConfig(sources=sources, **changes)
    judged = [SetConfig(name, (str(two / "judged.jsonl.gz"),)) for name in sets]
    return prepare.prepare(config, CharConfig(), two / "data", lambda line: None, judged)


def test_every_source_has_its_own_splits(two):
    header = mix(two)
    splits = {f"{role}.{name}" for role in ("train", "validation") for name in ("english", "german")}
    assert set(header["splits"]) == splits | {"test.news"}
    for name, texts in (("english", TEXTS), ("german", OTHER)):
        train, validation = (read(two, f"{role}.{name}")[1] for role in ("train", "validation"))
        assert train == [text for text in texts if not prepare.held_out(text, 0.25)]
        assert validation == [text for text in texts if prepare.held_out(text, 0.25)]
    assert read(two, "test.news")[1] == JUDGED  # all of it
    assert header["splits"]["test.news"]["text_bytes"] == len("".join(JUDGED))


def test_one_tokenizer_learns_from_the_training_text_of_all(two):
    mix(two)
    held = prepare.held_out
    learnt = {c for text in TEXTS + OTHER if not held(text, 0.25) for c in text}
    assert set(tokenizers.load(two / "data" / "tokenizer.json").payload()) == learnt


def test_source_without_a_split_is_named(two):
    (two / "text" / "000.txt").rename(two / "one.txt")
    with pytest.raises(UserError, match=r"one\.txt leaves no (train|validation) text"):
        mix(two, text="one.txt")
    assert "data" not in listing(two)


def test_sets_named_later_are_added_and_change_nothing_else(two):
    before = mix(two, sets=())
    files = {path.name: path.read_bytes() for path in (two / "data").iterdir() if path.name != "header.json"}
    after = mix(two, sets=("news",))
    assert read(two, "test.news")[1] == JUDGED
    assert shards.content_id(before) == shards.content_id(after)  # a run stays what it is
    assert {name: (two / "data" / name).read_bytes() for name in files} == files
    mix(two, sets=("news", "more"))
    assert read(two, "test.more")[1] == JUDGED == read(two, "test.news")[1]
    whole = {path.name: path.read_bytes() for path in (two / "data").iterdir()}
    (two / "data").rename(two / "added")
    mix(two, sets=("news", "more"))
    assert {path.name: path.read_bytes() for path in (two / "data").iterdir()} == whole


def test_a_set_that_could_not_be_added_changes_nothing(two, full_disk, monkeypatch):
    """A full disk clears up behind itself; what a kill leaves is cleared by the next call."""
    mix(two, sets=())
    before = {path.name: path.read_bytes() for path in (two / "data").iterdir()}
    with (
        pytest.raises(UserError, match=r"cannot write .*test\.news\..*; free some space"),
        full_disk(after=1),
    ):
        mix(two, sets=("news",))
    assert {path.name: path.read_bytes() for path in (two / "data").iterdir()} == before
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "unlink", lambda *args: None)
        patch.setattr(Path, "replace", lambda *args: exit())
        mix(two, sets=("news",))
    assert len(storage.leftovers(two / "data")) > 0
    mix(two, sets=("news",))
    assert storage.leftovers(two / "data") == [] and read(two, "test.news")[1] == JUDGED


def test_set_of_the_same_name_with_other_text_is_refused(two):
    mix(two)
    (two / "judged.jsonl.gz").rename(two / "moved.jsonl.gz")
    (two / "judged.jsonl.gz").write_bytes(gzip.compress(b'{"body": "new"}\n'))
    mix(two)  # the same path is taken at its word
    config = DataConfig(sources=(), text=(str(two / "text"),), validation_fraction=0.25, text_key="body")
    sets = [SetConfig("news", (str(two / "moved.jsonl.gz"),))]
    prepare.prepare(config, CharConfig(), two / "plain", lambda _: None, sets)
    with pytest.raises(UserError, match=r"plain was prepared from .*moved\.jsonl\.gz, which is other text"):
        changed = [SetConfig("news", (str(two / "judged.jsonl.gz"),))]
        prepare.prepare(config, CharConfig(), two / "plain", lambda _: None, changed)


def test_shard_set_of_others_is_read_and_never_written(two):
    mix(two, sets=("news",))
    before = {path: path.stat().st_mtime_ns for path in (two / "data").iterdir()}
    shared = {"shards": str(two / "data")}
    assert mix(two, names=("german",), text="gone", **shared)  # some of its sources, wherever its text was
    with pytest.raises(UserError, match="has no evaluation set 'more'; add it with scripts/prepare_data"):
        mix(two, sets=("more",), **shared)
    with pytest.raises(UserError, match="has no source 'french' but english, german; name these"):
        mix(two, names=("french",), **shared)
    with pytest.raises(UserError, match="has no source 'text' but english, german"):
        make(two, CharConfig(), **shared)
    assert {path: path.stat().st_mtime_ns for path in (two / "data").iterdir()} == before


def test_shards_that_are_not_there_are_not_made(two):
    with pytest.raises(UserError, match="shards=nowhere is not a shard set"):
        make(two, shards="nowhere")
    assert "data" not in listing(two)


def test_another_text_key_is_other_text(folder):
    lines = [{"text": f"a{i} " * 9, "body": f"b{i} " * 9, "same": f"a{i} " * 9} for i in range(20)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = make(folder, text="a.jsonl")
    with pytest.raises(UserError, match="other text than"):
        make(folder, text="a.jsonl", text_key="body")
    assert make(folder, text="a.jsonl", text_key="same") == first


def test_a_set_made_before_sources_were_is_read(folder):
    """Format 1 had one source; its tokens, and so the runs that began on it, are the same."""
    header = make(folder)
    old = {key: value for key, value in header.items() if key not in ("sources", "sets", "format")}
    old |= {"text": header["sources"]["text"]["text"], "corpus": header["sources"]["text"]["corpus"]}
    storage.write_sealed(folder / "data" / "header.json", {"format": 1, **old})
    (folder / "text").rename(folder / "moved")
    again = make(folder, text="moved")  # compares the text, which has another path
    assert shards.content_id(again) == shards.content_id(header) == shards.content_id(old)
    assert again["splits"] == header["splits"] and again["sources"] == header["sources"]
    with pytest.raises(UserError, match="other text"):
        (folder / "moved" / "000.txt").write_text("changed")
        (folder / "moved").rename(folder / "edited")
        make(folder, text="edited")


def test_text_that_changes_while_it_is_read_is_noticed(folder, monkeypatch):
    train = ByteConfig.train

    def edits(self, texts):
        (folder / "text" / "000.txt").write_text("edited meanwhile")
        return train(self, texts)

    monkeypatch.setattr(ByteConfig, "train", edits)
    with pytest.raises(UserError, match="has changed while it was read"):
        make(folder)
    assert listing(folder) == ["text"]


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [ByteConfig(), CharConfig()])
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer):
    """8 MB of lines, never held at once."""
    line = json.dumps({"text": "All happy families are alike. " * 70}) + "\n"
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(line.replace("All", f"All {i}") for i in range(4000))
    config = DataConfig(text=(str(tmp_path / "a.jsonl"),))
    tracemalloc.start()
    prepare.prepare(config, tokenizer, tmp_path / "data", lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
