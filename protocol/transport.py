"""The one file that imports zmq: sockets with limits, CURVE and typed errors.

Loopback (or ipc) by default. Any other address needs CURVE keys, on both sides; a server admits only the public keys in
its `authorized` folder. What a peer may send, and how much of it, is limited: docs/security.md.
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
from protocol.socket_wait import Readiness

# Messages queued towards one peer before sending waits (DEALER) or drops (ROUTER, PUB).
_SEND_LIMIT = 1_000
# Messages of one peer received and not yet read. With MAX_FRAME_BYTES it bounds what a hostile peer can make us hold.
_RECEIVE_LIMIT = 64
# A receiver that is never out of messages lets others have the loop after so many.
_YIELD_EVERY = 32
# Below it a message is copied: to be told, by another thread, when its buffers are free costs more.
_COPIED_BYTES = 1 << 20
_CLIENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def create_keys(folder: Path) -> None:
    """Writes a server pair, a client pair and the allow-list with that client. Raises: DataError if they exist."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if existing := sorted(folder.glob("*.key*")):
        raise DataError(f"{folder} already holds {existing[0].name}: choose another folder")
    for name in ("server", "client"):
        _create_pair(folder, name)
    (folder / "authorized").mkdir()
    shutil.copyfile(folder / "client.key", folder / "authorized" / "client.key")


def create_client(folder: Path, name: str) -> Path:
    """One more client of the server of `folder`, let in: the folder for its node. Raises: DataError."""
    if not _CLIENT_NAME.fullmatch(name):
        raise DataError(f"a client's name must be 1 to 64 of A-Z a-z 0-9 _ -, got {name!r}")
    Keys(folder).server_public()
    client, public = folder / "clients" / name, folder / "authorized" / f"{name}.key"
    if client.exists() or public.exists():
        raise DataError(f"{folder} already has a client {name}: choose another name, or delete {public} to shut it out")
    client.mkdir(parents=True, mode=0o700)
    _create_pair(client, "client")
    shutil.copyfile(folder / "server.key", client / "server.key")
    shutil.copyfile(client / "client.key", public)
    return client


def _create_pair(folder: Path, name: str) -> None:
    os.chmod(zmq.auth.create_certificates(folder, name)[1], 0o600)


S = TypeVar("S", bound="Socket")


