"""Files to documents: every ending reads the same text, and every kind of bad file is named."""

import bz2
import gzip
import json
import lzma

import pytest

from llm_jax.errors import UserError
from llm_jax.text import corpora, formats

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}
TEXTS = [
    "one\nline and another",
    "naïve \u2028 separators are not line ends",
    '"quoted"\t\\',
    "\U0001f600",
    "x",
]


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def read(path, key="text"):
    return list(formats.documents(path, key))


@pytest.mark.parametrize("ending", PACK)
def test_text_is_one_document(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending]("naïve\r\nlines\rand\nmore".encode()))
    assert read(path) == [(str(path), "naïve\nlines\nand\nmore")]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("last_end", ["\n", ""])
def test_json_lines_are_a_document_each(tmp_path, ending, last_end):
    path = tmp_path / f"a.jsonl{ending}"
    data = lines(*({"id": i, "text": text} for i, text in enumerate(TEXTS)))
    path.write_bytes(PACK[ending](data.removesuffix(b"\n") + last_end.encode()))
    assert read(path) == [(f"{path}:{i}", text) for i, text in enumerate(TEXTS, 1)]


def test_text_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "no", "body": "yes"}))
    assert [d.text for d in read(path, "body")] == ["yes"]


def test_files_directories_and_globs(tmp_path):
    """All formats side by side, in the order of their names."""
    contents = {"a.txt": b"1", "b.jsonl": lines({"text": "2"}, {"text": "3"}), "sub/c.md": b"4"}
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"5"))
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(lines({"text": "6"})))

    def texts(*sources):
        return "".join(d.text for d in corpora.read(sources))

    assert texts(str(tmp_path)) == "123546"
    assert texts(str(tmp_path / "*.jsonl"), str(tmp_path / "**" / "*.gz")) == "236"
    assert texts(str(tmp_path / "b.txt.xz")) == "5"


def test_json_lines_are_read_one_at_a_time(tmp_path):
    """What comes before a bad line is given before it is found."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "good"}) + b"bad\n")
    documents = formats.documents(path, "text")
    assert next(documents).text == "good"
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is not JSON"):
        next(documents)


BAD_LINES = {
    b'{"text": "a"': "is not JSON",
    b"[" * 100_000: "is not JSON",
    b'["text"]': "is not an object",
    b'"text"': "is not an object",
    b"null": "is not an object",
    b'{"body": "a", "id": 1}': r"has no key 'text' \(its keys: 'body', 'id'\); set --config.data.text_key",
    b"{}": r"has no key 'text' \(its keys: none\)",
    b'{"text": 5}': "'text' is int, not a string",
    b'{"text": null}': "'text' is NoneType, not a string",
    b'{"text": ""}': "'text' is empty",
    b"": "is empty",
    b'{"text": "\\ud800"}': "'text' has half of a surrogate pair",
    b'{"text": "\xff"}': r"is not UTF-8 \(byte 0xff at offset 10\)",
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_is_named(tmp_path, line, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACK[ending](lines({"text": "good"}) + line + b"\n" + lines({"text": "good"})))
    with pytest.raises(UserError, match=rf"a\.jsonl{ending}, line 2:? {BAD_LINES[line]}"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.bz2", "a.txt.xz"])
def test_nothing_inside_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PACK["" if path.suffix in (".txt", ".jsonl") else path.suffix](b""))
    with pytest.raises(UserError, match=f"{name} is empty"):
        read(path)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("inside", ["txt", "jsonl"])
def test_every_damage_to_an_archive_is_named(tmp_path, ending, inside):
    """Cut at any byte, or a bit flipped: another text is never given out in silence."""
    path = tmp_path / f"a.{inside}{ending}"
    good = PACK[ending](lines(*({"text": text * 3} for text in TEXTS)))
    path.write_bytes(good)
    wanted = read(path)
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match=f"{ending} (is not a whole {ending[1:]} file|is empty)"):
            read(path)
    noticed = 0
    for byte in range(len(good)):
        path.write_bytes(good[:byte] + bytes([good[byte] ^ 16]) + good[byte + 1 :])
        try:
            assert read(path) == wanted, byte  # a byte that holds nothing, like gzip's time stamp
        except UserError as error:
            assert str(path) in str(error)
            noticed += 1
    assert noticed > len(good) - 20


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_text_with_the_ending_of_an_archive_is_named(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_text("not compressed at all")
    with pytest.raises(UserError, match=f"a.txt{ending} is not a whole {ending[1:]} file"):
        read(path)


@pytest.mark.parametrize("ending", PACK)
def test_text_that_is_not_utf8_is_named(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending]("naïve".encode("latin-1")))
    with pytest.raises(UserError, match=rf"a\.txt{ending} is not UTF-8 \(byte 0xef at offset 2\)"):
        read(path)


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.txt\.gz: No such file"):
        read(tmp_path / "gone.txt.gz")
