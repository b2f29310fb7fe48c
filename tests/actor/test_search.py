"""The client of the retriever, on a real socket."""

from __future__ import annotations

import asyncio

import pytest

from actor.tools.search_client import SearchClient, SearchFailed
from protocol.transport import Transport
from tests.actor.conftest import ScriptedRetriever


async def test_passages_are_returned_per_query_in_order(search, retriever) -> None:
    found = await search.search(["a", "b"], top_n=2, collection="c")
    assert [[p.text for p in passages] for passages in found] == [["a kami ."] * 2, ["b kami ."] * 2]
    assert found[0][0].id == "d0"
    assert found[0][0].score >= found[0][1].score
    assert (retriever.requests[0].top_n, retriever.requests[0].collection) == (2, "c")


async def test_many_searches_are_in_flight_at_once(search) -> None:
    found = await asyncio.gather(*(search.search([f"q{k}"], top_n=1) for k in range(20)))
    assert [f[0][0].text for f in found] == [f"q{k} kami ." for k in range(20)]


async def test_a_search_without_an_answer_is_sent_again_with_the_same_id(retriever: ScriptedRetriever) -> None:
    retriever.silent = True
    transport = Transport()
    address = retriever.router.address
    client = SearchClient(transport=transport, address=address, timeout_s=10.0, resend_s=0.01)
    async with client as search, asyncio.timeout(10.0):
        searching = asyncio.create_task(search.search(["a"], top_n=1))
        while len(retriever.requests) < 3:  # noqa: ASYNC110 (another task)
            await asyncio.sleep(0.001)
        retriever.silent = False
        assert (await searching)[0][0].text == "a kami ."
    transport.close()
    assert len({request.request_id for request in retriever.requests}) == 1


async def test_an_error_and_no_answer_in_time_raise_search_failed(search, retriever) -> None:
    retriever.error = "no collection 'x'"
    with pytest.raises(SearchFailed, match="no collection 'x'"):
        await search.search(["a"], top_n=1)
    retriever.silent = True
    with pytest.raises(SearchFailed, match=r"in 0\.5 s"):
        await search.search(["a"], top_n=1)
