"""Opens ZeroMQ sockets with limits, CURVE keys and typed errors.

Addresses are loopback or ipc by default. Any other address needs CURVE keys on both sides, and a server accepts only
the public keys in its `authorized` folder. Message sizes and each peer's message rate are limited: docs/security.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from protocol import key_files
from protocol.addresses import require_loopback
from protocol.connection_guard import (
    ConnectionEvent,
    ConnectionGuard,
    ConnectionLimits,
    GuardedSocket,
)
from protocol.errors import DataError, UnreachableError
from protocol.framing import MAX_FRAME_BYTES
from protocol.keys import AllowList, Keys
from protocol.rate_limit import PeerRate, RateLimit
from protocol.sockets import Dealer, Publisher, Router, Socket, Subscriber

# Bound of the queue of messages to one peer. If it is full, a DEALER's send waits; a ROUTER or PUB drops the message.
_SEND_LIMIT = 1_000
_ROUTER_SEND_LIMIT = 256
# Bound of the queue of messages from one peer. A ROUTER's is so high that no stall of the event loop fills it: libzmq
# aborts the process if a connection whose queue is full breaks and a ZMTP heartbeat follows (docs/decisions/0012).
# The bytes of the queue are bounded by the connection guard.
_RECEIVE_LIMIT = 64
_ROUTER_RECEIVE_LIMIT = 10_000
_EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
# Subscribers send one short subscription.
_SUBSCRIBER_LIMITS = ConnectionLimits(max_unread_bytes=64 << 10)
_MAX_SUBSCRIPTION_BYTES = 1_024


def create_keys(folder: Path) -> None:
    """Creates a server pair, a client pair, and the allow-list with that client. Raises: DataError (keys exist)."""
    key_files.create_keys(folder, make_pair=zmq.curve_keypair)


def create_client(folder: Path, name: str) -> Path:
    """Creates and authorizes the keys of one more client. Returns the folder to copy to its node. Raises: DataError."""
    return key_files.create_client(folder, name, make_pair=zmq.curve_keypair)


S = TypeVar("S", bound="Socket")


class Transport:
    """The sockets of one process. `close()` closes all of them and discards messages that are not yet sent.

    Every method that opens a socket raises UnreachableError, SecurityError or DataError (unusable keys).
    """

    def __init__(self, *, keys: Path | None = None) -> None:
        self._context = zmq.Context()
        self._guard = ConnectionGuard()
        self._keys = Keys(keys) if keys is not None else None
        self._authenticator: AsyncioAuthenticator | None = None
        self._sockets: list[Socket] = []

    def router(
        self,
        address: str,
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        limits: ConnectionLimits | None = None,
        rate: PeerRate | None = None,
    ) -> Router:
        """Opens and binds a ROUTER (port 0: a free port). A peer that sends a larger frame is disconnected."""
        socket = self._open(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, _ROUTER_SEND_LIMIT)
        socket.setsockopt(zmq.RCVHWM, _ROUTER_RECEIVE_LIMIT)
        bound, guarded = self._bind(socket, address, max_frame_bytes, limits or ConnectionLimits())
        return self._register(Router(socket, bound, RateLimit(rate), guarded))

    def publisher(self, address: str, *, limits: ConnectionLimits = _SUBSCRIBER_LIMITS) -> Publisher:
        """Opens and binds a PUB."""
        socket = self._open(zmq.PUB)
        return self._register(Publisher(socket, *self._bind(socket, address, _MAX_SUBSCRIPTION_BYTES, limits)))

    def dealer(self, address: str) -> Dealer:
        """Opens a DEALER that reconnects without limit, and queues no message while it is not connected."""
        socket = self._open(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        return self._register(Dealer(socket, self._connect(socket, address)))

    def subscriber(self, address: str) -> Subscriber:
        """Opens a SUB that receives every message."""
        socket = self._open(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        return self._register(Subscriber(socket, self._connect(socket, address)))

    def close(self) -> None:
        self._guard.stop()
        for socket in self._sockets:
            socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)

    def _open(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        _set_options(socket)
        return socket

    def _register(self, socket: S) -> S:
        self._sockets.append(socket)
        return socket

    def _bind(
        self, socket: zmq.Socket[bytes], address: str, max_frame_bytes: int, limits: ConnectionLimits
    ) -> tuple[str, GuardedSocket | None]:
        """Returns the address with the real port, and the connections of the socket if they can be guarded."""
        socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        busy = "; stop the process that holds it or choose another port"
        with _closed_on_error(socket, f"cannot listen on {address}", busy):
            if self._keys is None:
                remedy = "make them with `palimpsest keys DIR` and set network.keys (or --keys) to DIR"
                require_loopback(address, remedy)
            else:
                self._serve_curve(socket, self._keys)
            guards = ConnectionGuard.supports(address)
            events = self._events(socket) if guards else None  # before `bind`, which waits for it to be connected
            try:
                socket.bind(address)
            except BaseException:
                if events is not None:
                    events.close(linger=0)
                raise
        bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if events is None:
            return bound, None
        guarded = GuardedSocket(
            address=bound, limits=limits, next_event=lambda: _next_event(events), close=lambda: events.close(linger=0)
        )
        self._guard.add(guarded)
        return bound, guarded

    def _events(self, socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
        """Returns a socket that receives the events of the socket's connections. Its queue has no limit: if it were
        full, libzmq's I/O thread would wait."""
        socket.monitor(_events_address(socket), _EVENTS)
        events = self._context.socket(zmq.PAIR)
        events.setsockopt(zmq.RCVHWM, 0)
        events.connect(_events_address(socket))
        return events

    def _serve_curve(self, socket: zmq.Socket[bytes], keys: Keys) -> None:
        authorized = keys.folder / "authorized"
        if not authorized.is_dir():
            raise DataError(f"no authorized/ in keys folder {keys.folder}: put the clients' public .key files there")
        socket.curve_publickey, socket.curve_secretkey = keys.pair("server")
        socket.curve_server = True
        if self._authenticator is None:
            self._authenticator = AsyncioAuthenticator(zmq.asyncio.Context.shadow(self._context))
            self._authenticator.start()
            self._authenticator.configure_curve_callback(domain="*", credentials_provider=AllowList(authorized))

    def _connect(self, socket: zmq.Socket[bytes], address: str) -> str:
        with _closed_on_error(socket, f"cannot connect to {address}"):
            if self._keys is None:
                remedy = "copy client.key_secret and server.key from the server's keys folder and give them with"
                require_loopback(address, f"{remedy} network.keys (or --keys)")
            else:
                socket.curve_publickey, socket.curve_secretkey = self._keys.pair("client")
                socket.curve_serverkey = self._keys.server_public()
            socket.connect(address)
        return address


