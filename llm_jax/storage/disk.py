"""What is done differently on a disk and in a bucket: here what each function promises, and the disk.

Every function chooses by the type of its first argument (``functools.singledispatch``); ``bucket.py`` adds
the other half.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import singledispatch
from pathlib import Path
from typing import IO

from llm_jax.errors import UserError

# ---- files --------------------------------------------------------------------------------------


def temporary_beside(path: Path) -> Path:
    """A new hidden name for what becomes ``path`` when it is whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@singledispatch
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


@singledispatch
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


def reason(error: OSError) -> str:
    """In words: the system's, or what a bucket's server said."""
    return error.strerror or str(error)


@singledispatch
def size(path: Path) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return path.stat().st_size


class DiskRanges:
    """An open file to be read in parts.

    Read by pread, not through a memory map: a file that is cut short or a disk that fails while a run
    reads it gives an error with a name, where a map would end the process with a bus error.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end), fewer where the file has fewer."""
        return os.pread(self._descriptor, end - begin, begin)


@singledispatch
def open_ranges(path: Path) -> DiskRanges:
    """``size``, and ``read(begin, end)``, which may be called by several threads. Both raise OSError."""
    return DiskRanges(path)


class DiskLog:
    """A new file that grows by lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("x", encoding="utf-8")

    def write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@singledispatch
def open_log(path: Path) -> DiskLog:
    """A new file for lines, which ``read_log`` gives back. ``write`` hands a line to the operating system at
    once, so that a killed process has lost none; ``sync`` forces all to the disk. All raise OSError."""
    return DiskLog(path)


@singledispatch
def read_log(path: Path) -> str:
    """What was written to a log, whose last line a kill may have cut."""
    return path.read_text(encoding="utf-8")


# ---- directories --------------------------------------------------------------------------------


@singledispatch
def resolved(path: Path) -> Path:
    """The same from any working directory."""
    return path.resolve()


@singledispatch
def make_directory(path: Path) -> None:
    """Creates a directory that can be written to, or raises UserError naming it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another") from error
    if not os.access(path, os.W_OK | os.X_OK):  # asks without leaving a trace that a kill would leave
        raise UserError(f"cannot write to {path}: no permission, or a read-only disk; choose another")


@singledispatch
def files(directory: Path) -> list[Path]:
    """All files below a directory, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


@singledispatch
def remove_tree(directory: Path) -> None:
    """A directory and all below it, if it is there. Raises OSError."""
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)


@singledispatch
@contextmanager
def publish_directory(directory: Path, marker: str) -> Iterator[Path]:
    """Gives a directory to fill, on the disk, that becomes ``directory`` at the end, as a whole.

    marker: the file without which the directory counts for nothing. Raises UserError.
    """
    make_directory(directory.parent)
    remove_leftovers(directory.parent, directory.name)
    temporary = temporary_beside(directory)
    make_directory(temporary)
    try:
        yield temporary
        try:
            temporary.rename(directory)
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror}; use another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@singledispatch
def occupied(directory: Path) -> bool:
    """Whether ``publish_directory`` would be in the way of something else."""
    return directory.exists() and (directory.is_file() or any(directory.iterdir()))


@singledispatch
@contextmanager
def written_locally(directory: Path) -> Iterator[Path]:
    """A directory on the disk for libraries that write nowhere else: ``directory`` itself, if it is one."""
    yield directory


@singledispatch
def duplicate(directory: Path, target: Path, marker: str) -> None:
    """Makes ``target`` a copy of ``directory``, as a whole, by hard links: no room is taken until the
    original is removed. Where files cannot be linked they are copied. marker: as for publish_directory.
    Raises OSError."""
    partial = target.with_name(f".{target.name}")
    shutil.copytree(directory, partial, copy_function=_link)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    with suppress(OSError):  # a file system without hard links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


@singledispatch
def set_aside(directory: Path, target: Path, marker: str) -> None:
    """Moves a directory, in place of what ``target`` was. Raises OSError."""
    remove_tree(target)
    directory.rename(target)


@singledispatch
def remember(directory: Path, names: Iterable[str]) -> None:
    """Notes which names ``directory`` holds, where a listing of it may lag behind; here it does not."""


@singledispatch
def remembered(directory: Path) -> list[str]:
    """The names last noted; some may be gone. None where a listing can be trusted."""
    return []


# ---- locks --------------------------------------------------------------------------------------


@singledispatch
def has_locks(path: Path) -> bool:
    """Whether ``lock`` keeps others out, and until the last holder ends."""
    return True


@singledispatch
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
