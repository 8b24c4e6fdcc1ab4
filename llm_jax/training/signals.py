"""SIGTERM, Ctrl-C, a maintenance notice, a time limit: the loop ends where it can go on from and says how."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import llm_jax
from llm_jax.errors import Stopped
from llm_jax.hosts import find
from llm_jax.training.progress import say

CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # 0: a scheduler that takes a machine back sees no failure
SHOW_CURSOR = b"\x1b[?25h"
NOTICE = "saving after this dispatch"
SAME_SECONDS = 1.0  # a scheduler, or timeout(1), may signal a process and its group: that is one request
LOOK_SECONDS = 10.0  # between two looks at the metadata server, which gives notice a minute or more ahead


class Stop:
    """What the loop asks. Inside ``deferred`` a signal is only noted; elsewhere it raises Stopped at once."""

    def __init__(self, max_seconds: float | None = None) -> None:
        """max_seconds: from the start of the process; then the loop is to stop, too."""
        self.signal: signal.Signals | None = None
        self.notice = ""  # of the machine that is about to go
        self._max_seconds = max_seconds
        self._deferring = False

    @property
    def reason(self) -> str:
        """What asks the loop to stop; "" = nothing does."""
        if self.signal is not None:
            return self.signal.name
        if self._max_seconds is not None and time.time() - llm_jax.BEGAN >= self._max_seconds:
            return f"--max-seconds={self._max_seconds:g}"
        return self.notice

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While work is under way that is worth saving."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler: the first signal is obeyed; ``end_at_the_second`` sees to the next."""
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        if not self._deferring:
            raise Stopped(self.signal.name)
        notice = f"{self.signal.name}: {NOTICE}; a second signal ends at once\n".encode()
        os.write(2, SHOW_CURSOR * os.isatty(2) + b"\n" * os.isatty(2) + notice)  # print may be under way


def watch_machine(stop: Stop, ask: Callable[[str], str] = find.metadata) -> None:
    """Until a Google Cloud machine is to be preempted or maintained; then ``stop`` says so. For a thread."""
    while not stop.notice:
        event = ask("maintenance-event")
        if ask("preempted") == "TRUE":
            stop.notice = "the machine's preemption"
        elif event not in ("", "NONE"):
            stop.notice = f"the machine's maintenance ({event})"
        else:
            time.sleep(LOOK_SECONDS)


def end_at_the_second(reader: int) -> None:
    """Ends the process at a signal that comes SAME_SECONDS or more after the first; for a thread.

    Also inside a compilation, where no handler of Python's runs: the system's own writes the numbers of
    signals to the pipe that is read here. All that is on disk is whole at any instant, as SIGKILL proves.
    """
    first = None
    while number := os.read(reader, 1):
        if number[0] not in CODES:
            continue
        first = first or time.monotonic()
        if time.monotonic() - first >= SAME_SECONDS:
            os.write(2, SHOW_CURSOR * os.isatty(2))
            os._exit(128 + number[0])
    os.close(reader)


@contextmanager
def stopping(max_seconds: float | None = None) -> Iterator[Stop]:
    """Installs the handlers, gives the Stop for the loop, and turns Stopped into one line and an exit
    code: 130 after Ctrl-C, else 0. For an entry point's main thread."""
    stop = Stop(max_seconds)
    if find.on_tpu_vm():
        threading.Thread(target=watch_machine, args=(stop,), daemon=True).start()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=end_at_the_second, args=(reader,), daemon=True).start()
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop.handle) for number in CODES}
    try:
        yield stop
    except Stopped as stopped:
        command = shlex.join(["python", *sys.argv])
        say(f"stopped by {stopped}; to go on, the same command: {command}")
        sys.exit(CODES.get(stop.signal, 0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)
