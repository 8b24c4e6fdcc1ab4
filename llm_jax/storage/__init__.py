"""Files and directories that are whole or absent, on a disk or in a bucket.

A place is a ``pathlib.Path``, or for ``gs://BUCKET/...`` an ``epath.Path``, which names and reads things in
the same way (``/``, ``name``, ``exists``, ``read_text``, ``glob``). What the two do differently are functions
that choose by the type of the path: ``disk.py`` says what they promise and does it with renames, fsync and
flock; ``bucket.py`` does it where nothing can be renamed, appended to or locked. Nothing else knows of
buckets.
"""

from __future__ import annotations

from pathlib import Path

import fsspec
from etils import epath

from llm_jax.errors import UserError
from llm_jax.storage import bucket as _bucket
from llm_jax.storage.disk import (
    duplicate,
    files,
    has_locks,
    leftovers,
    lock,
    make_directory,
    occupied,
    open_log,
    open_ranges,
    publish,
    publish_directory,
    read_log,
    remember,
    remembered,
    remove_leftovers,
    remove_tree,
    resolved,
    set_aside,
    size,
    temporary_beside,
    written_locally,
)
from llm_jax.storage.sealed import (
    content_hash,
    read_bytes,
    read_sealed,
    text_hash,
    write_sealed,
    write_text,
)

__all__ = [
    "content_hash",
    "duplicate",
    "files",
    "has_locks",
    "leftovers",
    "lock",
    "make_directory",
    "occupied",
    "open_log",
    "open_ranges",
    "path",
    "publish",
    "publish_directory",
    "read_bytes",
    "read_log",
    "read_sealed",
    "remember",
    "remembered",
    "remove_leftovers",
    "remove_tree",
    "resolved",
    "set_aside",
    "size",
    "temporary_beside",
    "text_hash",
    "write_sealed",
    "write_text",
    "written_locally",
]


def path(place: str | Path) -> Path:
    """A path from what a user wrote: on the disk, or ``gs://BUCKET/...``. Raises UserError for another
    scheme, and where what speaks to buckets is not installed."""
    scheme, separator, _ = str(place).partition("://")
    if not separator:
        return Path(place).expanduser()
    if scheme != _bucket.SCHEME:
        raise UserError(f"{place}: only paths on a disk and gs:// are known; use one of these")
    try:
        fsspec.get_filesystem_class(_bucket.SCHEME)
    except ImportError:
        raise UserError(f"{place} needs gcsfs: pip install 'llm_jax[gcs]'") from None
    return epath.Path(place)
