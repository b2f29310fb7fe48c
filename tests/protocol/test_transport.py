"""Sockets: loopback by default, CURVE keys beyond it, typed errors, requests matched to their replies."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.addresses import is_loopback
from protocol.errors import DataError, ProtocolError, RemoteError, SecurityError, UnreachableError
from protocol.framing import decode, encode
from protocol.messages import Drain
from protocol.request_client import RequestClient
from protocol.search_messages import ErrorReply, SearchReply, SearchRequest
from protocol.transport import Transport, create_keys
from tests.protocol.echo import Open

WAIT_S = 20.0
# How long a test waits for a message that must not arrive. It limits the test's time, not its strictness.
REFUSED_S = 0.5


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    create_keys(tmp_path / "keys")
    return tmp_path / "keys"


def client_keys(keys: Path, folder: Path) -> Path:
    """Copies the files that another node needs according to `palimpsest keys`."""
    folder.mkdir()
    for name in ("client.key_secret", "server.key"):
        shutil.copy(keys / name, folder / name)
    return folder


async def exchange(server: Transport, client: Transport, *, timeout_s: float = WAIT_S) -> list[bytes]:
    """Sends a message to a router that echoes it, and returns the frames that the client receives."""
    router = server.router("tcp://127.0.0.1:0")
    dealer = client.dealer(router.address)

    async def echo() -> None:
        while True:
            peer, frames = await router.recv()
            router.send(peer, frames)

    echoing = asyncio.create_task(echo())
    try:
        async with asyncio.timeout(timeout_s):
            await dealer.send([b"hello", b"x" * 100_000])
            return [bytes(frame) for frame in await dealer.recv()]
    finally:
        echoing.cancel()
        await asyncio.wait([echoing])


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.8.8.8:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("http://localhost:30000/x", True),
        ("ipc:///tmp/x", True),
        ("inproc://x", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://[::]:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://127.0.0.1.example.org:1", False),
        ("tcp://localhost.example.org:1", False),
        ("http://127.0.0.1@example.org/", False),
        ("127.0.0.1:1", False),
        ("", False),
    ],
)
def test_is_loopback_is_true_only_for_addresses_of_this_machine(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://10.1.2.3:7310"])
async def test_addresses_beyond_loopback_are_refused_without_keys(transport: Open, address: str) -> None:
    plain = transport()
    for bind in (plain.router, plain.publisher):
        with pytest.raises(
            SecurityError, match=r"beyond loopback and needs CURVE keys: make them with .palimpsest keys"
        ):
            bind(address)
    for connect in (plain.dealer, plain.subscriber):
        with pytest.raises(SecurityError, match=r"copy client.key_secret and server.key"):
            connect(address)


async def test_loopback_works_without_keys(transport: Open) -> None:
    assert await exchange(transport(), transport()) == [b"hello", b"x" * 100_000]


async def test_curve_accepts_authorized_keys(transport: Open, keys: Path, tmp_path: Path) -> None:
    client = transport(client_keys(keys, tmp_path / "node"))
    assert await exchange(transport(keys), client) == [b"hello", b"x" * 100_000]


async def test_curve_server_ignores_a_client_without_keys(transport: Open, keys: Path) -> None:
    with pytest.raises(TimeoutError):
        await exchange(transport(keys), transport(), timeout_s=REFUSED_S)


async def test_curve_server_ignores_unauthorized_keys_until_they_are_authorized(
    transport: Open, keys: Path, tmp_path: Path
) -> None:
    """The client has the server's public key, but its own public key is not in authorized/ at first."""
    create_keys(tmp_path / "foreign")
    foreign = client_keys(tmp_path / "foreign", tmp_path / "node")
    shutil.copy(keys / "server.key", foreign / "server.key")
    with pytest.raises(TimeoutError):
        await exchange(transport(keys), transport(foreign), timeout_s=REFUSED_S)
    shutil.copy(tmp_path / "foreign" / "client.key", keys / "authorized" / "foreign.key")
    assert await exchange(transport(keys), transport(foreign)) == [b"hello", b"x" * 100_000]


