"""Where text comes from: the user's own files, or two corpora that every Python carries.

``python:source`` is the running interpreter's standard library (tests, idlelib and site-packages left
out), ``python:docs`` the language reference that ``help()`` shows. Both need no download and are never
redistributed; they differ between Python releases, so a run records their hash.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llm_jax.errors import UserError

LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "_bundled"}
TOPICS = "pydoc_data/topics.py"
FEWEST_SOURCES = 100  # a complete standard library has over 500 modules


class Document(NamedTuple):
    name: str
    text: str


def read(sources: Iterable[str]) -> Iterator[Document]:
    """Documents of a file, a directory, a glob or a ``python:`` corpus, in a fixed order.

    A file is one document. Raises UserError, naming the file, for text that is missing, empty or not
    UTF-8, and for a Python distribution that has stripped its corpus.
    """
    for source in sources:
        if source in EMBEDDED:
            yield from EMBEDDED[source]()
        else:
            yield from map(_read_file, find(source))


def find(source: str) -> list[Path]:
    """The files behind a path or glob, sorted; hidden files are left out. Raises UserError if none."""
    if source.startswith("python:"):
        raise UserError(f"data.text={source}: there are {' and '.join(EMBEDDED)}")
    if not source:
        raise UserError("data.text is empty; name a file, a directory or a glob")
    path = Path(source).expanduser()
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    if not files:
        raise UserError(f"data.text={source}: no such file, directory or glob with files in it")
    return sorted(files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}); "
            f"convert it, e.g. iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not text:
        raise UserError(f"{path} is empty; leave it out or give it text")
    return Document(str(path), text)


def _python_source() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not LEFT_OUT & set(path.relative_to(root).parts) and not path.match(TOPICS)
    ]
    if len(files) < FEWEST_SOURCES:
        raise UserError(
            f"python:source: this Python ships {len(files)} source files in {root}; its distribution "
            "has stripped them. Use another Python, or --config.data.text=PATH"
        )
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
        if text.strip():
            yield Document(path.relative_to(root).as_posix(), text)


def _python_docs() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "python:docs: this Python has no pydoc_data/topics.py; its distribution has stripped it. "
            "Use another Python, or --config.data.text=python:source"
        ) from None
    for name in sorted(topics):
        yield Document(name, topics[name])


EMBEDDED = {"python:source": _python_source, "python:docs": _python_docs}


class Hasher:
    """sha256 over the texts of documents, in order; names and paths do not count."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        data = text.encode()
        self._digest.update(len(data).to_bytes(8, "little"))
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
