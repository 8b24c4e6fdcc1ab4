"""What processes say to one another beside the arrays: a star of plain sockets around process 0.

It carries small JSON values a few times a dispatch, and it notices at once when a process is gone: the
system closes the socket of one that was killed, and probes those of a machine that fell silent. jax's own
service does not always end a process whose peer died inside a collective (docs/log.md).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from llm_jax.errors import TryAgain

MEET_SECONDS = 50.0  # for all processes to come
SILENCE_SECONDS = 30  # of a machine that no longer answers
HELLO_SECONDS = 5.0  # for one that knocked to say who it is
GRACE_SECONDS = 1.0  # for processes that fail together, so that each can say so itself

Lost = Callable[[str], None]


class Team:
    """One process's end. ``gather`` is its one operation: every process calls it for the same names."""

    def __init__(
        self, host: str, port: int, count: int, index: int, lost: Lost, wait: float = MEET_SECONDS
    ) -> None:
        """Meets the others at host:port, where process 0 listens. lost: called, once and from a thread, with
        one line about who is gone and why; afterwards nothing is ever gathered.

        Raises TryAgain, on every process that came, when some are missing after ``wait`` seconds.
        """
        self.count, self.index = count, index
        self._lost, self._ended = lost, False
        self._rounds: Counter[str] = Counter()
        self._values: dict[str, dict[int, Any]] = {}  # process 0: what came; the others: what it sent
        self._changed = threading.Condition()
        self._closed: set[int] = set()
        meet = self._receive if index == 0 else self._join
        self._links = meet(host, port, wait)
        for peer, link in self._links.items():
            threading.Thread(target=self._listen, args=(peer, link), daemon=True).start()

    def gather(self, name: str, value: Any) -> list[Any]:
        """The JSON values of all processes, in the order of their index. Waits for all of them.

        name: of what is gathered; threads that gather side by side use different names.
        """
        with self._changed:
            self._rounds[name] += 1
            key = f"{name}/{self._rounds[name]}"
        if self.index:
            self._links[0].send({"key": key, "value": value})
            return self._await(key, 1)[0]
        self._take(key, 0, value)
        values = self._await(key, self.count)
        ordered = [values[i] for i in range(self.count)]
        self._tell_all({"key": key, "value": ordered})
        return ordered

    def close(self, failed: str = "") -> None:
        """Says goodbye; waits for the others to do so. failed: why this process ends before the others,
        which ends them too."""
        self._tell_all({"failed": failed} if failed else {"bye": True})
        with self._changed:
            self._ended = self._ended or bool(failed)
            self._changed.wait_for(lambda: self._ended or self._closed == {*self._links})
            self._ended = True
        for link in self._links.values():
            link.close()

    # ---- meeting ------------------------------------------------------------------------------

    def _receive(self, host: str, port: int, wait: float) -> dict[int, Link]:
        """Process 0: until all others have come."""
        deadline = time.monotonic() + wait
        links: dict[int, Link] = {}
        try:
            both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
            server = socket.create_server(("", port), backlog=self.count, **both)
        except OSError as error:
            raise TryAgain(f"cannot listen at port {port} for the other processes: {error}") from error
        with server:
            while len(links) < self.count - 1 and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    link = Link(server.accept()[0])
                    links[link.receive(min(left, HELLO_SECONDS))["hello"]] = link
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # the time is up, or something else knocked
        missing = sorted({*range(1, self.count)} - {*links})
        error = f"{_some(missing, self.count)} did not come within {wait:.0f} s; start all, then try again"
        for link in links.values():
            link.send({"missing": error if missing else ""})
        if missing:
            raise TryAgain(error)
        return links

    def _join(self, host: str, port: int, wait: float) -> dict[int, Link]:
        """The others: until process 0 says that all are there."""
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            try:
                link = Link(socket.create_connection((host.strip("[]"), port), timeout=left))
                link.send({"hello": self.index})
                # Process 0 may have begun to wait later than this one, and gives up by its own clock.
                error = link.receive(left + wait)["missing"]
            except (OSError, ValueError, KeyError):
                time.sleep(min(0.2, left))
                continue
            if error:
                raise TryAgain(error)
            return {0: link}
        raise TryAgain(
            f"process 0 of {self.count} did not answer at {host}:{port} within {wait:.0f} s; start all, then "
            "try again"
        )

    # ---- listening ----------------------------------------------------------------------------

    def _listen(self, peer: int, link: Link) -> None:
        """A thread for each link, until it closes."""
        reason = "its connection closed: it was killed, or its machine is gone"
        try:
            while message := link.receive():
                if "key" in message:
                    self._take(message["key"], peer, message["value"])
                elif "bye" in message:
                    with self._changed:
                        self._closed.add(peer)
                        self._changed.notify_all()
                elif "failed" in message:
                    reason = message["failed"]
                    time.sleep(GRACE_SECONDS)
                    break
                elif "lost" in message:
                    return self._end(message["lost"])
        except ConnectionResetError:  # killed with messages unread
            pass
        except (OSError, ValueError) as error:
            reason = f"its connection broke ({error})"
        if peer not in self._closed:
            self._end(f"process {peer} of {self.count} ended: {reason}")

    def _take(self, key: str, peer: int, value: Any) -> None:
        with self._changed:
            self._values.setdefault(key, {})[peer] = value
            self._changed.notify_all()

    def _await(self, key: str, count: int) -> dict[int, Any]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._values.get(key, {})) == count)
            return self._values.pop(key)

    def _end(self, message: str) -> None:
        """Tells the others and the owner, once."""
        with self._changed:
            first, self._ended = not self._ended, True
            self._changed.notify_all()
        if not first:
            return
        self._tell_all({"lost": message})
        self._lost(message)

    def _tell_all(self, message: dict[str, Any]) -> None:
        line = encode(message)
        for link in self._links.values():
            link.send_line(line)


class Link:
    """A socket that carries JSON, a line a message."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # for what was sent and is not acknowledged, in ms
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_SECONDS)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        self.send_line(encode(message))

    def send_line(self, line: bytes) -> None:
        """To a peer that is gone nothing is sent; listening says so."""
        try:
            with self._sending:
                self._connection.sendall(line)
        except OSError:
            pass

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """The next message; {} when the peer closed. OSError after ``seconds``, ValueError for noise."""
        self._connection.settimeout(seconds)
        line = self._lines.readline()
        return json.loads(line) if line else {}

    def close(self) -> None:
        self._connection.close()


def encode(message: dict[str, Any]) -> bytes:
    """A message as it goes over a link."""
    return json.dumps(message).encode() + b"\n"


def _some(indices: list[int], count: int) -> str:
    listed = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {listed} of {count}"
