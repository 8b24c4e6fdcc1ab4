"""A bucket: objects that are put whole, read by name, and listed, perhaps late.

Nothing can be renamed, appended to or locked there. So a directory counts by a marker, an object put last and
asked for by name; a log is a row of objects; and what a listing may not show yet is noted in an object.
Google says that its buckets list at once what was put. Only ``files`` relies on it, and so how many files of
a checkpoint are hashed, and orbax, which asks whether what it wrote is listed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import fsspec
from etils import epath

from llm_jax.errors import UserError
from llm_jax.storage import disk

SCHEME = "gs"
NAMES = "names.json"
RANGE_BYTES = 1 << 18  # one request; what it takes to answer is as long for a few bytes
RANGES_KEPT = 256  # of each open file: 64 MiB
CHUNK_BYTES = 1 << 20  # of an upload
PIECE_BYTES = 1 << 22  # of a log: it is put anew as it grows
PIECE_SECONDS = 30.0  # between two puts of a log that nothing asks to be sure of

# Listings kept by the client are never renewed: what another process writes would not be seen.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _system() -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(SCHEME)


@contextmanager
def _as_oserror() -> Iterator[None]:
    """What gcsfs raises once it has given up trying is an OSError, too."""
    try:
        yield
    except _http_errors() as error:
        raise OSError(str(error)) from error


def _http_errors() -> tuple[type[Exception], ...]:
    client = sys.modules.get("gcsfs.retry")
    return (client.HttpError,) if client else ()


# ---- files --------------------------------------------------------------------------------------


@disk.publish.register(epath.Path)
@contextmanager
def publish(path: epath.Path) -> Iterator[IO[bytes]]:
    """Written to the disk first: an upload that is given up would leave an object cut short."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            _put(path, file)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {disk.reason(error)}; see that the bucket is there and may be written to"
        ) from error


def _put(path: epath.Path, file: IO[bytes]) -> None:
    _check_claims(path)
    with _as_oserror(), path.open("wb") as target:
        shutil.copyfileobj(file, target, CHUNK_BYTES)


@disk.leftovers.register(epath.Path)
def leftovers(directory: epath.Path, name: str = "*") -> list[Path]:
    """A put that is killed leaves nothing."""
    return []


@disk.size.register(epath.Path)
def size(path: epath.Path) -> int:
    return path.stat().length


