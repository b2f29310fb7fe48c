from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgpack
import pytest

from protocol.errors import RemoteError
from protocol.framing import decode, encode
from protocol.messages import Heartbeat
from protocol.request_client import RequestClient
from protocol.search_messages import ErrorReply, SearchReply, SearchRequest
from protocol.transport import Dealer, Transport
from retriever.service import RetrieverService, ServiceLimits

TIMEOUT_S = 20.0


class Running(Protocol):
    service: RetrieverService
    address: str
    transport: Transport


Serve = Callable[..., AbstractAsyncContextManager[Running]]


class Fact(Protocol):
    subject: str
    relation: str
    text: str


async def search(client: RequestClient, *queries: str, top_n: int = 3, collection: str = "") -> SearchReply:
    request = SearchRequest(request_id=client.next_id(), queries=list(queries), top_n=top_n, collection=collection)
    reply, _ = await client.request(request, SearchReply, timeout_s=TIMEOUT_S)
    return reply


def pack(header: dict[str, object]) -> bytes:
    packed = msgpack.packb(header)
    assert packed is not None
    return packed


async def exchange(dealer: Dealer, frames: list[bytes]) -> ErrorReply:
    await dealer.send(frames)
    async with asyncio.timeout(TIMEOUT_S):
        message, _ = decode(await dealer.recv())
    assert isinstance(message, ErrorReply)
    return message


async def test_answers_in_order_best_first(serve: Serve, bow_index: Path) -> None:
    async with serve(bow_index) as running, RequestClient(running.transport.dealer(running.address)) as client:
        reply = await search(client, "green pear", "apple", "green pear", top_n=2)
        texts = [[passage.text for passage in passages] for passages in reply.results]
        assert texts[0] == texts[2] == ["green pear .", "red pear tree ."]
        assert texts[1][0] == "red apple ."
        scores = [passage.score for passage in reply.results[0]]
        assert 1 > scores[0] > scores[1] > 0
        assert [len(passages) for passages in (await search(client, "unknown word", top_n=100)).results] == [3]


async def test_many_clients_get_their_own_replies_and_share_batches(
    serve: Serve, toy_index: Path, facts: list[Fact]
) -> None:
    queried = facts[800:1184]  # Founders and marriages.
    async with serve(toy_index) as running:
        clients = [RequestClient(running.transport.dealer(running.address)) for _ in range(16)]

        async def work(number: int) -> int:
            hits = 0
            async with clients[number] as client:
                mine = queried[number::16]
                replies = await asyncio.gather(*(search(client, f"{fact.subject} {fact.relation}") for fact in mine))
                for fact, reply in zip(mine, replies, strict=True):
                    hits += fact.text in [passage.text for passage in reply.results[0]]
            return hits

        hits = sum(await asyncio.gather(*(work(number) for number in range(16))))
        stats = running.service.stats
        assert hits == len(queried) == stats.num_queries == stats.num_requests
        assert stats.num_batches < len(queried) / 2
        assert "384 queries of 384 requests" in stats.summary()


async def test_a_request_names_its_collection(
    serve: Serve, bow_index: Path, toy_index: Path, facts: list[Fact]
) -> None:
    async with (
        serve(f"fruit={bow_index}", f"toy={toy_index}") as running,
        RequestClient(running.transport.dealer(running.address)) as client,
    ):
        query = f"{facts[0].subject} {facts[0].relation}"
        fruit, toy = await asyncio.gather(search(client, "apple"), search(client, query, collection="toy"))
        assert fruit.results[0][0].text == "red apple ."
        assert toy.results[0][0].text == facts[0].text
        with pytest.raises(RemoteError, match="there is no collection 'nuts'; there are fruit, toy"):
            await search(client, "walnut", collection="nuts")


