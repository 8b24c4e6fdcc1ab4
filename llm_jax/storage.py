"""Files that are whole or absent: atomic writes, sealed JSON, content hashes, locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from llm_jax.errors import UserError

HASH_CHUNK = 1 << 20


def temporary_beside(path: Path) -> Path:
    """A new hidden name for what becomes ``path`` when it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def leftovers(directory: Path, name: str = "*") -> list[Path]:
    """What a kill left of files and directories that were to become ``name``, a glob."""
    return sorted(directory.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"))


def remove_leftovers(directory: Path, name: str = "*") -> None:
    """For the one process that is about to write there: a name may be in use by another."""
    for path in leftovers(directory, name):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def publish(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path`` and renames it into place once it is on disk.

    A reader sees the old file or the new one, never a part; an exception leaves the old one.
    Raises UserError, naming the path, when the file cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space or use another place"
        ) from error
    finally:
        with suppress(OSError):  # gone, or never made
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    with publish(path) as file:
        file.write(text.encode())


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON that carries the hash of its own content, so that one flipped byte is noticed."""
    write_text(path, _seal(json.dumps(value, indent=1, sort_keys=True)))


def read_sealed(path: Path, mend: str = "restore it from a copy") -> dict[str, Any]:
    """Reads what ``write_sealed`` wrote. Raises UserError, which ends in ``mend``, when the file is missing
    or changed, even where JSON would mean the same."""
    text = read_bytes(path, mend)
    try:
        body = json.loads(text)["content"]
        if text == _seal(body).encode():
            return json.loads(body)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is corrupt: its content does not match its own hash; {mend}")


def _seal(body: str) -> str:
    return json.dumps({"sha256": text_hash(body), "content": body}, indent=1) + "\n"


def read_bytes(path: Path, mend: str) -> bytes:
    """All of a file. Raises UserError, naming it, when it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {mend}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {mend}") from error


def text_hash(text: str) -> str:
    """Hex sha256 of a string."""
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def make_directory(path: Path) -> None:
    """Creates a directory that can be written to, or raises UserError naming it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another") from error
    if not os.access(path, os.W_OK | os.X_OK):  # asks without leaving a trace that a kill would leave
        raise UserError(f"cannot write to {path}: no permission, or a read-only disk; choose another")


def lock(path: Path, wait: bool = False) -> IO[bytes] | None:
    """The lock of a file that need not exist; None where another process has it and wait is False.

    It is held until the file is closed here and in every process that inherited it: the kernel closes it
    however a process ends, so that a lock never outlives its holders.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise UserError(f"cannot lock {path}: {error.strerror}; use another file system") from error
    return file
