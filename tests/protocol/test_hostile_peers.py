"""Peers that flood, steal an identity, send garbage or never finish a handshake harm only their own connection."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from protocol.errors import DataError
from protocol.keys import AllowList
from protocol.rate_limit import BURST, MAX_PEERS, RATE_PER_S, REFUSAL_COST, RateLimit
from protocol.transport import Dealer, Router, Transport, create_client, create_keys

WAIT_S = 20.0
REFUSED_S = 0.5

Open = Callable[..., Transport]


@pytest.fixture
async def transport() -> AsyncIterator[Open]:
    opened: list[Transport] = []

    def make(keys: Path | None = None) -> Transport:
        opened.append(Transport(keys=keys))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@asynccontextmanager
async def echoing(router: Router) -> AsyncIterator[None]:
    """Runs a server that echoes every message, and penalizes the sender of a message `bad` instead."""

    async def echo() -> None:
        while True:
            peer, frames = await router.recv()
            if frames and bytes(frames[0]) == b"bad":
                router.penalize(peer)
            else:
                router.send(peer, frames)

    task = asyncio.create_task(echo())
    yield
    task.cancel()
    await asyncio.wait([task])


async def echoed(dealer: Dealer, text: bytes, *, timeout_s: float = WAIT_S) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await dealer.send([text])
            return bytes((await dealer.recv())[0]) == text
    except TimeoutError:
        return False


# --- rate limits ---


def test_a_peer_may_spend_its_burst_and_then_its_rate() -> None:
    limit = RateLimit()
    admitted = sum(limit.admits(b"a", header_bytes=0, now_s=0.0) for _ in range(int(BURST) + 100))
    assert admitted == BURST
    assert limit.admits(b"b", header_bytes=0, now_s=0.0)
    assert not limit.admits(b"a", header_bytes=0, now_s=0.0)
    admitted = sum(limit.admits(b"a", header_bytes=0, now_s=0.1) for _ in range(int(BURST)))
    assert admitted == pytest.approx(0.1 * RATE_PER_S, abs=1)
    admitted = sum(limit.admits(b"a", header_bytes=0, now_s=1e6) for _ in range(2 * int(BURST)))
    assert admitted == BURST


def test_long_headers_and_refused_messages_cost_more() -> None:
    limit = RateLimit()
    assert sum(limit.admits(b"a", header_bytes=4 << 20, now_s=0.0) for _ in range(1_000)) == -(-BURST // 1025)
    num = 0
    while limit.admits(b"b", header_bytes=0, now_s=0.0):
        limit.penalize(b"b", now_s=0.0)
        num += 1
    assert num == BURST // REFUSAL_COST
    assert not limit.admits(b"b", header_bytes=0, now_s=0.0)
    assert limit.admits(b"b", header_bytes=0, now_s=1.0)


def test_the_number_of_rate_buckets_is_bounded() -> None:
    limit = RateLimit()
    for i in range(30_000):
        limit.admits(b"%d" % i, header_bytes=0, now_s=0.0)
    assert limit.num_peers == MAX_PEERS


# --- sockets ---


async def test_a_flood_is_dropped_and_other_peers_are_served(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0")
    hostile, honest = transport().dealer(router.address), transport().dealer(router.address)
    async with echoing(router):
        assert await echoed(honest, b"before")
        while router.num_dropped == 0:
            hostile.try_send([b"x" * 65_536])
            await asyncio.sleep(0)
        assert await echoed(honest, b"during the flood")


async def test_a_receiver_with_many_waiting_messages_yields_to_other_tasks(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0")
    dealer = transport().dealer(router.address)
    received = 0

    async def receive() -> None:
        nonlocal received
        while True:
            await router.recv()
            received += 1

    for _ in range(500):
        await dealer.send([b""])
    receiving = asyncio.create_task(receive())
    async with asyncio.timeout(WAIT_S):
        while received == 0:  # noqa: ASYNC110 (whether this loop runs is what is tested)
            await asyncio.sleep(0)
    assert received <= 32
    receiving.cancel()
    await asyncio.wait([receiving])


async def test_messages_of_a_peer_with_many_refused_messages_are_dropped(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0")
    hostile, honest = transport().dealer(router.address), transport().dealer(router.address)
    async with echoing(router):
        assert await echoed(hostile, b"fine so far")
        for _ in range(100):
            await hostile.send([b"bad"])
        assert not await echoed(hostile, b"and now?", timeout_s=REFUSED_S)
        assert await echoed(honest, b"hello")


async def test_a_frame_that_is_too_large_ends_the_connection(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0", max_frame_bytes=1_000)
    hostile, honest = transport().dealer(router.address), transport().dealer(router.address)
    async with echoing(router):
        assert await echoed(hostile, b"x" * 1_000)
        assert not await echoed(hostile, b"x" * 1_001, timeout_s=REFUSED_S)
        assert await echoed(honest, b"hello")


async def test_a_peer_cannot_take_the_identity_of_another(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0")
    honest = transport().dealer(router.address)
    context = zmq.asyncio.Context()
    thief = context.socket(zmq.DEALER)
    try:
        await honest.send([b"hello"])
        async with asyncio.timeout(WAIT_S):
            peer, _ = await router.recv()
        thief.setsockopt(zmq.LINGER, 0)
        thief.setsockopt(zmq.ROUTING_ID, peer)
        thief.connect(router.address)
        await thief.send(b"I am it")
        assert not await thief.poll(int(REFUSED_S * 1000))
        assert router.send(peer, [b"for the honest one"])
        async with asyncio.timeout(WAIT_S):
            assert bytes((await honest.recv())[0]) == b"for the honest one"
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 10_000,
        bytes(10_000),
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(16 + 1 + 31) + b"\x04\xff" * 5_000,
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0CURVE" + bytes(15 + 1 + 31) + b"\x04\xc8\x05HELLO" + bytes(195) * 3,
    ],
)
@pytest.mark.parametrize("curve", [False, True])
async def test_clients_are_served_while_other_connections_send_garbage(
    transport: Open, tmp_path: Path, garbage: bytes, curve: bool
) -> None:
    keys = None
    if curve:
        create_keys(tmp_path / "keys")
        keys = tmp_path / "keys"
    router = transport(keys).router("tcp://127.0.0.1:0")
    port = int(router.address.rpartition(":")[2])
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    try:
        for connection in held:
            connection.sendall(garbage)
        async with echoing(router):
            assert await echoed(transport(keys).dealer(router.address), b"hello")
    finally:
        for connection in held:
            connection.close()


# --- authorization ---


async def test_each_client_has_its_own_keys_and_can_be_removed(transport: Open, tmp_path: Path) -> None:
    """Both take effect while the server runs, without a restart."""
    create_keys(tmp_path / "keys")
    router = transport(tmp_path / "keys").router("tcp://127.0.0.1:0")
    async with echoing(router):
        assert await echoed(transport(tmp_path / "keys").dealer(router.address), b"the first client")
        node = create_client(tmp_path / "keys", "node-7")
        assert sorted(path.name for path in node.iterdir()) == ["client.key", "client.key_secret", "server.key"]
        assert await echoed(transport(node).dealer(router.address), b"node-7")
        (tmp_path / "keys" / "authorized" / "node-7.key").unlink()
        assert not await echoed(transport(node).dealer(router.address), b"node-7", timeout_s=REFUSED_S)
        assert await echoed(transport(tmp_path / "keys").dealer(router.address), b"the first client")


def test_create_client_refuses_missing_server_keys_and_invalid_or_taken_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no server.key in keys folder"):
        create_client(tmp_path / "keys", "node")
    create_keys(tmp_path / "keys")
    create_client(tmp_path / "keys", "node")
    for name in ("node", "client"):
        with pytest.raises(DataError, match=f"already has a client {name}"):
            create_client(tmp_path / "keys", name)
    for name in ("", "..", "a/b", "x" * 65):
        with pytest.raises(DataError, match="a client's name must be"):
            create_client(tmp_path / "keys", name)


def test_the_allow_list_skips_broken_files_reads_them_again_and_refuses_all_if_unreadable(tmp_path: Path) -> None:
    create_keys(tmp_path / "keys")
    folder = tmp_path / "keys" / "authorized"
    key = (folder / "client.key").read_text().split('public-key = "')[1][:40].encode()
    (folder / "broken.key").write_bytes(b"\xff\x00nonsense")
    os.utime(folder, (1.0, 1.0))
    allowed = AllowList(folder)
    assert allowed.callback("*", key)
    assert not allowed.callback("*", key[::-1])
    (folder / "broken.key").write_text(
        f'public-key = "{key[::-1].decode()}"'
    )  # the folder's time stamp does not change
    assert allowed.callback("*", key[::-1])
    folder.rename(tmp_path / "gone")
    assert not allowed.callback("*", key)
    (tmp_path / "gone").rename(folder)
    assert allowed.callback("*", key)
