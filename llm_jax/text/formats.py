"""From a file to its documents: plain text is one, JSON lines hold one a line; either may be compressed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from llm_jax.errors import UserError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
JSON_LINES = ".jsonl"


class Document(NamedTuple):
    """name: the file, and the line in a .jsonl."""

    name: str
    text: str


def documents(path: Path, text_key: str) -> Iterator[Document]:
    """The documents of a file, by its ending: .jsonl is one a line, its text under ``text_key``; any
    other file is one document. Behind it .gz, .bz2 or .xz.

    A text file is in memory as a whole, a .jsonl line by line. Raises UserError, naming the file and
    the line, for what cannot be read, is damaged, empty, not UTF-8 or not an object with that key.
    """
    compression = path.suffix if path.suffix in OPENERS else ""
    with _reading(path, compression) as file:
        if path.name.removesuffix(compression).endswith(JSON_LINES):
            yield from _json_lines(path, file, text_key)
        else:
            yield _whole(path, file)


@contextmanager
def _reading(path: Path, compression: str) -> Iterator[IO[bytes]]:
    try:
        with OPENERS.get(compression, open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _broken(path, compression, error) from None
    except OSError as error:
        if compression and error.errno is None:  # gzip and bz2 say so when the content is wrong
            raise _broken(path, compression, error) from None
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _broken(path: Path, compression: str, error: Exception) -> UserError:
    return UserError(f"{path} is not a whole {compression[1:]} file ({error}); copy it again or leave it out")


def _whole(path: Path, file: IO[bytes]) -> Document:
    text = _decode(file.read(), str(path))
    if not text:
        raise UserError(f"{path} is empty; leave it out or give it text")
    # As Python reads text: one kind of line end.
    return Document(str(path), text.replace("\r\n", "\n").replace("\r", "\n"))


def _json_lines(path: Path, file: IO[bytes], key: str) -> Iterator[Document]:
    number = 0
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        if line.isspace():
            raise UserError(f"{where} is empty; leave it out")
        yield Document(f"{path}:{number}", _text_of(line, where, key))
    if not number:
        raise UserError(f"{path} is empty; leave it out or give it text")


def _text_of(line: bytes, where: str, key: str) -> str:
    """The text of one line of JSON."""
    try:
        value = json.loads(_decode(line, where))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); a .jsonl file has one object a line") from None
    if not isinstance(value, dict):
        raise UserError(f'{where} is not an object; a .jsonl file has one a line, {{"{key}": "..."}}')
    if key not in value:
        listed = ", ".join(map(repr, value)) or "none"
        raise UserError(f"{where} has no key {key!r} (its keys: {listed}); set --config.data.text_key")
    text = value[key]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {key!r} is {type(text).__name__}, not a string; set --config.data.text_key"
        )
    if not text:
        raise UserError(f"{where}: {key!r} is empty; leave the line out")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape what UTF-8 cannot hold
        raise UserError(f"{where}: {key!r} has half of a surrogate pair; mend it or leave it out") from None
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); "
            f"convert it, e.g. iconv -f latin1 -t utf-8"
        ) from None
