"""The kinds of ZeroMQ sockets that processes use. `protocol.transport` opens them; only these two files import zmq."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import zmq

from protocol.connection_guard import FRAME_OVERHEAD_BYTES, GuardedSocket
from protocol.framing import Buffer
from protocol.rate_limit import Admission, RateLimit
from protocol.socket_wait import SocketWaiter

T = TypeVar("T")

# A receiver yields to the event loop after this number of messages, even if more are waiting.
_YIELD_EVERY = 32
# Smaller messages are copied: libzmq's notice, from another thread, that a buffer is free costs more than the copy.
_MIN_ZERO_COPY_BYTES = 1 << 20


class Socket:
    """Base of all sockets. `address`: the address it is bound to (with the real port) or connected to."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, guarded: GuardedSocket | None = None) -> None:
        self._socket = socket
        self._guarded = guarded
        self._waiter = SocketWaiter(int(socket.getsockopt(zmq.FD)), lambda: int(socket.getsockopt(zmq.EVENTS)))
        self._num_received = 0
        self.address = address

    @property
    def num_connections(self) -> int:
        """Number of open connections of a bound TCP socket; 0 if they cannot be guarded (ipc, or not Linux)."""
        return 0 if self._guarded is None else self._guarded.num_connections

    def close(self) -> None:
        if self._guarded is not None:
            self._guarded.closed = True
        self._waiter.close()
        self._socket.close(linger=0)

    async def _recv(self) -> list[zmq.Frame]:
        """Returns the frames of the next message, not copied."""
        return await self._next(self._read_frames)

    async def _next(self, read: Callable[[], T]) -> T:
        """Waits for a message and returns the result of `read`, which raises zmq.Again if there is none."""
        self._num_received += 1
        if self._num_received % _YIELD_EVERY == 0:
            await asyncio.sleep(0)
        while True:
            try:
                received = read()
            except zmq.Again:
                if self._guarded is not None:
                    self._guarded.on_empty()
                await self._waiter.wait(zmq.POLLIN)
            else:
                self._waiter.after_operation()
                return received

    def _read_frames(self) -> list[zmq.Frame]:
        frames = [self._socket.recv(zmq.NOBLOCK, copy=False)]
        while frames[-1].more:
            frames.append(self._socket.recv(copy=False))
        return frames

    def _send_nowait(self, frames: Sequence[Buffer]) -> None:
        """Queues the whole message, or nothing and raises (zmq.Again: not connected or full). Copies small messages."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=sum(map(len, frames)) < _MIN_ZERO_COPY_BYTES)
        finally:  # a send that fails consumes the descriptor's signal too
            self._waiter.after_operation()


class Router(Socket):
    """Exchanges messages with many peers. A peer is identified by opaque bytes, valid until it disconnects.

    Messages of a peer that exceeds its rate limit are dropped and counted in `num_dropped`; if it continues, its
    connection is closed. `guarded`: its connections, None if they cannot be guarded (ipc, or not Linux).
    """

    def __init__(
        self, socket: zmq.Socket[bytes], address: str, limit: RateLimit, guarded: GuardedSocket | None
    ) -> None:
        super().__init__(socket, address, guarded)
        self._limit = limit
        self.num_dropped = 0

    async def recv(self) -> tuple[bytes, list[Buffer]]:
        """Returns (peer, frames) of the next message that its rate limit admits. Frames are not copied."""
        while True:
            peer, frames = await self._next(self._read_from_peer)
            sizes = list(map(len, frames))
            fd = -1
            if self._guarded is not None:
                fd = int(frames[-1].get(zmq.SRCFD))
                self._guarded.on_read(fd, sum(sizes) + FRAME_OVERHEAD_BYTES * len(sizes))
            admission = self._limit.admit(peer, header_bytes=sizes[0], num_bytes=sum(sizes), now_s=time.monotonic())
            if admission is Admission.ADMITTED:
                return peer, [frame.buffer for frame in frames]
            self.num_dropped += 1
            if admission is Admission.FLOODING and self._guarded is not None:
                self._guarded.disconnect(fd, "it exceeds its rate limit")

    def _read_from_peer(self) -> tuple[bytes, list[zmq.Frame]]:
        """Returns the peer and the frames of the next message. Makes no buffers: they cost more than all else here, and
        a message that is dropped needs none."""
        peer = self._socket.recv(zmq.NOBLOCK)
        return peer, self._read_frames()

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
        return [frame.buffer for frame in await self._recv()]

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
        return [frame.buffer for frame in await self._recv()]


class Publisher(Socket):
    def send(self, frames: Sequence[Buffer]) -> None:
        """Publishes a message without waiting. A subscriber whose queue is full misses it."""
        self._send_nowait(frames)
