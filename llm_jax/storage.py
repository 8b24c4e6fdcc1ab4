"""Files that are whole or absent: atomic writes, sealed JSON, content hashes."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from llm_jax.errors import UserError

HASH_CHUNK = 1 << 20


@contextmanager
def publish(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path`` and renames it into place once it is on disk.

    A reader sees the old file or the new one, never a part; an exception leaves the old one.
    Raises UserError, naming the path, when the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free or choose another") from error
    finally:
        with suppress(OSError):  # gone, or never made
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    with publish(path) as file:
        file.write(text.encode())


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON that carries the hash of its own content, so that one flipped byte is noticed."""
    body = json.dumps(value, indent=1, sort_keys=True)
    write_text(path, json.dumps({"sha256": text_hash(body), "content": body}, indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what ``write_sealed`` wrote. Raises UserError when the file is missing or changed."""
    try:
        outer = json.loads(path.read_text())
        if text_hash(outer["content"]) == outer["sha256"]:
            return json.loads(outer["content"])
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is corrupt: its content does not match its own hash")


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
        probe = path / f".probe.{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another") from error
