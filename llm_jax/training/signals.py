"""SIGTERM and Ctrl-C: the loop ends where it can go on from, and the user is told how."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llm_jax.training.progress import say

CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # 0: a scheduler that takes a machine back sees no failure
SHOW_CURSOR = b"\x1b[?25h"


class Stopped(BaseException):
    """A run ended by request. Not an Exception: nothing that handles errors may take it for one."""


class Stop:
    """What the loop asks. Inside ``deferred`` a signal is only noted; elsewhere it raises Stopped at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deferring = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While work is under way that is worth saving."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of the first signal. The next one ends the process as the system does by default,
        even inside a compilation; all that is on disk is whole at any instant, as SIGKILL proves."""
        for each in CODES:
            signal.signal(each, signal.SIG_DFL)
        self.signal = signal.Signals(number)
        if not self._deferring:
            raise Stopped
        notice = f"{self.signal.name}: saving after this dispatch; a second signal ends at once\n".encode()
        os.write(2, SHOW_CURSOR * os.isatty(2) + b"\n" * os.isatty(2) + notice)  # print may be under way


@contextmanager
def stopping() -> Iterator[Stop]:
    """Installs the handlers, gives the Stop for the loop, and turns Stopped into one line and an exit
    code: 0 after SIGTERM, 130 after Ctrl-C. For an entry point's main thread."""
    stop = Stop()
    before = {number: signal.signal(number, stop.handle) for number in CODES}
    try:
        yield stop
    except Stopped as stopped:
        command = shlex.join(["python", *sys.argv])
        say(f"stopped by {stop.signal.name}{stopped}; to go on, the same command: {command}")
        sys.exit(CODES[stop.signal])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