class BucketRanges:
    """An object, fetched by the block; some blocks are kept."""

    def __init__(self, path: epath.Path) -> None:
        self._name, self._system = str(path), _system()
        with _as_oserror():
            self.size: int = self._system.info(self._name)["size"]
        self._block = lru_cache(RANGES_KEPT)(self._fetch)

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end), fewer where the object has fewer."""
        end = min(end, self.size)
        first = begin // RANGE_BYTES
        blocks = b"".join(self._block(i) for i in range(first, -(-end // RANGE_BYTES)))
        return blocks[begin - first * RANGE_BYTES : end - first * RANGE_BYTES]

    def _fetch(self, block: int) -> bytes:
        begin = block * RANGE_BYTES
        with _as_oserror():
            return self._system.cat_file(self._name, begin, min(begin + RANGE_BYTES, self.size))


@disk.open_ranges.register(epath.Path)
def open_ranges(path: epath.Path) -> BucketRanges:
    return BucketRanges(path)


class BucketLog:
    """``NAME``, ``NAME.001``, ``NAME.002`` ...: the last one is put anew until it is large. A killed process
    has lost what it wrote in the last PIECE_SECONDS, and never what came before a ``sync``."""

    def __init__(self, path: epath.Path) -> None:
        self._path, self._number, self._lines = path, 0, bytearray()
        self.sync()

    def write(self, line: str) -> None:
        self._lines += line.encode()
        if time.monotonic() > self._put_at + PIECE_SECONDS or len(self._lines) >= PIECE_BYTES:
            self.sync()

    def sync(self) -> None:
        with publish(_piece(self._path, self._number)) as file:
            file.write(self._lines)
        self._put_at = time.monotonic()
        if len(self._lines) >= PIECE_BYTES:
            self._number, self._lines = self._number + 1, bytearray()

    def close(self) -> None:
        self.sync()


@disk.open_log.register(epath.Path)
def open_log(path: epath.Path) -> BucketLog:
    return BucketLog(path)


@disk.read_log.register(epath.Path)
def read_log(path: epath.Path) -> str:
    data = path.read_bytes()
    with suppress(FileNotFoundError):  # the first name that is not there
        number = 1
        while True:
            data += _piece(path, number).read_bytes()
            number += 1
    return data.decode()


def _piece(path: epath.Path, number: int) -> epath.Path:
    return path.with_name(f"{path.name}.{number:03d}") if number else path


# ---- directories --------------------------------------------------------------------------------


@disk.resolved.register(epath.Path)
def resolved(path: epath.Path) -> Path:
    return path


@disk.make_directory.register(epath.Path)
def make_directory(path: epath.Path) -> None:
    """A bucket has none: the names of objects say where they are."""


@disk.files.register(epath.Path)
def files(directory: epath.Path) -> list[Path]:
    with _as_oserror():
        return sorted(epath.Path(f"{SCHEME}://{name}") for name in _system().find(str(directory)))


@disk.remove_tree.register(epath.Path)
def remove_tree(directory: epath.Path) -> None:
    for path in files(directory):
        path.unlink(missing_ok=True)


@disk.publish_directory.register(epath.Path)
@contextmanager
def publish_directory(directory: epath.Path, marker: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        _upload(Path(local), directory, marker)


@disk.occupied.register(epath.Path)
def occupied(directory: epath.Path) -> bool:
    """What an upload left that was killed lacks the marker, and is written over."""
    return False


@disk.written_locally.register(epath.Path)
@contextmanager
def written_locally(directory: epath.Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as local:
        yield Path(local)
        _upload(Path(local), directory)


def _upload(local: Path, directory: epath.Path, marker: str = "") -> None:
    """All files; the marker last."""
    for path in sorted(disk.files(local), key=lambda path: path.name == marker):
        with path.open("rb") as file, publish(directory / path.relative_to(local).as_posix()) as target:
            shutil.copyfileobj(file, target, CHUNK_BYTES)


@disk.duplicate.register(epath.Path)
def duplicate(directory: epath.Path, target: epath.Path, marker: str) -> None:
    """Copied inside the bucket; the marker last."""
    for path in sorted(files(directory), key=lambda path: path == directory / marker):
        with _as_oserror():
            _system().cp_file(str(path), str(target / path.relative_to(directory).as_posix()))


@disk.set_aside.register(epath.Path)
def set_aside(directory: epath.Path, target: epath.Path, marker: str) -> None:
    """Copied, then removed, the marker first."""
    remove_tree(target)
    duplicate(directory, target, marker)
    (directory / marker).unlink()
    remove_tree(directory)


@disk.remember.register(epath.Path)
def remember(directory: epath.Path, names: Iterable[str]) -> None:
    with publish(directory / NAMES) as file:
        file.write(json.dumps(sorted(names)).encode())


@disk.remembered.register(epath.Path)
def remembered(directory: epath.Path) -> list[str]:
    try:
        return json.loads((directory / NAMES).read_text())
    except FileNotFoundError:
        return []


# ---- who writes ---------------------------------------------------------------------------------

_claims: dict[epath.Path, str] = {}


class Claim:
    """In place of a lock: the last one to claim a directory may write there, all others learn it when they
    put their next object. None is waited for, so that a process which was killed is in nobody's way."""

    def __init__(self, path: epath.Path) -> None:
        self._path, token = path, uuid.uuid4().hex
        with publish(path) as file:
            file.write(token.encode())
        _claims[path] = token

    def close(self) -> None:
        _claims.pop(self._path, None)


def _check_claims(path: epath.Path) -> None:
    """Raises UserError where this process has claimed the place and another did so since. What is put in the
    moment between the question and the put goes unnoticed."""
    for claim, token in [*_claims.items()]:
        if path != claim and path.is_relative_to(claim.parent) and _owner(claim) != token:
            raise UserError(f"{claim.parent} was taken over by a later start, or removed; this one ends")


def _owner(claim: epath.Path) -> str:
    try:
        return claim.read_text()
    except FileNotFoundError:
        return ""


@disk.has_locks.register(epath.Path)
def has_locks(path: epath.Path) -> bool:
    return False


@disk.lock.register(epath.Path)
def lock(path: epath.Path, wait: bool = False) -> Claim:
    return Claim(path)
