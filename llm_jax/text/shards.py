"""Token shards: flat files of ids, an index of documents, checksums of blocks, a sealed header.

A shard set is a directory: ``header.json`` (sealed), ``tokenizer.json`` (sealed) and, for each split,
``SPLIT.00000.tokens ...`` (little-endian ids, uint16 while the vocabulary fits, else uint32),
``SPLIT.ends`` (int64 end of each document in the split's token stream) and ``SPLIT.crc`` (uint32, the
CRC-32 of each block of each token file). The header holds the sizes of all and the hashes of the
small ones, so that every byte is covered by some check.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError

BLOCK_BYTES = 1 << 18
FILE_TOKENS = 1 << 28
HEADER = "header.json"
FORMAT = 1


class SplitWriter:
    """Writes one split of a shard set, document by document."""

    def __init__(self, directory: Path, split: str, vocab_size: int) -> None:
        self._directory, self._split = directory, split
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._ends: list[int] = []
        self._crcs: list[int] = []
        self._files: list[dict[str, Any]] = []
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = self._tokens = self._bytes = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends a document; text_bytes: its length in UTF-8, for bits per byte."""
        self._waiting.append(ids.astype(self._dtype))
        self._waiting_tokens += len(ids)
        self._tokens += len(ids)
        self._bytes += text_bytes
        self._ends.append(self._tokens)
        while self._waiting_tokens >= FILE_TOKENS:
            self._write_file()

    def finish(self) -> dict[str, Any]:
        """Writes what is left and gives the split's entry of the header."""
        if self._waiting_tokens or not self._files:
            self._write_file()
        small = {}
        for kind, dtype, values in (("ends", "<i8", self._ends), ("crc", "<u4", self._crcs)):
            path = self._directory / f"{self._split}.{kind}"
            with storage.publish(path) as file:
                file.write(np.array(values, dtype).tobytes())
            small[kind] = {"file": path.name, "sha256": storage.content_hash(path)}
        counts = {"tokens": self._tokens, "documents": len(self._ends), "text_bytes": self._bytes}
        return {**counts, "dtype": self._dtype.str, "files": self._files, **small}

    def _write_file(self) -> None:
        stream = np.concatenate([*self._waiting, np.empty(0, self._dtype)])
        head, tail = stream[:FILE_TOKENS], stream[FILE_TOKENS:]
        self._waiting, self._waiting_tokens = [tail], len(tail)
        data = head.tobytes()
        path = self._directory / f"{self._split}.{len(self._files):05d}.tokens"
        with storage.publish(path) as file:
            file.write(data)
        self._crcs += [zlib.crc32(block) for block in blocks(data)]
        self._files.append({"file": path.name, "tokens": len(head)})


def blocks(data: bytes | memoryview) -> Iterable[bytes | memoryview]:
    """The blocks of a token file, each with its own checksum."""
    return (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def write_header(directory: Path, content: dict[str, Any]) -> None:
    """Seals a shard set; a directory without a header is not one."""
    storage.write_sealed(directory / HEADER, {"format": FORMAT, **content})


def read_header(directory: Path) -> dict[str, Any]:
    """The header. Raises UserError when it is missing, corrupt or of another format."""
    header = storage.read_sealed(directory / HEADER)
    if header["format"] != FORMAT:
        raise UserError(f"{directory} has shard format {header['format']}, not {FORMAT}; prepare again")
    return header


def content_id(header: dict[str, Any]) -> str:
    """A hash of every token, document boundary and of the tokenizer, from the header alone."""
    parts = [header["tokenizer"]]
    for name in sorted(header["splits"]):
        split = header["splits"][name]
        parts += [name, str(split["tokens"]), split["ends"]["sha256"], split["crc"]["sha256"]]
    return storage.text_hash("\n".join(parts))
