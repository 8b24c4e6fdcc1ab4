"""Token shards: flat files of ids, an index of documents, checksums of blocks, a sealed header.

A shard set is a directory: ``header.json`` (sealed), ``tokenizer.json`` (sealed) and, for each split,
``SPLIT.00000.tokens ...`` (little-endian ids, uint16 while the vocabulary fits, else uint32),
``SPLIT.ends`` (int64 end of each document in the split's token stream) and ``SPLIT.crc`` (uint32, the
CRC-32 of each block of each token file). The header holds the sizes of all and the hashes of the
small ones, so that every byte is covered by some check.

Every source of a mixture has two splits, ``train.NAME`` and ``validation.NAME``, which are ``train`` and
``validation`` where the config names no sources; a named evaluation set has one, ``test.NAME``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError

BLOCK_BYTES = 1 << 18
FILE_TOKENS = 1 << 28
HEADER = "header.json"
FORMAT = 2
ONE_SOURCE = "text"  # the name of the only source where a config names none
TRAIN, VALIDATION, TEST = "train", "validation", "test"


def split_name(role: str, name: str) -> str:
    """The split of a source or, with the role TEST, of an evaluation set."""
    return role if name == ONE_SOURCE and role != TEST else f"{role}.{name}"


class SplitWriter:
    """Writes one split of a shard set, document by document; holds a block and a document in memory.

    A context: a token file appears when it is whole, and one that an exception leaves unfinished is removed.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int) -> None:
        self._directory, self._split = directory, split
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._ends: list[int] = []
        self._crcs: list[int] = []
        self._files: list[dict[str, Any]] = []
        self._tokens = self._bytes = 0
        self._open()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends a document; text_bytes: its length in UTF-8, for bits per byte."""
        self._tokens += len(ids)
        self._bytes += text_bytes
        self._ends.append(self._tokens)
        ids = ids.astype(self._dtype)
        while len(ids):
            if self._room == 0:
                self._close()
                self._open()
            head, ids = ids[: self._room], ids[self._room :]
            self._room -= len(head)
            self._waiting += head.tobytes()
            if len(self._waiting) >= BLOCK_BYTES:
                self._write(len(self._waiting) // BLOCK_BYTES * BLOCK_BYTES)

    def finish(self) -> dict[str, Any]:
        """Writes what is left and gives the split's entry of the header."""
        self._close()
        small = {}
        for kind, dtype, values in (("ends", "<i8", self._ends), ("crc", "<u4", self._crcs)):
            path = self._directory / f"{self._split}.{kind}"
            with storage.publish(path) as file:
                file.write(np.array(values, dtype).tobytes())
            small[kind] = {"file": path.name, "sha256": storage.content_hash(path)}
        counts = {"tokens": self._tokens, "documents": len(self._ends), "text_bytes": self._bytes}
        return {**counts, "dtype": self._dtype.str, "files": self._files, **small}

    def _open(self) -> None:
        self._path = self._directory / f"{self._split}.{len(self._files):05d}.tokens"
        self._stack = ExitStack()
        self._file: IO[bytes] = self._stack.enter_context(storage.publish(self._path))
        self._waiting, self._room = bytearray(), FILE_TOKENS

    def _write(self, stop: int) -> None:
        """The first ``stop`` of the waiting bytes: whole blocks, or all at the end of a file."""
        data = bytes(self._waiting[:stop])
        del self._waiting[:stop]
        self._crcs += [zlib.crc32(block) for block in blocks(data)]
        try:
            self._file.write(data)
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free some space or use another place"
            ) from error

    def _close(self) -> None:
        self._write(len(self._waiting))
        self._stack.close()
        self._files.append({"file": self._path.name, "tokens": FILE_TOKENS - self._room})


def blocks(data: bytes | memoryview) -> Iterable[bytes | memoryview]:
    """The blocks of a token file, each with its own checksum."""
    return (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def write_header(directory: Path, content: dict[str, Any]) -> None:
    """Seals a shard set; a directory without a header is not one."""
    storage.write_sealed(directory / HEADER, {**content, "format": FORMAT})


def read_header(directory: Path) -> dict[str, Any]:
    """The header. Raises UserError when it is missing, corrupt or of another format."""
    header = storage.read_sealed(directory / HEADER, again(directory))
    if header.get("format") not in (1, FORMAT):
        raise UserError(f"{directory} has shard format {header.get('format')}, not {FORMAT}; prepare again")
    if header["format"] == 1:  # one source, no evaluation sets, the same files
        origin = {"text": header.pop("text"), "text_key": "text", "corpus": header.pop("corpus")}
        header |= {"sources": {ONE_SOURCE: origin}, "sets": {}}
    return header


def again(directory: Path) -> str:
    """The mend of a damaged shard set."""
    return f"delete {directory} to prepare it again"


def content_id(header: dict[str, Any]) -> str:
    """A hash of every token, document boundary and of the tokenizer, from the header alone.

    Evaluation sets do not count: a run stays what it is when it is judged on more.
    """
    parts = [header["tokenizer"]]
    for name in sorted(header["splits"]):
        if name.startswith(f"{TEST}."):
            continue
        split = header["splits"][name]
        parts += [name, str(split["tokens"]), split["ends"]["sha256"], split["crc"]["sha256"]]
    return storage.text_hash("\n".join(parts))
