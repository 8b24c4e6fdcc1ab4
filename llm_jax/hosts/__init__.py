"""The processes of one run, on one machine or on many: who they are, what they agree on, how they end.

A process that is alone is process 0 of 1, and nothing here waits.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from llm_jax.errors import Stopped, UserError
from llm_jax.hosts.find import Cluster
from llm_jax.hosts.team import GRACE_SECONDS, Team

T = TypeVar("T")
HEARTBEAT_SECONDS = 50  # of jax's own service, for a process that is there but does nothing any more
LOST_CODE = 3  # the exit code of a process that ends because another did
FAILED_CODES = {UserError: 2, KeyboardInterrupt: 130, Stopped: 0}  # of a process that ends the others

_team: Team | None = None


@contextmanager
def connected(cluster: Cluster | None) -> Iterator[None]:
    """Within it this process is one of ``cluster``; None: it is alone. Call before jax has devices.

    When another process ends early, for whatever reason, this one says which and ends within seconds: it may
    be waiting for the other inside a collective that never comes back. When this one ends by an
    exception, the others do.
    """
    global _team
    if cluster is None or cluster.count == 1:
        yield
        return
    host, port = cluster.address.rsplit(":", 1)
    _team = Team(host, int(port) + 1, cluster.count, cluster.index, _end)
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM; signals.py does
    jax.distributed.initialize(
        cluster.address,
        cluster.count,
        cluster.index,
        local_device_ids=cluster.local_devices,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        cluster_detection_method="deactivate",
    )
    stopped = None
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, Stopped) and error.together):
            leave(error)
            # jax would wait at exit for processes that are gone, and abort.
            atexit.register(_exit_now, FAILED_CODES.get(type(error), 1))
            raise
        stopped = error
    _team.close()
    _team = None
    jax.distributed.shutdown()
    if stopped:
        raise stopped


def leave(error: BaseException) -> bool:
    """Tells the others why this process ends, which ends them. False when it is alone."""
    if _team is None:
        return False
    if not isinstance(error, UserError | Stopped):
        time.sleep(GRACE_SECONDS)  # a collective may have failed because another process is gone: it is named
    lines = str(error).strip().splitlines()
    _team.close(failed=lines[0] if lines else type(error).__name__)
    return True


def index() -> int:
    """Which process this is, from 0."""
    return _team.index if _team else 0


def count() -> int:
    """How many processes there are."""
    return _team.count if _team else 1


def leads() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return index() == 0


def gather(name: str, value: Any) -> list[Any]:
    """The JSON values of all processes in the order of their index, once all have called it for ``name``."""
    return _team.gather(name, value) if _team else [value]


def first_alone(name: str, work: Callable[[], T]) -> T:
    """Does ``work`` on process 0, then on the others, who find there what it made. Ends when all have; a
    UserError of one is raised on all."""
    result, error = _attempt(work) if leads() else (None, "")
    _agree(f"{name}, alone", None, error)
    if not leads():
        result, error = _attempt(work)
    return _agree(name, result, error)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return work(), ""
    except UserError as error:
        return None, str(error)


def _agree(name: str, result: T, error: str) -> T:
    errors = [found for found in gather(name, error) if found]
    if errors:
        raise UserError(errors[0])
    return result


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(message: str) -> None:
    """Ends this process from a thread: the main one may be inside a collective for ever."""
    text = f"error: {message}; this is process {index()}, which ends too; start all again to go on"
    os.write(2, f"{text}\n".encode())
    sys.stdout.flush()
    os._exit(LOST_CODE)
