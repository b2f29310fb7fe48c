"""The unread bytes of one accepted TCP connection, from the kernel's counter. Linux."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

# struct tcp_info: tcpi_bytes_received is a u64 at offset 128.
_BYTES_RECEIVED = struct.Struct("=128xQ")


class Connection:
    """One accepted connection.

    num_read      bytes that the application has read, an upper bound; written by the socket's thread only
    num_received  bytes that the kernel has received
    """

    __slots__ = ("_excess", "closing", "handle", "num_messages", "num_read", "num_received", "peer")

    def __init__(self, fd: int) -> None:
        family = socket.AF_INET
        self.handle = socket.socket(family, socket.SOCK_STREAM, fileno=fd)  # detached, never closed: libzmq owns fd
        self.peer = self._peer()
        self.num_read = 0
        self.num_received = 0
        self.num_messages = 0
        self.closing = False
        self._excess = 0

    @property
    def num_unread(self) -> int:
        return self.num_received - (self.num_read - self._excess)

    def _peer(self) -> object:
        try:
            return self.handle.getpeername()
        except OSError:
            return None

    def update(self) -> int:
        """Reads the kernel's counter. Returns the number of unread bytes."""
        num_read = self.num_read
        try:
            info = self.handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
            self.num_received = _BYTES_RECEIVED.unpack(info)[0]
        except (OSError, struct.error):  # it has ended
            pass
        self._excess = max(self._excess, num_read - self.num_received)
        return self.num_received - (num_read - self._excess)

    def shut_down(self) -> None:
        """Ends the connection; libzmq notices and closes its descriptor."""
        self.closing = True
        if self._peer() == self.peer:  # else the descriptor's number already belongs to another connection
            with suppress(OSError):
                self.handle.shutdown(socket.SHUT_RDWR)

    def detach(self) -> None:
        self.handle.detach()
