"""Closes connections of bound sockets whose unread bytes, or whose number, exceed a limit. Linux, TCP.

libzmq bounds the unread messages of a connection, but not their bytes, nor the frames of a message whose last frame has
not arrived. The guard compares the bytes that the kernel has received on each connection (TCP_INFO) with the bytes that
the application has read, and shuts a connection down that exceeds the limit. It runs in a separate thread, so it also
works while the event loop stalls.

    libzmq: accepted, disconnected ──► sweep, every 10 ms or more ──► shutdown(fd)      libzmq then frees the connection
    Router: bytes read, flooding ────►
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from protocol.guarded_connection import Connection
from protocol.listener_filter import set_accepting

log = logging.getLogger(__name__)

# Bytes on the wire of a frame in addition to its content: at most 9 plain, and 42 with CURVE.
FRAME_OVERHEAD_BYTES = 64
_MIN_PERIOD_S = 0.01
# A sweep may use 1/50 of a core.
_PERIODS_PER_SWEEP = 50
_LOG_EVERY_S = 10.0
# Ended connections whose messages may still be unread, each with up to 100 KB in libzmq. Above it, none is accepted.
MAX_ENDED_UNREAD = 256


class ConnectionEvent(Enum):
    LISTENING = "listening"
    ACCEPTED = "accepted"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Limits of one bound socket.

    max_connections         a further connection closes the oldest one that has sent no message, else is closed itself
    max_unread_bytes        of one connection; a connection with more is closed
    max_total_unread_bytes  of all connections; while there are more, connections with more than an equal share of it
                            and new connections are closed
    """

    max_connections: int = 4_096
    max_unread_bytes: int = 40 << 20
    max_total_unread_bytes: int = 1 << 30


