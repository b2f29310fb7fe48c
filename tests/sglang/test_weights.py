"""The actor's client, pool and weight agent against SGLang itself, and its tokens against the learner's forward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from actor.engines.completion import Completion
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import SGLangClient, UpdateMode
from actor.weights.fetch import Prepared
from learner.model.scorer import Scorer
from protocol.errors import EngineRefused, UnknownVersion
from protocol.types import PolicyTag
from tests.actor_plane.plane import RUN
from tests.sglang.conftest import Attached, until_running
from tests.sglang.learner import logprobs, published, saved, scorer_of
from tests.sglang.server import API_KEY, CONTEXT_LENGTH, MAX_RUNNING, Server

pytestmark = pytest.mark.sglang

TOLERANCE = 1e-4
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11], [12], list(range(20, 60))]
LONG = SamplingParams(max_new_tokens=900)


def tags(completion: Completion) -> list[PolicyTag]:
    return [PolicyTag.parse(span.weight_version) for span in completion.spans]


def errors(
    completion: Completion, prompt: Sequence[int], scorers: Sequence[Scorer], *, temperature: float = 1.0
) -> list[float]:
    """How far, at most, the engine's log-probs are from the learner's: of each span under the scorer in its place."""
    assert completion.spans[0].start == 0
    assert completion.spans[-1].end == len(completion.token_ids)
    assert all(before.end == after.start for before, after in pairwise(completion.spans))
    found = []
    for span, scorer in zip(completion.spans, scorers, strict=True):
        wanted = logprobs(scorer, prompt, completion.token_ids, temperature=temperature)
        found.append(float(np.abs(completion.logprobs - wanted)[span.start : span.end].max()))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_what_is_sampled_is_what_the_learner_computes(attached: Attached, temperature: float) -> None:
    await attached.bring(publication=1, version=0, scale=1.0)
    sampling = SamplingParams(temperature=temperature, max_new_tokens=200, stop_token_ids=(17,))
    completions = await asyncio.gather(*(attached.pool.generate(prompt, sampling, min_version=0) for prompt in PROMPTS))
    scorer = scorer_of(attached.model, scale=1.0)
    worst = 0.0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert tags(completion) == [PolicyTag(RUN, 1, 0)]
        assert (17 in completion.token_ids) == (completion.finish_reason.matched == 17)
        worst = max(worst, *errors(completion, prompt, [scorer], temperature=temperature))
    print(f"temperature {temperature}: log-probs at most {worst:.2g} off")
    assert worst < TOLERANCE


async def test_versions_are_brought_and_the_second_as_a_delta(attached: Attached) -> None:
    await attached.bring(publication=1, version=0, scale=1.0)
    agent = attached.agent
    snapshot_bytes = agent._fetcher.num_bytes
    for publication, scale in ((2, 1.4), (3, 0.8)):
        await attached.bring(publication=publication, version=publication - 1, scale=scale)
        tag = PolicyTag(RUN, publication, publication - 1)
        assert (await attached.client.model_info()).weight_version == str(tag)
        assert agent.canary_error < TOLERANCE
        completion = await attached.pool.generate(PROMPTS[1], SamplingParams(), min_version=publication - 1)
        assert tags(completion) == [tag]
        old, new = scorer_of(attached.model, scale=1.0), scorer_of(attached.model, scale=scale)
        assert errors(completion, PROMPTS[1], [new])[0] < TOLERANCE < 0.1 < errors(completion, PROMPTS[1], [old])[0]
    assert 0 < agent._fetcher.num_bytes - snapshot_bytes < 0.05 * snapshot_bytes
    print(f"snapshot {snapshot_bytes} bytes, deltas {agent._fetcher.num_bytes - snapshot_bytes}")
    print(f"canary {agent.canary_error:.2g} nats off, paused {agent.paused_s / agent.num_updates * 1e3:.1f} ms a time")


async def test_an_engine_with_a_wrong_canary_gives_no_tokens_until_it_is_healed(attached: Attached) -> None:
    await attached.bring(publication=1, version=0, scale=1.0)
    await attached.publish(publication=2, version=1, scale=1.0, canary_off_by=0.01)
    plane, agent = attached.plane, attached.agent
    await plane.until(lambda: plane.state() == "quarantined" and agent.num_failures >= 2)
    assert "must be within 0.001 nats of the learner's, got 0.01" in plane.error()
    assert plane.known() == []
    await attached.bring(publication=3, version=2, scale=1.4)
    completion = await attached.pool.generate(PROMPTS[0], SamplingParams(), min_version=2)
    assert tags(completion) == [PolicyTag(RUN, 3, 2)]


async def test_weights_of_another_shape_never_reach_the_server_which_would_end(attached: Attached) -> None:
    await attached.bring(publication=1, version=0, scale=1.0)
    await attached.plane.publish(
        save({"model.norm.weight": torch.ones(31)}), publication=2, version=1, canary=published(attached.model)[1]
    )
    plane, agent = attached.plane, attached.agent
    await plane.until(lambda: plane.state() == "quarantined" and agent.num_failures >= 2)
    assert "must have the shape [32] of the base model, got [31]" in plane.error()
    assert plane.known() == []
    await attached.bring(publication=3, version=2, scale=1.4)
    completion = await attached.pool.generate(PROMPTS[0], SamplingParams(), min_version=2)
    assert errors(completion, PROMPTS[0], [scorer_of(attached.model, scale=1.4)])[0] < TOLERANCE


async def test_a_retracted_generation_goes_on_under_the_new_weights(attached: Attached) -> None:
    """Both halves match the learner: what was retracted has no KV of old weights."""
    if attached.agent._pause_mode != "retract":
        pytest.skip("this release of SGLang is paused with abort")
    await attached.bring(publication=1, version=0, scale=1.0)
    generating = asyncio.create_task(attached.pool.generate(PROMPTS[0], LONG, min_version=0))
    await attached.until_running(1)
    await attached.bring(publication=2, version=1, scale=1.4)
    completion = await generating
    assert tags(completion) == [PolicyTag(RUN, 1, 0), PolicyTag(RUN, 2, 1)]
    assert len(completion.token_ids) == LONG.max_new_tokens
    scorers = [scorer_of(attached.model, scale=scale) for scale in (1.0, 1.4)]
    assert max(errors(completion, PROMPTS[0], scorers)) < TOLERANCE
    assert attached.pool.num_retries == 0


async def test_a_generation_kept_in_place_goes_on_with_the_kv_of_old_weights(
    server: Server, model: Path, tmp_path: Path
) -> None:
    """Without the agent, which does not do this. Spans are exact; what follows the update is of no policy's forward."""
    folders = {scale: saved(model, tmp_path / f"scale-{scale}", scale=scale) for scale in (1.0, 0.5)}
    first, second = PolicyTag(RUN, 1, 0), PolicyTag(RUN, 2, 1)
    async with SGLangClient(server.url, api_key=API_KEY) as client:
        await client.update_weights_from_disk(str(folders[1.0]), weight_version=str(first))
        generating = asyncio.create_task(client.generate(PROMPTS[0], LONG))
        await until_running(server, 1)
        await client.pause("in_place")
        await client.update_weights_from_disk(str(folders[0.5]), weight_version=str(second), flush_cache=False)
        await client.continue_()
        completion = await generating
    assert tags(completion) == [first, second]
    assert len(completion.token_ids) == LONG.max_new_tokens
    before, after = errors(completion, PROMPTS[0], [scorer_of(model, scale=scale) for scale in (1.0, 0.5)])
    print(f"in place: {before:.2g} nats off before the update, {after:.2g} after it")
    assert before < TOLERANCE


