"""Random access to the token stream of one split of a shard set."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.text import shards


class TokenSource:
    """Memory-mapped tokens and document ends. Each block is checked when first touched.

    tokens: length of the stream; ends: int64 [documents], exclusive. Raises UserError, naming the
    file, for one that is missing, cut short or changed.
    """

    def __init__(self, directory: Path, split: str) -> None:
        header = shards.read_header(directory)
        entry = header["splits"][split]
        self._directory, self._entry = directory, entry
        self._dtype = np.dtype(entry["dtype"])
        self.tokens: int = entry["tokens"]
        self.text_bytes: int = entry["text_bytes"]
        self.vocab_size: int = header["vocab_size"]
        self.content_id: str = shards.content_id(header)
        self.ends = self._small("ends", "<i8")
        crcs = self._small("crc", "<u4")
        self._maps: list[np.ndarray] = []
        self._crcs: list[np.ndarray] = []
        self._checked: list[np.ndarray] = []
        for file in entry["files"]:
            tokens = self._map(file)
            count = -(-tokens.nbytes // shards.BLOCK_BYTES)
            self._maps.append(tokens)
            self._crcs.append(crcs[:count])
            self._checked.append(np.zeros(count, bool))
            crcs = crcs[count:]
        self._starts = np.cumsum([0, *(len(tokens) for tokens in self._maps)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 tokens [start, stop) of the stream."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for i in range(first, len(self._maps)):
            a, b = max(start - self._starts[i], 0), stop - self._starts[i]
            if b <= 0:
                break
            parts.append(self._read_file(i, int(a), int(min(b, len(self._maps[i])))))
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.int32)])

    def check_all(self) -> None:
        """Reads every block, as ``read`` does at first touch."""
        for i, tokens in enumerate(self._maps):
            self._check(i, 0, len(tokens))

    def _read_file(self, i: int, start: int, stop: int) -> np.ndarray:
        self._check(i, start, stop)
        return self._maps[i][start:stop].astype(np.int32)

    def _check(self, i: int, start: int, stop: int) -> None:
        size = shards.BLOCK_BYTES // self._dtype.itemsize
        for block in range(start // size, -(-stop // size)):
            if self._checked[i][block]:
                continue
            data = self._maps[i][block * size : (block + 1) * size]
            if zlib.crc32(data.tobytes()) != self._crcs[i][block]:
                path = self._directory / self._entry["files"][i]["file"]
                raise UserError(
                    f"{path} is corrupt in bytes {block * shards.BLOCK_BYTES:,} to "
                    f"{block * shards.BLOCK_BYTES + data.nbytes:,}; delete {self._directory} to "
                    "prepare it again"
                )
            self._checked[i][block] = True

    def _small(self, kind: str, dtype: str) -> np.ndarray:
        path = self._directory / self._entry[kind]["file"]
        if not path.exists():
            raise UserError(f"{path} is missing; delete {self._directory} to prepare it again")
        if storage.content_hash(path) != self._entry[kind]["sha256"]:
            raise UserError(f"{path} is corrupt; delete {self._directory} to prepare it again")
        return np.fromfile(path, dtype)

    def _map(self, file: dict[str, Any]) -> np.ndarray:
        path = self._directory / file["file"]
        expected = file["tokens"] * self._dtype.itemsize
        size = path.stat().st_size if path.exists() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size:,} bytes, not {expected:,}"
            raise UserError(f"{path} {found}; delete {self._directory} to prepare it again")
        if expected == 0:
            return np.empty(0, self._dtype)
        return np.memmap(path, self._dtype, mode="r")
