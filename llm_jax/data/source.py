"""Random access to the token stream of one split of a shard set."""

from __future__ import annotations

import os
import weakref
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.text import shards
from llm_jax.text.prepare import load_tokenizer


class TokenSource:
    """The tokens and document ends of a split. Each block is checked when first touched.

    tokens: length of the stream; ends: int64 [documents], exclusive. Raises UserError for a split that
    the set does not have and, naming the file, for one that is missing, cut short or changed.
    """

    def __init__(self, directory: Path, split: str) -> None:
        header = shards.read_header(directory)
        if split not in header["splits"]:
            raise UserError(f"{directory} has no split {split!r} but {', '.join(header['splits'])}")
        entry = header["splits"][split]
        self.tokens: int = entry["tokens"]
        self.text_bytes: int = entry["text_bytes"]
        self.ends = _small(directory, entry["ends"], "<i8")
        crcs, dtype = _small(directory, entry["crc"], "<u4"), np.dtype(entry["dtype"])
        self._files: list[_TokenFile] = []
        for file in entry["files"]:
            opened = _TokenFile(directory / file["file"], file["tokens"], dtype, crcs)
            crcs = crcs[opened.blocks :]
            self._files.append(opened)
        self._starts = np.cumsum([0, *(file.tokens for file in self._files)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 tokens [start, stop) of the stream."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for file, begin in zip(self._files[first:], self._starts[first:], strict=False):
            if stop <= begin:
                break
            parts.append(file.read(max(start - int(begin), 0), min(stop - int(begin), file.tokens)))
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.int32)])

    def check_all(self) -> None:
        """Checks every block, as ``read`` does at first touch."""
        for file in self._files:
            file.check(0, file.tokens)


def damage(directory: Path) -> list[str]:
    """What is wrong with a shard set, of which every byte is read: a line for each file found damaged.

    Raises UserError when its header is, which says what else there is.
    """
    header = shards.read_header(directory)
    checks = [partial(load_tokenizer, directory)]
    checks += [partial(_read_all, directory, split) for split in header["splits"]]
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def _read_all(directory: Path, split: str) -> None:
    TokenSource(directory, split).check_all()


class _TokenFile:
    """One file of tokens with its checksums.

    Read by pread, not through a memory map: a file that is cut short or a disk that fails while a run
    reads it gives an error with a name, where a map would end the process with a bus error.
    """

    def __init__(self, path: Path, tokens: int, dtype: np.dtype, crcs: np.ndarray) -> None:
        self._path, self.tokens, self._dtype = path, tokens, dtype
        self._size = tokens * dtype.itemsize
        self.blocks = -(-self._size // shards.BLOCK_BYTES)
        self._crcs = crcs[: self.blocks]
        self._checked = np.zeros(self.blocks, bool)
        if not path.exists():
            raise _damaged(path, "is missing")
        size = path.stat().st_size
        if size != self._size:
            raise _damaged(path, f"has {size:,} bytes, not {self._size:,}")
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 tokens [start, stop) of the file."""
        self.check(start, stop)
        data = self._bytes(start * self._dtype.itemsize, stop * self._dtype.itemsize)
        return np.frombuffer(data, self._dtype).astype(np.int32)

    def check(self, start: int, stop: int) -> None:
        """Raises UserError when a block that holds one of these tokens has another checksum."""
        first = start * self._dtype.itemsize // shards.BLOCK_BYTES
        last = -(-stop * self._dtype.itemsize // shards.BLOCK_BYTES)
        for block in range(first, last):
            if self._checked[block]:
                continue
            begin = block * shards.BLOCK_BYTES
            end = min(begin + shards.BLOCK_BYTES, self._size)
            if zlib.crc32(self._bytes(begin, end)) != self._crcs[block]:
                raise _damaged(self._path, f"is corrupt in bytes {begin:,} to {end:,}")
            self._checked[block] = True

    def _bytes(self, begin: int, end: int) -> bytes:
        try:
            data = os.pread(self._descriptor, end - begin, begin)
        except OSError as error:
            raise _damaged(self._path, f"cannot be read ({error.strerror})") from error
        if len(data) != end - begin:
            raise _damaged(self._path, f"was cut short before byte {end:,}")
        return data


def _small(directory: Path, entry: dict[str, Any], dtype: str) -> np.ndarray:
    path = directory / entry["file"]
    if not path.exists():
        raise _damaged(path, "is missing")
    if storage.content_hash(path) != entry["sha256"]:
        raise _damaged(path, "is corrupt")
    return np.fromfile(path, dtype)


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} {how}; delete {path.parent} to prepare it again")
