"""Small files by their content: text, sealed JSON, hashes. The same on a disk and in a bucket."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError
from llm_jax.storage.disk import publish, reason

HASH_CHUNK = 1 << 20


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
        raise UserError(f"{path} cannot be read ({reason(error)}); {mend}") from error


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