def _set_options(socket: zmq.Socket[bytes]) -> None:
    """Sets limits, and lets the kernel find dead connections within 30 s. ZMTP heartbeats stay off: see
    _ROUTER_RECEIVE_LIMIT."""
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.SNDHWM, _SEND_LIMIT)
    socket.setsockopt(zmq.RCVHWM, _RECEIVE_LIMIT)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
    socket.setsockopt(zmq.TCP_MAXRT, 30_000)  # also ends the connection of a peer that does not read
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)


def _events_address(socket: zmq.Socket[bytes]) -> str:
    return f"inproc://connections-{id(socket)}"


def _next_event(events: zmq.Socket[bytes]) -> tuple[ConnectionEvent, int] | None:
    """Returns the next event of a monitored socket and the descriptor of its connection; None if there is none.

    A receive releases the interpreter lock, and the guard then waits up to 5 ms for it; to ask for EVENTS does not.
    """
    if not int(events.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
        return None
    content, _endpoint = events.recv_multipart(zmq.NOBLOCK)
    kind, fd = struct.unpack("=Hi", content)
    kinds = {int(zmq.EVENT_LISTENING): ConnectionEvent.LISTENING, int(zmq.EVENT_ACCEPTED): ConnectionEvent.ACCEPTED}
    return kinds.get(int(kind), ConnectionEvent.ENDED), fd


@contextmanager
def _closed_on_error(socket: zmq.Socket[bytes], failed: str, remedy: str = "") -> Iterator[None]:
    """Closes `socket` if the body raises. Raises: UnreachableError instead of ZMQError, whose text has the address."""
    try:
        yield
    except BaseException as error:
        socket.close(linger=0)
        if isinstance(error, zmq.ZMQError):
            reason = zmq.strerror(error.errno) if error.errno is not None else str(error)
            raise UnreachableError(f"{failed}: {reason}{remedy}") from error
        raise