@pytest.mark.parametrize("mode", ["retract", "abort"])
@pytest.mark.parametrize(("num_requests", "num_updates"), [(MAX_RUNNING // 2, 3), (3 * MAX_RUNNING, 1)])
async def test_updates_under_load_lose_no_completion(
    attached: Attached, monkeypatch: pytest.MonkeyPatch, num_requests: int, num_updates: int, mode: UpdateMode
) -> None:
    """Some requests begin as canaries do; where more are sent than run at once, the rest is in the server's queue."""
    if mode == "retract" and attached.agent._pause_mode != "retract":
        pytest.skip("this release of SGLang is paused with abort")
    monkeypatch.setattr(attached.agent, "_pause_mode", mode)
    await attached.bring(publication=1, version=0, scale=1.0)
    sampling = SamplingParams(max_new_tokens=400)
    prompts = [[number, 3, 4] for number in range(num_requests)]
    tasks = [asyncio.create_task(attached.pool.generate(prompt, sampling, min_version=0)) for prompt in prompts]
    scales = [1.0, 1.4, 0.8, 1.2]
    for publication in range(2, 2 + num_updates):
        await attached.until_running(min(num_requests, MAX_RUNNING))
        await attached.bring(publication=publication, version=publication - 1, scale=scales[publication - 1])
    completions = await asyncio.gather(*tasks)
    scorers = [scorer_of(attached.model, scale=scale) for scale in scales]
    for prompt, completion in zip(prompts, completions, strict=True):
        versions = [tag.version for tag in tags(completion)]
        assert versions == sorted(set(versions))
        assert len(completion.token_ids) == sampling.max_new_tokens
        assert max(errors(completion, prompt, [scorers[version] for version in versions])) < TOLERANCE
    assert attached.agent.num_failures == 0
    num_mixed = sum(len(completion.spans) > 1 for completion in completions)
    paused_ms = attached.agent.paused_s / attached.agent.num_updates * 1e3
    print(
        f"{num_requests} in flight, {mode}: paused {paused_ms:.0f} ms a time, {num_mixed} completions of several "
        f"versions, {attached.pool.num_retries} sampled again"
    )
    assert (num_mixed > 0, attached.pool.num_retries > 0) == (mode == "retract", mode == "abort")


async def test_a_server_that_was_restarted_gives_no_tokens_until_it_is_brought_back(
    attached: Attached, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await attached.bring(publication=1, version=0, scale=1.4)
    fetch, go = attached.agent._fetcher.fetch, asyncio.Event()

    async def held_back(tag: PolicyTag) -> Prepared:
        await go.wait()
        return await fetch(tag)

    monkeypatch.setattr(attached.agent._fetcher, "fetch", held_back)
    await asyncio.to_thread(server.stop)
    await attached.plane.until(lambda: attached.plane.state() == "quarantined")
    await asyncio.to_thread(server.start)
    assert (await attached.client.model_info()).weight_version == "default"
    with pytest.raises(UnknownVersion, match="'default' is not of the form"):
        await attached.pool.generate(PROMPTS[0], SamplingParams(), min_version=0)
    assert attached.plane.known() == []
    go.set()
    await attached.until_served(1)
    completion = await attached.pool.generate(PROMPTS[0], SamplingParams(), min_version=0)
    assert tags(completion) == [PolicyTag(RUN, 1, 0)]
    assert errors(completion, PROMPTS[0], [scorer_of(attached.model, scale=1.4)])[0] < TOLERANCE


async def test_what_cannot_be_sampled_is_refused_in_the_servers_words(server: Server) -> None:
    async with SGLangClient(server.url, api_key=API_KEY) as client:
        with pytest.raises(EngineRefused, match="context length"):
            await client.generate([3] * (CONTEXT_LENGTH + 1), SamplingParams())
        with pytest.raises(EngineRefused, match="weights"):
            await client.update_weights_from_disk("/no/such/folder", weight_version="run:9:9")
    async with SGLangClient(server.url, api_key="another key") as client:
        with pytest.raises(EngineRefused, match="HTTP 401"):
            await client.model_info()
