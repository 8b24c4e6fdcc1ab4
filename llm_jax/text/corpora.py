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

from llm_jax.errors import UserError
from llm_jax.text import formats
from llm_jax.text.formats import Document

LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "_bundled"}
TOPICS = "pydoc_data/topics.py"
FEWEST_SOURCES = 100  # a complete standard library has over 500 modules


def read(sources: Iterable[str], text_key: str = "text") -> Iterator[Document]:
    """Documents of files, directories, globs and ``python:`` corpora, in a fixed order, as they are read.

    text_key: where a line of a .jsonl file has its text (formats.py). Raises UserError, naming the file,
    for text that is missing, empty, damaged or not UTF-8, and for a Python distribution that has
    stripped its corpus.
    """
    for source in sources:
        if source in EMBEDDED:
            yield from EMBEDDED[source]()
        else:
            for path in find(source):
                yield from formats.documents(path, text_key)


def find(source: str, key: str = "data.text") -> list[Path]:
    """The files behind a path or glob, sorted; hidden files are left out. Raises UserError if none,
    naming the config's ``key`` that asked for them."""
    if source.startswith("python:"):
        raise UserError(f"{key}={source}: there are {' and '.join(EMBEDDED)}")
    if not source:
        raise UserError(f"{key} is empty; name a file, a directory or a glob")
    if "://" in source:
        raise UserError(f"{key}={source}: text is read from a disk; copy it, or make shards and name these")
    path = Path(source).expanduser()
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    if not files:
        raise UserError(f"{key}={source}: no such file, directory or glob with files in it")
    return sorted(files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
