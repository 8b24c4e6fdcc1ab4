"""Random access to the token stream of one split of a shard set."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        self._files = [open_file() for open_file in _token_files(directory, entry)]
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

    The token files of a split whose checksums are damaged cannot be judged, and are not. Raises UserError
    when the header is damaged, which says what else there is.
    """
    header, found = shards.read_header(directory), []
    with _noted(found):
        load_tokenizer(directory)
    for entry in header["splits"].values():
        with _noted(found):
            _small(directory, entry["ends"], "<i8")
        with _noted(found):
            for open_file in _token_files(directory, entry):
                with _noted(found):
                    file = open_file()
                    file.check(0, file.tokens)
    return found


@contextmanager
def _noted(found: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        found.append(str(error))


def _token_files(directory: Path, entry: dict[str, Any]) -> Iterator[Callable[[], _TokenFile]]:
    """Each token file of a split, to be opened with its part of the checksums."""
    crcs, dtype = _small(directory, entry["crc"], "<u4"), np.dtype(entry["dtype"])
    for file in entry["files"]:
        blocks = -(-file["tokens"] * dtype.itemsize // shards.BLOCK_BYTES)
        yield partial(_TokenFile, directory / file["file"], file["tokens"], dtype, crcs[:blocks])
        crcs = crcs[blocks:]


class _TokenFile:
    """One file of tokens with its checksums."""

    def __init__(self, path: Path, tokens: int, dtype: np.dtype, crcs: np.ndarray) -> None:
        self._path, self.tokens, self._dtype = path, tokens, dtype
        self._size, self._crcs = tokens * dtype.itemsize, crcs
        self._checked = np.zeros(len(crcs), bool)
        try:
            self._ranges = storage.open_ranges(path)
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror or error})") from error
        if self._ranges.size != self._size:
            raise _damaged(path, f"has {self._ranges.size:,} bytes, not {self._size:,}")

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
            data = self._ranges.read(begin, end)
        except OSError as error:
            raise _damaged(self._path, f"cannot be read ({error.strerror or error})") from error
        if len(data) != end - begin:
            raise _damaged(self._path, f"was cut short before byte {end:,}")
        return data


def _small(directory: Path, entry: dict[str, Any], dtype: str) -> np.ndarray:
    """A small file, read once: what is hashed is what is used."""
    path = directory / entry["file"]
    data = storage.read_bytes(path, shards.again(directory))
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _damaged(path, "is corrupt")
    return np.frombuffer(data, dtype)


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} {how}; {shards.again(path.parent)}")
