"""Locks between processes of one machine or one shared file system."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from llm_jax.errors import UserError


def take(path: Path, wait: bool = False) -> IO[bytes] | None:
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