async def test_curve_client_ignores_a_server_with_other_keys(transport: Open, keys: Path, tmp_path: Path) -> None:
    create_keys(tmp_path / "foreign")
    with pytest.raises(TimeoutError):
        await exchange(transport(tmp_path / "foreign"), transport(keys), timeout_s=REFUSED_S)


async def test_unusable_keys_are_refused_with_the_remedy(transport: Open, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no authorized/ in keys folder"):
        transport(tmp_path / "empty").router("tcp://127.0.0.1:0")
    with pytest.raises(DataError, match=r"no client.key_secret in keys folder .*: make one with"):
        transport(tmp_path / "empty").dealer("tcp://127.0.0.1:1")
    (keys / "client.key_secret").chmod(0o644)
    with pytest.raises(SecurityError, match=r"can be read by others: run .chmod 600 "):
        transport(keys).dealer("tcp://127.0.0.1:1")
    with pytest.raises(DataError, match="already holds"):
        create_keys(keys)


async def test_an_address_in_use_and_an_invalid_address_are_refused(transport: Open) -> None:
    sockets = transport()
    router = sockets.router("tcp://127.0.0.1:0")
    with pytest.raises(UnreachableError, match=rf"cannot listen on {router.address}: Address already in use; stop"):
        sockets.router(router.address)
    with pytest.raises(UnreachableError, match=r"cannot connect to tcp://127.0.0.1"):
        sockets.dealer("tcp://127.0.0.1")


@pytest.mark.parametrize("is_unknown", [False, True])
async def test_a_send_does_not_stop_a_waiting_receive_from_waking(transport: Open, is_unknown: bool) -> None:
    """A send consumes the signal of the edge-triggered descriptor, also if it fails; the receiver must still wake."""
    router = transport().router("tcp://127.0.0.1:0")
    dealer = transport().dealer(router.address)
    await dealer.send([b"hello"])
    async with asyncio.timeout(WAIT_S):
        peer, _ = await router.recv()
        for _ in range(3):
            waiting = asyncio.create_task(router.recv())
            await asyncio.sleep(0)
            assert dealer.try_send([b"again"])
            time.sleep(0.02)  # noqa: ASYNC251 (the message arrives while the event loop is blocked)
            assert router.send(b"unknown" if is_unknown else peer, [b"there"]) is not is_unknown
            assert (await waiting)[1] == [b"again"]


async def test_a_cancelled_receive_loses_no_message(transport: Open) -> None:
    router = transport().router("tcp://127.0.0.1:0")
    dealer = transport().dealer(router.address)
    waiting = asyncio.create_task(router.recv())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await dealer.send([b"hello"])
    async with asyncio.timeout(WAIT_S):
        assert (await router.recv())[1] == [b"hello"]


async def test_pending_sends_keep_their_order_once_the_server_starts(transport: Open) -> None:
    first = transport()
    address = first.router("tcp://127.0.0.1:0").address
    first.close()
    dealer = transport().dealer(address)
    assert not dealer.try_send([b"lost"])
    with pytest.raises(TimeoutError):
        await dealer.send([b"too early"], timeout_s=0.01)
    sending = [asyncio.create_task(dealer.send([b"%d" % i], timeout_s=WAIT_S)) for i in range(5)]
    await asyncio.sleep(0)
    assert not dealer.try_send([b"out of turn"])
    router = transport().router(address)
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*sending)
        assert [bytes((await router.recv())[1][0]) for _ in range(5)] == [b"%d" % i for i in range(5)]