class GuardedSocket:
    """The connections of one bound socket.

    next_event  returns the next event of a connection and its descriptor, None if there is none; called by the guard's
                thread only
    """

    def __init__(
        self,
        *,
        address: str,
        limits: ConnectionLimits,
        next_event: Callable[[], tuple[ConnectionEvent, int] | None],
        close: Callable[[], None],
    ) -> None:
        self.closed = False
        self._address = address
        self._limits = limits
        self._next_event = next_event
        self._close = close
        self._open: dict[int, Connection] = {}
        self._unknown: dict[int, int] = {}
        self._num_unread_of_ended = 0
        self._num_read_of_ended = 0
        self._num_subtracted = 0
        self._num_closed = 0
        self._listener: socket.socket | None = None
        self._is_accepting = True
        self._num_ended = 0
        self._num_empty = self._num_empty_seen = 0
        self._logged_s = -_LOG_EVERY_S

    @property
    def num_connections(self) -> int:
        return len(self._open)

    @property
    def num_closed(self) -> int:
        """Number of connections that were closed because they exceeded a limit."""
        return self._num_closed

    # --- called by the socket's thread ---

    def on_read(self, fd: int, num_bytes: int) -> None:
        """Adds a message that the application has read: bytes of its frames, with FRAME_OVERHEAD_BYTES each."""
        connection = self._open.get(fd)
        if connection is None:  # it has ended, or its ACCEPTED was not handled yet
            self._num_read_of_ended += num_bytes
            self._unknown[fd] = self._unknown.get(fd, 0) + num_bytes
        else:
            connection.num_read += num_bytes
            connection.num_messages += 1

    def on_empty(self) -> None:
        """The application has read every complete message, so that ended connections have left none."""
        self._num_empty += 1

    def disconnect(self, fd: int, reason: str) -> None:
        """Closes a connection. Messages that libzmq has already received are still delivered."""
        connection = self._open.get(fd)
        if connection is not None and not connection.closing:
            self._shut_down(connection, reason)

    # --- called by the guard's thread ---

    def sweep(self) -> None:
        """Handles events of connections, then closes those that exceed a limit."""
        while (event := self._next_event()) is not None:
            self._on_event(*event)
        self._pause_or_accept()
        total = self._total_of_ended()
        unread: list[tuple[int, Connection]] = []
        for connection in list(self._open.values()):
            num = connection.update()
            total += num
            if connection.closing:
                continue
            if num > self._limits.max_unread_bytes:
                self._shut_down(
                    connection, f"it has {num} unread bytes, max_unread_bytes is {self._limits.max_unread_bytes}"
                )
            else:
                unread.append((num, connection))
        if total > self._limits.max_total_unread_bytes:
            share = self._limits.max_total_unread_bytes // max(1, len(self._open))
            for num, connection in unread:
                if num > share or not connection.num_messages:
                    self._shut_down(
                        connection,
                        f"all connections have {total} unread bytes, max_total_unread_bytes is "
                        f"{self._limits.max_total_unread_bytes}",
                    )

    def stop(self) -> None:
        for connection in self._open.values():
            connection.detach()
        self._open.clear()
        if self._listener is not None:
            self._listener.detach()
            self._listener = None
        self._close()

    def _pause_or_accept(self) -> None:
        """Accepts no connection while many that have ended may have left messages: reconnecting is no way around the
        limits of unread messages of a connection."""
        if self._num_empty != self._num_empty_seen:
            self._num_empty_seen = self._num_empty
            self._num_ended = 0
        accepting = self._num_ended <= MAX_ENDED_UNREAD
        if accepting != self._is_accepting and self._listener is not None:
            self._is_accepting = accepting
            with suppress(OSError):
                set_accepting(self._listener, accepting)

    def _on_event(self, kind: ConnectionEvent, fd: int) -> None:
        if kind is ConnectionEvent.LISTENING:
            self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=fd)  # libzmq owns fd
            return
        ended = self._open.pop(fd, None)
        if ended is not None:
            self._num_unread_of_ended += ended.num_unread
            self._num_ended += 1
            ended.detach()
        if kind is ConnectionEvent.ACCEPTED:
            try:
                connection = Connection(fd)
            except OSError:  # the descriptor is closed already, and ENDED follows
                return
            if len(self._open) >= self._limits.max_connections:
                self._make_room()
            connection.num_read = self._unknown.pop(fd, 0)
            self._open[fd] = connection
            if len(self._open) > self._limits.max_connections:
                self._shut_down(connection, f"max_connections is {self._limits.max_connections}")

    def _make_room(self) -> None:
        """Closes the oldest connection that has sent no message."""
        for fd, connection in self._open.items():
            if not connection.num_messages and not connection.closing:
                self._shut_down(connection, f"max_connections is {self._limits.max_connections}, it sent no message")
                self._open.pop(fd).detach()
                return

    def _total_of_ended(self) -> int:
        """Bytes that ended connections have left unread in libzmq; approximate, never negative."""
        num_read = self._num_read_of_ended
        self._num_unread_of_ended = max(0, self._num_unread_of_ended - (num_read - self._num_subtracted))
        self._num_subtracted = num_read
        return self._num_unread_of_ended

    def _shut_down(self, connection: Connection, reason: str) -> None:
        self._num_closed += 1
        now_s = time.monotonic()
        if now_s - self._logged_s > _LOG_EVERY_S:
            self._logged_s = now_s
            log.warning(
                "%s: closed the connection of %s (%d closed so far): %s",
                self._address,
                connection.peer,
                self._num_closed,
                reason,
            )
        connection.shut_down()


class ConnectionGuard:
    """The thread that sweeps the guarded sockets of one transport."""

    def __init__(self) -> None:
        self._sockets: list[GuardedSocket] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @staticmethod
    def supports(address: str) -> bool:
        return sys.platform.startswith("linux") and address.startswith("tcp://")

    def add(self, guarded: GuardedSocket) -> None:
        with self._lock:
            self._sockets.append(guarded)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="connection-guard", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread, and stops the guarded sockets. Must be called before the sockets are closed."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        for guarded in self._sockets:
            guarded.stop()
        self._sockets.clear()

    def _run(self) -> None:
        period_s = _MIN_PERIOD_S
        while not self._stopping.wait(period_s):
            started_s = time.thread_time()  # processor time: not the wait for the interpreter lock
            with self._lock:
                sockets = list(self._sockets)
            for guarded in sockets:
                if guarded.closed:
                    guarded.stop()
                    with self._lock:
                        self._sockets.remove(guarded)
                else:
                    guarded.sweep()
            period_s = max(_MIN_PERIOD_S, _PERIODS_PER_SWEEP * (time.thread_time() - started_s))