class Transport:
    """One process's sockets. `close()` closes all of them; nothing lingers."""

    def __init__(self, *, keys: Path | None = None) -> None:
        self._context = zmq.Context()
        self._keys = Keys(keys) if keys is not None else None
        self._authenticator: AsyncioAuthenticator | None = None
        self._sockets: list[Socket] = []

    def router(self, address: str, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> Router:
        """A bound ROUTER; port 0 takes a free one (see `.address`). Who sends a larger frame is disconnected.

        Raises: UnreachableError, SecurityError.
        """
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        bound = self._bind(socket, address, max_frame_bytes=max_frame_bytes)
        return self._keep(Router(socket, bound, RateLimit()))

    def publisher(self, address: str) -> Publisher:
        """A bound PUB. Raises: UnreachableError, SecurityError."""
        socket = self._context.socket(zmq.PUB)
        return self._keep(Publisher(socket, self._bind(socket, address)))

    def dealer(self, address: str) -> Dealer:
        """A DEALER that reconnects for ever; nothing queues up while no server is there. Raises: SecurityError."""
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        return self._keep(Dealer(socket, self._connect(socket, address)))

    def subscriber(self, address: str) -> Subscriber:
        """A SUB to everything. Raises: SecurityError."""
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        return self._keep(Subscriber(socket, self._connect(socket, address)))

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=0)

    def _keep(self, socket: S) -> S:
        self._sockets.append(socket)
        return socket

    def _bind(self, socket: zmq.Socket[bytes], address: str, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> str:
        _set_limits(socket, max_frame_bytes)
        with _closed_on_error(
            socket, f"cannot listen on {address}", "; stop the process that holds it or choose another port"
        ):
            if self._keys is None:
                require_loopback(
                    address, "make them with `palimpsest keys DIR` and set network.keys (or --keys) to DIR"
                )
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
                copy = "copy client.key_secret and server.key from the server's keys folder"
                require_loopback(address, f"{copy} and give them with network.keys (or --keys)")
            else:
                socket.curve_publickey, socket.curve_secretkey = self._keys.pair("client")
                socket.curve_serverkey = self._keys.server_public()
            socket.connect(address)
        return address


class Socket:
    """Common to all: an address and a close."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        self._socket = socket
        self._ready = Readiness(int(socket.getsockopt(zmq.FD)), lambda: int(socket.getsockopt(zmq.EVENTS)))
        self._num_received = 0
        self.address = address

    def close(self) -> None:
        self._ready.close()
        self._socket.close(linger=0)

    async def _recv(self) -> list[Buffer]:
        """The frames of a message, not copied."""
        self._num_received += 1
        if self._num_received % _YIELD_EVERY == 0:
            await asyncio.sleep(0)
        while True:
            try:
                frames = [self._socket.recv(zmq.NOBLOCK, copy=False)]
                while frames[-1].more:
                    frames.append(self._socket.recv(copy=False))
            except zmq.Again:
                await self._ready.wait(zmq.POLLIN)
            else:
                self._ready.operated()
                return [frame.buffer for frame in frames]

    def _try_send(self, frames: Sequence[Buffer]) -> None:
        """All of them or, where it raises (zmq.Again: the queue is full), none. Large ones are not copied."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=sum(map(len, frames)) < _COPIED_BYTES)
        finally:  # where it fails, too, it has used the signal up
            self._ready.operated()


class Router(Socket):
    """Talks to many peers, each known by an opaque identity for as long as its connection lives.

    A peer that sends too much, or what must be refused, has its messages dropped for a while: `num_dropped`.
    """

    def __init__(self, socket: zmq.Socket[bytes], address: str, limit: RateLimit) -> None:
        super().__init__(socket, address)
        self._limit = limit
        self.num_dropped = 0

    async def recv(self) -> tuple[bytes, list[Buffer]]:
        """(peer, frames): frames are not copied."""
        while True:
            identity, *frames = await self._recv()
            peer = bytes(identity)
            if self._limit.admits(peer, header_bytes=len(frames[0]) if frames else 0, now_s=time.monotonic()):
                return peer, frames
            self.num_dropped += 1

    def refused(self, peer: bytes) -> None:
        """A message of this peer could not be read: a few may be a defect, many are hostile."""
        self._limit.refuse(peer, now_s=time.monotonic())

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> bool:
        """False where the peer is gone or does not read (its queue is full): the message is dropped. Never waits."""
        try:
            self._try_send([peer, *frames])
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True


class Dealer(Socket):
    """Talks to one server, in order, across reconnects; what was queued when a connection broke is lost."""

    def __init__(self, socket: zmq.Socket[bytes], address: str) -> None:
        super().__init__(socket, address)
        self._sending = asyncio.Lock()
        self._num_sending = 0

    async def recv(self) -> list[Buffer]:
        return await self._recv()

    async def send(self, frames: Sequence[Buffer], *, timeout_s: float = 30.0) -> None:
        """Raises: TimeoutError where in all that time the server was not there, or did not read (the queue is full)."""
        if self.try_send(frames):
            return
        self._num_sending += 1
        try:
            async with asyncio.timeout(timeout_s), self._sending:
                while not self._has_sent(frames):
                    await self._ready.wait(zmq.POLLOUT)
        finally:
            self._num_sending -= 1

    def try_send(self, frames: Sequence[Buffer]) -> bool:
        """False where the server is not there or does not read (the queue is full): nothing was sent. Never waits."""
        return not self._num_sending and self._has_sent(frames)  # not before those whose turn it is

    def _has_sent(self, frames: Sequence[Buffer]) -> bool:
        try:
            self._try_send(frames)
        except zmq.Again:
            return False
        return True


class Subscriber(Socket):
    async def recv(self) -> list[Buffer]:
        return await self._recv()


class Publisher(Socket):
    def send(self, frames: Sequence[Buffer]) -> None:
        """Who does not read misses it. Never waits."""
        self._try_send(frames)


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
    """Raises: UnreachableError in place of ZeroMQ's own, whose text repeats the address."""
    try:
        yield
    except BaseException as error:
        socket.close(linger=0)
        if isinstance(error, zmq.ZMQError):
            reason = zmq.strerror(error.errno) if error.errno is not None else str(error)
            raise UnreachableError(f"{failed}: {reason}{remedy}") from error
        raise
