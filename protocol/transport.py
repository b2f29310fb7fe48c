"""ZeroMQ sockets with limits, CURVE keys and typed errors. No other file imports zmq.

Addresses are loopback or ipc by default. Any other address needs CURVE keys on both sides, and a server accepts only
the public keys in its `authorized` folder. Message sizes and each peer's message rate are limited: docs/security.md.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from protocol.addresses import require_loopback
from protocol.errors import DataError, UnreachableError
from protocol.framing import MAX_FRAME_BYTES, Buffer
from protocol.keys import AllowList, Keys
from protocol.rate_limit import RateLimit
from protocol.socket_wait import SocketWaiter

# Bound of the queue of messages to one peer. If it is full, a DEALER's send waits; a ROUTER or PUB drops the message.
_SEND_LIMIT = 1_000
# Bound of the queue of messages from one peer. With MAX_FRAME_BYTES it bounds the memory that a peer can use here.
_RECEIVE_LIMIT = 64
# A receiver yields to the event loop after this number of messages, even if more are waiting.
_YIELD_EVERY = 32
# Smaller messages are copied: libzmq's notice, from another thread, that a buffer is free costs more than the copy.
_MIN_ZERO_COPY_BYTES = 1 << 20
_CLIENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def create_keys(folder: Path) -> None:
    """Creates a server pair, a client pair, and the allow-list with that client. Raises: DataError (keys exist)."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if existing := sorted(folder.glob("*.key*")):
        raise DataError(f"{folder} already holds {existing[0].name}: choose another folder")
    for name in ("server", "client"):
        _create_pair(folder, name)
    (folder / "authorized").mkdir()
    shutil.copyfile(folder / "client.key", folder / "authorized" / "client.key")


def create_client(folder: Path, name: str) -> Path:
    """Creates and authorizes the keys of one more client. Returns the folder to copy to its node. Raises: DataError."""
    if not _CLIENT_NAME.fullmatch(name):
        raise DataError(f"a client's name must be 1 to 64 of A-Z a-z 0-9 _ -, got {name!r}")
    Keys(folder).server_public()
    client, public = folder / "clients" / name, folder / "authorized" / f"{name}.key"
    if client.exists() or public.exists():
        raise DataError(
            f"{folder} already has a client {name}: choose another name, or delete {public} to revoke its access"
        )
    client.mkdir(parents=True, mode=0o700)
    _create_pair(client, "client")
    shutil.copyfile(folder / "server.key", client / "server.key")
    shutil.copyfile(client / "client.key", public)
    return client


def _create_pair(folder: Path, name: str) -> None:
    os.chmod(zmq.auth.create_certificates(folder, name)[1], 0o600)


S = TypeVar("S", bound="Socket")