async def test_malformed_requests_are_refused_and_others_are_still_answered(serve: Serve, bow_index: Path) -> None:
    good: dict[str, object] = {
        "v": 3,
        "kind": "search",
        "request_id": 5,
        "queries": ["apple"],
        "top_n": 1,
        "collection": "",
    }
    heartbeat = Heartbeat(actor="a", incarnation="i", capacity=1, free_slots=1, held=[])
    cases: list[tuple[list[bytes], int, str]] = [
        ([b""], 0, "not msgpack"),
        ([b"\xc1 GET / HTTP/1.1"], 0, "not msgpack"),
        ([pack({**good, "v": 2})], 5, "protocol version must be 3, got 2"),
        ([pack({**good, "top_n": 0})], 5, "top_n"),
        ([pack({**good, "top_n": 101})], 5, "top_n"),
        ([pack({**good, "queries": []})], 5, "queries"),
        ([pack({**good, "queries": ["q"] * 257})], 5, "queries"),
        ([pack({**good, "queries": ["q" * 8193]})], 5, "queries"),
        ([pack({**good, "extra": 1})], 5, "extra"),
        ([pack({**good, "request_id": -1})], 0, "request_id"),
        ([pack({**good, "request_id": True})], 0, "request_id"),
        ([pack(good), b"payload"], 5, "has 1 frame, got 2"),
        ([encode(heartbeat)], 0, "expected search, got heartbeat"),
    ]
    async with serve(bow_index) as running, RequestClient(running.transport.dealer(running.address)) as client:
        dealer = running.transport.dealer(running.address)
        for frames, request_id, message in cases:
            reply = await exchange(dealer, frames)
            assert (reply.request_id, message in reply.error) == (request_id, True), reply
        assert (await search(client, "apple")).results[0][0].text == "red apple ."
        assert running.service.stats.num_refused == len(cases)


async def test_requests_beyond_max_pending_are_refused(serve: Serve, bow_index: Path) -> None:
    limits = ServiceLimits(max_batch=1, max_pending=4)
    async with (
        serve(bow_index, limits=limits) as running,
        RequestClient(running.transport.dealer(running.address)) as client,
    ):
        queries = [[f"apple {i}" for i in range(4)] for _ in range(64)]
        outcomes = await asyncio.gather(*(search(client, *each) for each in queries), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert refused
        assert all(isinstance(error, RemoteError) for error in refused)
        assert "the retriever's queue is full: 4 queries wait, max_pending is 4" in str(refused[0])
        assert (
            len((await search(client, *["apple"] * 256)).results) == 256
        )  # An idle service accepts a request of any size.


async def test_a_flood_of_one_client_does_not_fail_the_searches_of_another(serve: Serve, bow_index: Path) -> None:
    """Of a queue of 8 queries, one client may have 2."""
    limits = ServiceLimits(max_batch=1, max_pending=8)
    async with (
        serve(bow_index, limits=limits) as running,
        RequestClient(running.transport.dealer(running.address)) as flooding,
        RequestClient(running.transport.dealer(running.address)) as other,
    ):
        flood = asyncio.gather(*(search(flooding, f"apple {i}", top_n=100) for i in range(400)), return_exceptions=True)
        while not flood.done():
            assert (await search(other, "pear")).results[0][0].text == "green pear ."
        refused = [str(outcome) for outcome in await flood if isinstance(outcome, RemoteError)]
        assert refused
        assert all("of this client wait, a client may have 2" in error for error in refused)


async def test_a_reply_too_large_to_send_is_an_error(
    serve: Serve,
    tmp_path: Path,
    write_corpus: Callable[[Path, list[str]], Path],
    build_bow_index: Callable[[Path, Path], Path],
) -> None:
    corpus = write_corpus(tmp_path / "long.jsonl", ["word " * 8_000, "word " * 8_000])
    build_bow_index(corpus, tmp_path / "long")
    async with (
        serve(tmp_path / "long") as running,
        RequestClient(running.transport.dealer(running.address)) as client,
    ):
        with pytest.raises(RemoteError, match="send fewer queries per request, or a smaller top_n"):
            await search(client, *["word"] * 256)
        assert len((await search(client, "word")).results[0]) == 2


async def test_a_client_that_disconnects_does_not_affect_others(serve: Serve, bow_index: Path) -> None:
    async with serve(bow_index) as running, RequestClient(running.transport.dealer(running.address)) as client:
        leaving = running.transport.dealer(running.address)
        for number in range(1, 20):
            await leaving.send([encode(SearchRequest(request_id=number, queries=["apple"], top_n=1))])
        leaving.close()
        assert (await search(client, "pear")).results[0][0].text == "green pear ."
