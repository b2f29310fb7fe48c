"""The engine pool against scripted HTTP servers: choice of the engine, and retries."""

import asyncio

import pytest

from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import Retry
from protocol.errors import EngineRefused, EngineUnavailable, UnknownVersion

SAMPLING = SamplingParams(max_new_tokens=8, stop_token_ids=(1,))
FAST = Retry(num_attempts=3, base_s=0.001, max_s=0.001)


def pool(run_id: str | None = "run", wait_s: float = 5.0) -> EnginePool:
    return EnginePool(run_id=run_id, retry=FAST, wait_s=wait_s)


async def test_only_engines_that_committed_the_version_get_requests(start_engine) -> None:
    old, new = await start_engine(), await start_engine()
    new.weight_version = "run:9:3"
    new.reply([1])
    async with pool() as p:
        p.set_engines([EngineInfo(old.url, 2), EngineInfo(new.url, 3)])
        completion = await p.generate([3], SAMPLING, min_version=3, prefer=old.url)
    assert completion.engine == new.url
    assert not old.requests


async def test_generate_waits_for_an_eligible_engine_up_to_wait_s(engine) -> None:
    engine.weight_version = "run:2:1"
    engine.reply([1])
    async with pool() as p:
        p.set_engines([EngineInfo(engine.url, 0)])
        waiting = asyncio.create_task(p.generate([3], SAMPLING, min_version=1))
        await asyncio.sleep(0)
        assert not waiting.done()
        p.set_engines([EngineInfo(engine.url, 1)])
        await waiting
    async with pool(wait_s=0.01) as p:
        p.set_engines([EngineInfo(engine.url, 1)])
        with pytest.raises(EngineUnavailable, match=r"committed version 7 in 0[.]01 s; known: .* at 1"):
            await p.generate([3], SAMPLING, min_version=7)


async def test_a_trajectory_stays_on_its_engine_and_fails_over(start_engine) -> None:
    a, b = sorted([await start_engine(), await start_engine()], key=lambda e: e.url)
    b.reply([1])
    b.fail(500, "boom")
    a.reply([1])
    async with pool() as p:
        p.set_engines([EngineInfo(a.url, 0), EngineInfo(b.url, 0)])
        assert (await p.generate([3], SAMPLING, min_version=0, prefer=b.url)).engine == b.url
        assert (await p.generate([3], SAMPLING, min_version=0, prefer=b.url)).engine == a.url
        assert p.num_retries == 1
        assert p.num_in_flight == 0


async def test_a_request_goes_to_the_engine_with_the_fewest_in_flight(start_engine) -> None:
    a, b = sorted([await start_engine(), await start_engine()], key=lambda e: e.url)
    a.hang_once()
    b.reply([1])
    async with pool() as p:
        p.set_engines([EngineInfo(a.url, 0), EngineInfo(b.url, 0)])
        first = asyncio.create_task(p.generate([3], SAMPLING, min_version=0))
        await asyncio.sleep(0)
        assert (await p.generate([3], SAMPLING, min_version=0)).engine == b.url
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert p.num_in_flight == 0


@pytest.mark.parametrize("version", ["default", "other:1:5", "run:1:4"])
async def test_tokens_of_an_unknown_foreign_or_older_version_are_refused(engine, version: str) -> None:
    engine.weight_version = version
    for _ in range(3):
        engine.reply([1])
    async with pool() as p:
        p.set_engines([EngineInfo(engine.url, 5)])
        with pytest.raises(UnknownVersion):
            await p.generate([3], SAMPLING, min_version=5)
    assert len(engine.requests) == 3


async def test_an_engine_that_has_its_version_again_gets_the_retry(engine) -> None:
    engine.reply([5, 1], spans=[("default", 0, 2)])
    engine.reply([6, 1], spans=[("run:1:5", 0, 2)])
    async with pool() as p:
        p.set_engines([EngineInfo(engine.url, 5)])
        assert (await p.generate([3], SAMPLING, min_version=5)).token_ids.tolist() == [6, 1]


async def test_a_retry_has_a_new_id_and_drops_partial_tokens(engine) -> None:
    engine.reply([5, 6], finish={"type": "abort", "message": "weights"})
    engine.fail(503, "starting")
    engine.reply([7, 1])
    async with pool() as p:
        p.set_engines([EngineInfo(engine.url, 0)])
        assert (await p.generate([3], SAMPLING, min_version=0, rid="t")).token_ids.tolist() == [7, 1]
        assert p.num_retries == 2
    assert [request["input_ids"] for request in engine.requests] == [[3], [3], [3]]
    assert len({request["rid"] for request in engine.requests}) == 3


async def test_an_engine_whose_url_is_refused_is_ignored(engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.reply([1])
    refused = [EngineInfo("http://10.0.0.1:1", 0), EngineInfo("nonsense", 0)]
    async with pool() as p:
        for _ in range(3):
            p.set_engines([*refused, EngineInfo(engine.url, 0)])
        assert (await p.generate([3], SAMPLING, min_version=0, prefer=refused[0].url)).engine == engine.url
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2, "one warning for each engine, not for each call of set_engines"
    assert "network.api_key_file" in warnings[0]


async def test_a_refused_request_is_not_retried(start_engine) -> None:
    a, b = sorted([await start_engine(), await start_engine()], key=lambda e: e.url)
    a.fail(400, "too long")
    async with pool() as p:
        p.set_engines([EngineInfo(a.url, 0), EngineInfo(b.url, 0)])
        with pytest.raises(EngineRefused, match="too long"):
            await p.generate([3], SAMPLING, min_version=0)
    assert not b.requests


async def test_an_engine_that_is_no_longer_listed_gets_no_retry(start_engine) -> None:
    a, b = sorted([await start_engine(), await start_engine()], key=lambda e: e.url)
    a.fail(500, "dying")
    b.reply([1])
    async with pool() as p:
        p.set_engines([EngineInfo(a.url, 0)])
        waiting = asyncio.create_task(p.generate([3], SAMPLING, min_version=0, prefer=a.url))
        while p.num_retries == 0:  # noqa: ASYNC110 (the pool signals no event for a retry)
            await asyncio.sleep(0)
        p.set_engines([EngineInfo(b.url, 0)])
        assert (await waiting).engine == b.url
    assert len(a.requests) == 1