class Transport:
    """The sockets of one process. `close()` closes all of them and discards messages that are not yet sent.

    Every method that opens a socket raises UnreachableError, SecurityError or DataError (unusable keys).
    """

    def __init__(self, *, keys: Path | None = None) -> None:
        self._context = zmq.Context()
        self._keys = Keys(keys) if keys is not None else None
        self._authenticator: AsyncioAuthenticator | None = None
        self._sockets: list[Socket] = []

    def router(self, address: str, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> Router:
        """Opens and binds a ROUTER (port 0: a free port). A peer that sends a larger frame is disconnected."""
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        bound = self._bind(socket, address, max_frame_bytes=max_frame_bytes)
        return self._register(Router(socket, bound, RateLimit()))

    def publisher(self, address: str) -> Publisher:
        """Opens and binds a PUB."""
        socket = self._context.socket(zmq.PUB)
        return self._register(Publisher(socket, self._bind(socket, address)))

    def dealer(self, address: str) -> Dealer:
        """Opens a DEALER that reconnects without limit, and queues no message while it is not connected."""
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        return self._register(Dealer(socket, self._connect(socket, address)))

    def subscriber(self, address: str) -> Subscriber:
        """Opens a SUB that receives every message."""
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        return self._register(Subscriber(socket, self._connect(socket, address)))

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)

    def _register(self, socket: S) -> S:
        self._sockets.append(socket)
        return socket

    def _bind(self, socket: zmq.Socket[bytes], address: str, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> str:
        _set_limits(socket, max_frame_bytes)
        busy = "; stop the process that holds it or choose another port"
        with _closed_on_error(socket, f"cannot listen on {address}", busy):
            if self._keys is None:
                remedy = "make them with `palimpsest keys DIR` and set network.keys (or --keys) to DIR"
                require_loopback(address, remedy)
            else:
                self._serve_curve(socket, self._keys)
            socket.bind(address)
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

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
        _set_limits(socket)
        with _closed_on_error(socket, f"cannot connect to {address}"):
            if self._keys is None:
                remedy = "copy client.key_secret and server.key from the server's keys folder and give them with"
                require_loopback(address, f"{remedy} network.keys (or --keys)")
            else:
                socket.curve_publickey, socket.curve_secretkey = self._keys.pair("client")
                socket.curve_serverkey = self._keys.server_public()
            socket.connect(address)
        return address


class Socket:
    """Base of all sockets. `address`: the address it is bound to (with the real port) or connected to."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self._socket = socket
        self._waiter = SocketWaiter(int(socket.getsockopt(zmq.FD)), lambda: int(socket.getsockopt(zmq.EVENTS)))
        self._num_received = 0
        self.address = address

    def close(self) -> None:
        self._waiter.close()
        self._socket.close(linger=0)

    async def _recv(self) -> list[Buffer]:
        """Returns the frames of the next message, not copied."""
        self._num_received += 1
        if self._num_received % _YIELD_EVERY == 0:
            await asyncio.sleep(0)
        while True:
            try:
                frames = [self._socket.recv(zmq.NOBLOCK, copy=False)]
                while frames[-1].more:
                    frames.append(self._socket.recv(copy=False))
            except zmq.Again:
                await self._waiter.wait(zmq.POLLIN)
            else:
                self._waiter.after_operation()
                return [frame.buffer for frame in frames]

    def _send_nowait(self, frames: Sequence[Buffer]) -> None:
        """Queues the whole message, or nothing and raises (zmq.Again: not connected or full). Copies small messages."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=sum(map(len, frames)) < _MIN_ZERO_COPY_BYTES)
        finally:  # a send that fails consumes the descriptor's signal too
            self._waiter.after_operation()


class Router(Socket):
    """Exchanges messages with many peers. A peer is identified by opaque bytes, valid until it disconnects.

    Messages of a peer that exceeds its rate limit are dropped and counted in `num_dropped`.
    """

    def __init__(self, socket: zmq.Socket[bytes], address: str, limit: RateLimit) -> None:
        super().__init__(socket, address)
        self._limit = limit
        self.num_dropped = 0

    async def recv(self) -> tuple[bytes, list[Buffer]]:
        """Returns (peer, frames) of the next message that its rate limit admits. Frames are not copied."""
        while True:
            identity, *frames = await self._recv()
            peer = bytes(identity)
            if self._limit.admits(peer, header_bytes=len(frames[0]) if frames else 0, now_s=time.monotonic()):
                return peer, frames
            self.num_dropped += 1

    def penalize(self, peer: bytes) -> None:
        """Charges a message that could not be decoded to the peer's rate limit."""
        self._limit.penalize(peer, now_s=time.monotonic())

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> bool:
        """Queues a message without waiting. Returns False, and drops it, if the peer is gone or its queue is full."""
        try:
            self._send_nowait([peer, *frames])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True


class Dealer(Socket):
    """Exchanges messages with one server, in FIFO order, and reconnects. A broken connection loses queued messages."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        super().__init__(socket, address)
        self._send_lock = asyncio.Lock()
        self._num_waiting_sends = 0

    async def recv(self) -> list[Buffer]:
        return await self._recv()

    async def send(self, frames: Sequence[Buffer], *, timeout_s: float = 30.0) -> None:
        """Queues a message; waits while not connected or the queue is full. Raises: TimeoutError (nothing sent)."""
        if self.try_send(frames):
            return
        self._num_waiting_sends += 1
        try:
            async with asyncio.timeout(timeout_s), self._send_lock:
                while not self._send_if_room(frames):
                    await self._waiter.wait(zmq.POLLOUT)
        finally:
            self._num_waiting_sends -= 1

    def try_send(self, frames: Sequence[Buffer]) -> bool:
        """Queues a message without waiting. Returns False (nothing sent) if not connected, full, or a `send` waits."""
        return not self._num_waiting_sends and self._send_if_room(frames)

    def _send_if_room(self, frames: Sequence[Buffer]) -> bool:
        """Queues a message, ignoring FIFO order. Returns False if there is no connection or its queue is full."""
        try:
            self._send_nowait(frames)
        except zmq.Again:
            return False
        return True


class Subscriber(Socket):
    async def recv(self) -> list[Buffer]:
        return await self._recv()


class Publisher(Socket):
    def send(self, frames: Sequence[Buffer]) -> None:
        """Publishes a message without waiting. A subscriber whose queue is full misses it."""
        self._send_nowait(frames)


def _set_limits(socket: zmq.Socket[bytes], max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.setsockopt(zmq.SNDHWM, _SEND_LIMIT)
    socket.setsockopt(zmq.RCVHWM, _RECEIVE_LIMIT)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20_000)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)


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