async def test_closing_a_socket_twice_does_not_disturb_the_next_socket(transport: Open) -> None:
    """The next socket may get the file descriptor of the first."""
    sockets = transport()
    first = sockets.router("tcp://127.0.0.1:0")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await first.recv()
    first.close()
    router = sockets.router("tcp://127.0.0.1:0")
    waiting = asyncio.create_task(router.recv())
    await asyncio.sleep(0)
    first.close()
    await transport().dealer(router.address).send([b"hello"])
    async with asyncio.timeout(WAIT_S):
        assert (await waiting)[1] == [b"hello"]


async def test_a_router_drops_messages_to_a_disconnected_peer(transport: Open) -> None:
    server, client = transport(), transport()
    router = server.router("tcp://127.0.0.1:0")
    dealer = client.dealer(router.address)
    await dealer.send([b"hello"])
    async with asyncio.timeout(WAIT_S):
        peer, _ = await router.recv()
        assert router.send(peer, [b"there"])
        client.close()
        while router.send(peer, [b"ping"]):  # noqa: ASYNC110 (libzmq sends no event when it detects the disconnection)
            await asyncio.sleep(0.01)
    assert not router.send(b"unknown", [b""])


# --- requests ---


@pytest.fixture
async def served(transport: Open) -> AsyncIterator[RequestClient]:
    """A client of a server that answers by query: an echo, an error, another kind, unmatched replies, or nothing."""
    router = transport().router("tcp://127.0.0.1:0")

    async def serve() -> None:
        while True:
            peer, frames = await router.recv()
            request, _ = decode(frames)
            assert isinstance(request, SearchRequest)
            reply = SearchReply(request_id=request.request_id, results=[])
            match request.queries[0]:
                case "error":
                    router.send(peer, [encode(ErrorReply(request_id=request.request_id, error="no such index"))])
                case "other kind":
                    router.send(peer, [encode(request)])
                case "noise":
                    late = SearchReply(request_id=request.request_id + 1_000, results=[])
                    for message in (b"", b"\xff\xff", encode(late), encode(Drain())):
                        router.send(peer, [message])
                    router.send(peer, [encode(reply)])
                    router.send(peer, [encode(reply)])
                case "silence":
                    pass
                case _:
                    router.send(peer, [encode(reply), request.queries[0].encode()])

    serving = asyncio.create_task(serve())
    async with RequestClient(transport().dealer(router.address)) as client:
        yield client
    serving.cancel()
    await asyncio.wait([serving])


async def search(client: RequestClient, query: str, *, timeout_s: float = WAIT_S) -> list[bytes]:
    request = SearchRequest(request_id=client.next_id(), queries=[query], top_n=1)
    reply, payload = await client.request(request, SearchReply, timeout_s=timeout_s)
    assert reply.request_id == request.request_id
    return [bytes(frame) for frame in payload]


async def test_concurrent_requests_get_their_own_replies(served: RequestClient) -> None:
    answers = await asyncio.gather(*(search(served, f"q{i}") for i in range(50)))
    assert answers == [[f"q{i}".encode()] for i in range(50)]


async def test_a_failed_request_raises_its_typed_error_and_the_client_stays_usable(served: RequestClient) -> None:
    with pytest.raises(RemoteError, match=r"search at tcp://.*: no such index"):
        await search(served, "error")
    with pytest.raises(ProtocolError, match="expected search_reply, got search"):
        await search(served, "other kind")
    with pytest.raises(TimeoutError, match=r"no answer to search from tcp://.* in 0.05 s"):
        await search(served, "silence", timeout_s=0.05)
    assert await search(served, "still here") == [b"still here"]


async def test_unmatched_and_malformed_replies_are_dropped_and_counted(served: RequestClient) -> None:
    assert await search(served, "noise") == []
    assert await search(served, "after") == [b"after"]
    assert served.num_dropped == 5


async def test_leaving_the_client_cancels_pending_requests(transport: Open) -> None:
    async with RequestClient(transport().dealer("tcp://127.0.0.1:1")) as client:
        asking = asyncio.create_task(search(client, "q"))
        await asyncio.sleep(0)
    await asyncio.wait([asking], timeout=WAIT_S)
    assert asking.cancelled()
