"""A ZMTP 3.1 connection without a library, for peers that send what a library would not."""

from __future__ import annotations

import select
import socket
import struct
import time
from urllib.parse import urlsplit

_MORE, _LONG, _COMMAND = 1, 2, 4


def connect_zmtp(address: str, *, timeout_s: float = 20.0) -> socket.socket:
    """Connects a DEALER with the NULL mechanism and completes the handshake. Sends raise OSError after `timeout_s`."""
    parts = urlsplit(address)
    assert parts.hostname is not None
    connection = socket.create_connection((parts.hostname, parts.port or 0), timeout=timeout_s)
    connection.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31))
    ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b"")
    connection.sendall(bytes([_COMMAND, len(ready)]) + ready)
    _read(connection, 64)
    _, length = _read(connection, 2)
    _read(connection, length)
    return connection


def zmtp_frame(content: bytes, *, more: bool = False) -> bytes:
    """The bytes of one frame; `more`: the message has a further frame."""
    flags = _MORE if more else 0
    if len(content) < 256:
        return bytes([flags, len(content)]) + content
    return bytes([flags | _LONG]) + struct.pack(">Q", len(content)) + content


def send_until_closed(connection: socket.socket, data: bytes, *, timeout_s: float = 20.0) -> None:
    """Sends `data` again and again, without waiting for replies, until the server closes the connection.

    Raises: TimeoutError.
    """
    deadline_s = time.monotonic() + timeout_s
    data *= max(1, 65_536 // len(data))
    rest = memoryview(data)
    while time.monotonic() < deadline_s:
        readable, writable, _ = select.select([connection], [connection], [], timeout_s)
        try:
            if readable and not connection.recv(65_536):
                return
            if writable:
                rest = rest[connection.send(rest, socket.MSG_DONTWAIT) :] or memoryview(data)
        except BlockingIOError:
            continue
        except OSError:
            return
    raise TimeoutError(f"the server must close the connection in {timeout_s:g} s")


def zmtp_ping() -> bytes:
    """A heartbeat command, which must be answered with a PONG."""
    ping = b"\x04PING" + bytes(2)
    return bytes([_COMMAND, len(ping)]) + ping


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def _read(connection: socket.socket, num: int) -> bytes:
    data = b""
    while len(data) < num:
        received = connection.recv(num - len(data))
        if not received:
            raise ConnectionError("the server closed the connection during the handshake")
        data += received
    return data
