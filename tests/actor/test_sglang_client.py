"""The HTTP client of one engine against a scripted server, and the bounds of the sampling parameters."""

import asyncio

import numpy as np
import pytest

from actor.engines.completion import Span
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import SGLangClient, Timeouts, update_mode
from protocol.errors import ConfigError, EngineError, EngineRefused, EngineUnavailable, SecurityError, UnknownVersion

SAMPLING = SamplingParams(max_new_tokens=8, stop_token_ids=(1,))


def client(engine, **options) -> SGLangClient:
    return SGLangClient(engine.url, **options)


async def test_a_completion_has_ids_logprobs_and_spans(engine) -> None:
    engine.reply([5, 6, 1], spans=[("run:1:0", 0, 2), ("run:2:1", 2, 3)], prompt_tokens=2, cached_tokens=1)
    async with client(engine) as c:
        completion = await c.generate([3, 4], SAMPLING, rid="t")
    assert completion.token_ids.tolist() == [5, 6, 1]
    assert completion.logprobs.dtype == np.float32
    assert completion.logprobs.tolist() == [0, -0.125, -0.25]
    assert completion.spans == (Span(0, 2, "run:1:0"), Span(2, 3, "run:2:1"))
    assert completion.finish_reason.matched == 1
    assert (completion.prompt_tokens, completion.cached_tokens) == (2, 1)
    (request,) = engine.requests
    assert request["input_ids"] == [3, 4]
    assert request["return_logprob"] is True
    assert request["sampling_params"]["stop_token_ids"] == [1]


async def test_an_abort_or_a_failure_raises_engine_unavailable_without_a_retry(engine) -> None:
    engine.reply([5, 6], finish={"type": "abort", "message": "weights"})
    engine.reply_as_queued_and_aborted()
    engine.fail(500, "boom")
    async with client(engine) as c:
        with pytest.raises(EngineUnavailable, match="weights"):
            await c.generate([3], SAMPLING, rid="t")
        with pytest.raises(EngineUnavailable, match="waiting queue"):
            await c.generate([3], SAMPLING, rid="t")
        with pytest.raises(EngineUnavailable, match="boom"):
            await c.generate([3], SAMPLING, rid="t")
    assert len({request["rid"] for request in engine.requests}) == 3


async def test_a_refusal_has_the_servers_message(engine) -> None:
    engine.fail(400, "token id 999 is out of the vocabulary")
    async with client(engine) as c:
        with pytest.raises(EngineRefused, match="token id 999"):
            await c.generate([999], SAMPLING)
    assert len(engine.requests) == 1


async def test_no_connection_raises_engine_unavailable() -> None:
    async with SGLangClient("http://127.0.0.1:9") as c:
        with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1:9"):
            await c.model_info()


@pytest.mark.parametrize("url", ["http://10.0.0.1:30000", "https://engine.example:30000", "http://0.0.0.0:30000"])
def test_a_url_beyond_loopback_needs_an_api_key(url: str) -> None:
    with pytest.raises(SecurityError, match=r"network\.api_key_file"):
        SGLangClient(url)
    SGLangClient(url, api_key="s3cret")


@pytest.mark.parametrize("url", ["", "127.0.0.1:3", "tcp://127.0.0.1:3", "http://", "http://[", "http://h:99999"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must be http://HOST:PORT"):
        SGLangClient(url, api_key="s3cret")


async def test_a_request_that_times_out_is_aborted_on_the_server(engine) -> None:
    engine.hang_once()
    async with client(engine, timeouts=Timeouts(generate_s=0.1)) as c:
        with pytest.raises(EngineUnavailable, match=r"no response in 0[.]1 s"):
            await c.generate([3], SAMPLING)
    assert engine.aborted == [{"rid": engine.requests[0]["rid"]}]


async def test_without_spans_the_version_before_the_request_is_used(engine) -> None:
    engine.reply([5, 1], has_spans=False)
    engine.reply([5, 1], has_spans=False, weight_version="run:2:1")
    engine.reply([5, 1], has_spans=False, weight_version="run:2:1")
    async with client(engine) as c:
        spans = [(await c.generate([3], SAMPLING)).spans for _ in range(3)]
    assert spans == [(Span(0, 2, "run:1:0"),), (Span(0, 2, "run:1:0"),), (Span(0, 2, "run:2:1"),)]


@pytest.mark.parametrize("after", ["default", "run:0:0", "other:2:1"])
async def test_without_spans_the_version_of_a_restarted_engine_is_unknown(engine, after: str) -> None:
    engine.reply([5, 1], has_spans=False, weight_version=after)
    async with client(engine) as c:
        with pytest.raises(UnknownVersion):
            await c.generate([3], SAMPLING)


@pytest.mark.parametrize(
    "meta",
    [
        {"spans": [("run:1:0", 0, 1)]},
        {"spans": [("run:1:0", 0, 2), ("run:2:1", 1, 3)]},
        {"spans": []},
        {"completion_tokens": 2},
        {"prompt_tokens": 0},
        {"output_token_logprobs": [[-1.0, 5, None]]},
        {"output_token_logprobs": [[-1.0, 5, None], [-1.0, 9, None], [-1.0, 1, None]]},
        {"output_token_logprobs": [[None, 5, None], [-1.0, 6, None], [-1.0, 1, None]]},
        {"finish": {"type": "stop", "matched": 2}},
        {"finish": {"type": "weird"}},
    ],
)
async def test_an_inconsistent_response_is_refused(engine, meta: dict) -> None:
    engine.reply([5, 6, 1], **meta)
    async with client(engine) as c:
        with pytest.raises(EngineError):
            await c.generate([3], SAMPLING)


async def test_cancelling_a_generation_leaves_the_client_usable(engine) -> None:
    engine.hang_once()
    engine.reply([1])
    async with client(engine) as c:
        task = asyncio.create_task(c.generate([3], SAMPLING))
        await engine.hanging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await c.generate([3], SAMPLING)).token_ids.tolist() == [1]


@pytest.mark.parametrize("bad", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_truncation_needs_allow_truncation(bad: dict) -> None:
    with pytest.raises(ConfigError, match="truncate"):
        SamplingParams(**bad)
    assert SamplingParams(**bad, allow_truncation=True).truncates


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"max_new_tokens": 0}, {"min_p": 2}])
def test_an_invalid_sampling_parameter_is_named(bad: dict) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(bad))} must be"):
        SamplingParams(**bad, allow_truncation=True)


@pytest.mark.parametrize(
    ("release", "mode"),
    [
        ("0.5.17", "abort"),
        ("0.5.20.post1", "abort"),
        ("0.5.22", "abort"),
        ("0.5.23", "retract"),
        ("0.5.23.post1", "retract"),
        ("0.10.0", "retract"),
        ("1.0.0rc1", "retract"),
        ("0.0.0.dev0", "abort"),
        ("palimpsest-embedded", "abort"),
        ("", "abort"),
    ],
)
def test_update_mode_of_each_release(release: str, mode: str) -> None:
    assert update_mode(release) == mode
