"""The processes of one run, on one machine or on many: who they are, what they agree on, how they end.

A process that is alone is process 0 of 1, and nothing here waits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from llm_jax.errors import UserError
from llm_jax.hosts.find import Cluster
from llm_jax.hosts.team import Team

T = TypeVar("T")
LOST_CODE = 3  # the exit code of a process that ends because another did
HEARTBEAT_SECONDS = 50  # of jax's own service, for a process that is there but does nothing any more

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
    )
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit) or not str(error).strip()
        _team.close(failed=type(error).__name__ if stopped else str(error).splitlines()[0])
        raise
    _team.close()
    _team = None
    jax.distributed.shutdown()


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


def together(name: str, work: Callable[[], T]) -> T:
    """Does ``work`` on every process; a UserError of one is raised on all."""
    result, error = _attempt(work)
    return _agree(name, result, error)


def first_alone(name: str, work: Callable[[], T]) -> T:
    """Does ``work`` on process 0, then on the others, who find there what it made. Ends when all have."""
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


def _end(message: str) -> None:
    """Ends this process from a thread: the main one may be inside a collective for ever."""
    text = f"error: {message}; this is process {index()}, which ends too; start all again to go on"
    os.write(2, f"{text}\n".encode())
    sys.stdout.flush()
    os._exit(LOST_CODE)
