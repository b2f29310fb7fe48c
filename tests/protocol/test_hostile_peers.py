"""Peers that flood, steal an identity, send garbage or never finish a handshake harm only their own connection."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from protocol.errors import DataError
from protocol.keys import AllowList
from protocol.rate_limit import (
    FLOODING_AFTER,
    MAX_PEERS,
    Admission,
    PeerRate,
    RateLimit,
)
from protocol.transport import create_client, create_keys
from tests.protocol.echo import WAIT_S, Open, echoed, echoing

REFUSED_S = 0.5
RATE = PeerRate()
BURST = RATE.burst


# --- rate limits ---


def num_admitted(limit: RateLimit, peer: bytes, num: int, *, now_s: float, header_bytes: int = 0) -> int:
    """Sends `num` messages. Returns how many are admitted."""
    admissions = [limit.admit(peer, header_bytes=header_bytes, now_s=now_s) for _ in range(num)]
    return admissions.count(Admission.ADMITTED)


def rested(peer: bytes) -> RateLimit:
    """A rate limit that knows `peer`, at the time 0, with a full bucket."""
    limit = RateLimit()
    assert num_admitted(limit, peer, 1, now_s=-1e6) == 1
    return limit


def test_a_peer_may_spend_its_burst_and_then_its_rate() -> None:
    limit = rested(b"a")
    assert num_admitted(limit, b"a", int(BURST) + 100, now_s=0.0) == BURST
    assert num_admitted(limit, b"b", 1, now_s=0.0) == 1
    assert num_admitted(limit, b"a", int(BURST), now_s=0.1) == pytest.approx(0.1 * RATE.per_s, abs=1)
    assert num_admitted(limit, b"a", 2 * int(BURST), now_s=1e6) == BURST


def test_long_headers_and_refused_messages_cost_more() -> None:
    assert num_admitted(rested(b"a"), b"a", 1_000, now_s=0.0, header_bytes=4 << 20) == -(-BURST // 1025)
    limit, num = rested(b"b"), 0
    while num_admitted(limit, b"b", 1, now_s=0.0):
        limit.penalize(b"b", now_s=0.0)
        num += 1
    assert num == BURST // RATE.refusal_cost
    assert num_admitted(limit, b"b", 1, now_s=0.0) == 0
    assert num_admitted(limit, b"b", 1, now_s=1.0) == 1


def test_peers_that_reconnect_under_new_identities_share_one_bucket() -> None:
    limit, num = RateLimit(), 0
    for second in range(10):
        num += sum(
            num_admitted(limit, b"%d" % i, 1_000, now_s=float(second)) for i in range(second * 100, 100 + second * 100)
        )
    assert num < RATE.newcomer_pool + 10 * RATE.newcomer_per_s + 4 * 1_000
    assert num_admitted(limit, b"honest", 1, now_s=10.0) == 1


def test_a_peer_that_continues_to_send_while_its_messages_are_dropped_is_flooding() -> None:
    limit = rested(b"a")
    num_admitted(limit, b"a", int(BURST) + FLOODING_AFTER, now_s=0.0)
    assert limit.admit(b"a", header_bytes=0, now_s=0.0) is Admission.FLOODING
    assert limit.admit(b"a", header_bytes=0, now_s=BURST) is Admission.ADMITTED
    num_admitted(limit, b"a", int(BURST), now_s=BURST)
    assert limit.admit(b"a", header_bytes=0, now_s=BURST) is Admission.DROPPED


def test_the_number_of_rate_buckets_is_bounded() -> None:
    limit = RateLimit()
    for i in range(30_000):
        limit.admit(b"%d" % i, header_bytes=0, now_s=0.0)
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
