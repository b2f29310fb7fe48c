"""The connections of a bound socket: their number and their unread bytes are limited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import zmq
import zmq.asyncio

from protocol.connection_guard import MAX_ENDED_UNREAD, ConnectionLimits
from tests.protocol.echo import WAIT_S, Open, echoed, echoing
from tests.protocol.zmtp import connect_zmtp, send_until_closed, zmtp_frame


class RawPeer:
    """A raw pyzmq DEALER with small buffers. `closed` waits until the server has closed the connection."""

    def __init__(self, address: str) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self.socket.connect(address)

    async def event(self) -> int:
        async with asyncio.timeout(WAIT_S):
            return int.from_bytes((await self._monitor.recv_multipart())[0][:2], "little")

    async def connected(self) -> RawPeer:
        assert await self.event() == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return self

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self._context.destroy(linger=0)


@pytest.fixture
def raw_peer() -> Iterator[Callable[[str], RawPeer]]:
    opened: list[RawPeer] = []

    def make(address: str) -> RawPeer:
        opened.append(RawPeer(address))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


RawOpen = Callable[[str], RawPeer]


async def test_a_message_without_an_end_ends_its_connection(transport: Open, raw_peer: RawOpen) -> None:
    """Its frames are below the frame limit, and the event loop of the server does not run at that time."""
    limits = ConnectionLimits(max_unread_bytes=1_000_000)
    router = transport().router("tcp://127.0.0.1:0", limits=limits)
    honest = transport().dealer(router.address)
    with connect_zmtp(router.address) as hostile:
        send_until_closed(hostile, zmtp_frame(bytes(10_000), more=True))
        async with echoing(router):
            assert await echoed(honest, b"hello")


async def test_unread_messages_above_the_limit_end_their_connection(transport: Open, raw_peer: RawOpen) -> None:
    router = transport().router("tcp://127.0.0.1:0", limits=ConnectionLimits(max_unread_bytes=1_000_000))
    hostile = await raw_peer(router.address).connected()
    for _ in range(20):
        await hostile.socket.send(bytes(100_000))
    assert await hostile.event() == zmq.EVENT_DISCONNECTED


async def test_a_peer_whose_messages_are_read_may_send_more_than_the_limit(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0", limits=ConnectionLimits(max_unread_bytes=100_000))
    peer = transport().dealer(router.address)
    async with echoing(router):
        for i in range(200):
            assert await echoed(peer, b"%d" % i + bytes(10_000))


async def test_unread_bytes_of_all_connections_are_limited(transport: Open, raw_peer: RawOpen) -> None:
    limits = ConnectionLimits(max_unread_bytes=1_000_000, max_total_unread_bytes=1_500_000)
    router = transport().router("tcp://127.0.0.1:0", limits=limits)
    hostile = [await raw_peer(router.address).connected() for _ in range(3)]
    for each in hostile:
        await each.socket.send(bytes(800_000))
    assert await hostile[2].event() == zmq.EVENT_DISCONNECTED
    async with echoing(router):
        assert await echoed(transport().dealer(router.address), b"after the messages were read")


async def test_a_silent_connection_makes_room_for_a_new_one(transport: Open, raw_peer: RawOpen) -> None:
    router = transport().router("tcp://127.0.0.1:0", limits=ConnectionLimits(max_connections=3))
    first = transport().dealer(router.address)
    async with echoing(router):
        assert await echoed(first, b"a peer that sends messages")
        silent = [await raw_peer(router.address).connected() for _ in range(2)]
        assert await echoed(transport().dealer(router.address), b"one more")
        assert await silent[0].event() == zmq.EVENT_DISCONNECTED
        assert await echoed(first, b"still connected")
        assert router.num_connections <= 3


async def test_a_connection_is_refused_if_all_others_send_messages(transport: Open, raw_peer: RawOpen) -> None:
    router = transport().router("tcp://127.0.0.1:0", limits=ConnectionLimits(max_connections=2))
    peers = [transport().dealer(router.address) for _ in range(2)]
    async with echoing(router):
        for peer in peers:
            assert await echoed(peer, b"hello")
        refused = raw_peer(router.address)
        while await refused.event() != zmq.EVENT_DISCONNECTED:
            pass
        for peer in peers:
            assert await echoed(peer, b"still connected")


async def test_the_connection_of_a_peer_that_floods_is_closed(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0")
    with connect_zmtp(router.address) as hostile:
        async with echoing(router):
            await asyncio.to_thread(send_until_closed, hostile, zmtp_frame(b"flood"))
            assert await echoed(transport().dealer(router.address), b"hello")


async def test_reconnecting_leaves_a_bounded_number_of_unread_messages(transport: Open) -> None:
    """The event loop of the server does not run while a peer connects, sends a message and disconnects."""
    router = transport().router("tcp://127.0.0.1:0")
    num_accepted = 0
    with suppress(TimeoutError):
        while num_accepted < 10 * MAX_ENDED_UNREAD:
            with connect_zmtp(router.address, timeout_s=0.5) as hostile:
                hostile.sendall(zmtp_frame(b"hello"))
            num_accepted += 1
    assert MAX_ENDED_UNREAD <= num_accepted < 10 * MAX_ENDED_UNREAD
    async with echoing(router):
        assert await echoed(transport().dealer(router.address), b"after the messages were read")


async def test_subscriptions_above_the_limit_end_their_connection(transport: Open) -> None:
    publisher = transport().publisher("tcp://127.0.0.1:0")
    context = zmq.asyncio.Context()
    hostile = context.socket(zmq.SUB)
    monitor = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        hostile.connect(publisher.address)
        for i in range(200):
            hostile.setsockopt(zmq.SUBSCRIBE, b"%d" % i + bytes(900))
        async with asyncio.timeout(WAIT_S):
            await monitor.recv_multipart()
    finally:
        hostile.disable_monitor()
        monitor.close(linger=0)
        context.destroy(linger=0)
