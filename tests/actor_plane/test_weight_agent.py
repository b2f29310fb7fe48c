"""Weights from the publisher over real sockets, through the agent, into the real embedded engine."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import Qwen2Config, Qwen2ForCausalLM

from actor.engine.server import EngineServer
from actor.engines.completion import Completion, Span
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import PauseMode, SGLangClient
from actor.tasks.toy.tokenizer import VOCABULARY_SIZE, write_tokenizer
from actor.weights import agent as weight_agent
from actor.weights import fetch as weight_fetch
from actor.weights.agent import WeightAgent
from actor.weights.fetch import Prepared, WeightFetcher, check_manifest, check_tensors
from learner.network.weight_deltas import Series
from protocol.deltas import decode
from protocol.errors import EngineUnavailable, ProtocolError, RemoteError, WeightsError
from protocol.framing import Message
from protocol.framing import decode as decode_message
from protocol.messages import (
    Announcement,
    CanaryFields,
    Chunk,
    ChunkRequest,
    Manifest,
    ManifestRequest,
    PartFields,
)
from protocol.request_client import RequestClient
from protocol.types import PolicyTag
from tests.actor_plane.plane import CHUNK_BYTES, RUN, WAIT_S, WeightPlane


def save_model(folder: Path) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def weights(model: Path, *, scale: float) -> bytes:
    return save({name: tensor * scale for name, tensor in load_file(model / "model.safetensors").items()})


@pytest.fixture
async def plane() -> AsyncIterator[WeightPlane]:
    plane = WeightPlane()
    yield plane
    await plane.close()


@pytest.fixture
async def requests(plane: WeightPlane) -> AsyncIterator[RequestClient]:
    async with RequestClient(plane.transport.dealer(plane.router.address)) as client:
        yield client


async def manifest_of(requests: RequestClient, publication: int, *, held: int = -1) -> Manifest:
    request = ManifestRequest(request_id=requests.next_id(), publication=publication, held=held)
    return (await requests.request(request, Manifest, timeout_s=WAIT_S))[0]


# --- the publisher ---


async def test_manifest_and_chunks_add_up(plane: WeightPlane, requests: RequestClient, model: Path) -> None:
    data = weights(model, scale=1.0)
    await plane.publish(data, publication=7, version=3)
    manifest = await manifest_of(requests, 7)
    assert (manifest.run_id, manifest.publication, manifest.version, manifest.num_bytes) == (RUN, 7, 3, len(data))
    part = manifest.parts[0]
    assert (len(manifest.parts), part.base, part.publication) == (1, -1, 7)
    assert len(part.chunk_checksums) == -(-part.num_bytes // CHUNK_BYTES) > 2
    received = bytearray()
    for index in range(len(part.chunk_checksums)):
        request = ChunkRequest(request_id=requests.next_id(), base=-1, publication=7, index=index)
        chunk, payload = await requests.request(request, Chunk, timeout_s=WAIT_S)
        assert chunk.index == index
        received += payload[0]
    found = decode(received, None, num_bytes=len(data), word_bytes=manifest.word_bytes, expected=part.checksum)
    assert found == data
    check_tensors(found, manifest)
    tensors = load_file(model / "model.safetensors")
    assert {tensor.name: tuple(tensor.shape) for tensor in manifest.tensors} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


async def test_old_publications_go(plane: WeightPlane, requests: RequestClient, model: Path) -> None:
    for publication in (1, 2, 3):
        data = weights(model, scale=0.3 + 0.37 * publication)
        await plane.publish(data, publication=publication, version=publication)
    with pytest.raises(RemoteError, match=r"publication 1 is not .* offered: ask for the newest"):
        await manifest_of(requests, 1)
    assert (await manifest_of(requests, 2)).version == 2
    request = ChunkRequest(request_id=requests.next_id(), base=-1, publication=3, index=10**6)
    with pytest.raises(RemoteError, match="publication 3"):
        await requests.request(request, Chunk, timeout_s=WAIT_S)


async def test_announcements_name_the_newest(plane: WeightPlane, model: Path) -> None:
    subscriber = plane.transport.subscriber(plane.announcements.address)
    data = weights(model, scale=1.0)
    receiving = asyncio.create_task(subscriber.recv())
    publication = 0
    async with asyncio.timeout(WAIT_S):
        while not receiving.done():  # a subscription takes a moment to arrive
            publication += 1
            await plane.publish(data, publication=publication, version=5)
            await asyncio.wait([receiving], timeout=0.05)
    message, _ = decode_message(receiving.result())
    assert isinstance(message, Announcement)
    assert (message.run_id, message.version) == (RUN, 5)


async def test_malformed_requests_cost_nothing(plane: WeightPlane, requests: RequestClient, model: Path) -> None:
    await plane.publish(weights(model, scale=1.0), publication=1, version=0)
    foe = plane.transport.dealer(plane.router.address)
    for frames in ([b""], [b"\xff" * 10], [b"x"] * 20):
        await foe.send(frames)
    await plane.until(lambda: plane.publisher.num_malformed == 3)
    assert (await manifest_of(requests, 1)).publication == 1


# --- fetching ---


@pytest.fixture
def fetcher(requests: RequestClient, model: Path, tmp_path: Path) -> WeightFetcher:
    return WeightFetcher(requests=requests, base_model=model, folder=tmp_path)


def nudged(data: bytes, *, seed: int) -> bytes:
    """A safetensors file of which a hundredth of the values moved by one ULP."""
    start = 8 + int.from_bytes(data[:8], "little")
    values = np.frombuffer(data[start:], np.uint32).copy()
    values[np.random.default_rng(seed).random(len(values)) < 0.01] += 1
    return data[:start] + values.tobytes()


async def test_who_holds_a_publication_gets_deltas_and_who_was_away_catches_up(
    plane: WeightPlane, fetcher: WeightFetcher, model: Path
) -> None:
    data = weights(model, scale=1.0)
    versions = {1: data}
    await plane.publish(data, publication=1, version=0)
    first = await fetcher.fetch(PolicyTag(RUN, 1, 0))
    snapshot_bytes = fetcher.num_bytes
    assert (first.folder / "model.safetensors").read_bytes() == data
    for publication in range(2, 7):
        data = versions[publication] = nudged(data, seed=publication)
        await plane.publish(data, publication=publication, version=publication - 1)
    for publication in (2, 5, 6):  # one step, three at once, one
        prepared = await fetcher.fetch(PolicyTag(RUN, publication, publication - 1))
        assert (prepared.folder / "model.safetensors").read_bytes() == versions[publication]
    assert 0 < fetcher.num_bytes - snapshot_bytes < 0.15 * snapshot_bytes
    late = WeightFetcher(requests=fetcher._requests, base_model=model, folder=fetcher._folder / "late")
    prepared = await late.fetch(PolicyTag(RUN, 6, 5))
    assert (prepared.folder / "model.safetensors").read_bytes() == versions[6]
    assert late.num_bytes < 1.25 * snapshot_bytes


async def test_a_chunk_that_is_damaged_or_lost_is_asked_for_again(
    plane: WeightPlane, fetcher: WeightFetcher, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_fetch, "_CHUNK_TIMEOUT_S", 0.2)
    data = weights(model, scale=1.0)
    await plane.publish(data, publication=1, version=0)
    answer, num_asked = plane.publisher._answer, 0

    def lossy(message: Message) -> tuple[Message, list[memoryview]]:
        nonlocal num_asked
        reply, payload = answer(message)
        if isinstance(message, ChunkRequest):
            num_asked += 1
            if num_asked == 1:
                raise ProtocolError("lost")
            if num_asked == 2:
                payload = [memoryview(bytes(payload[0][:-1]) + bytes([payload[0][-1] ^ 1]))]
        return reply, payload

    monkeypatch.setattr(plane.publisher, "_answer", lossy)
    prepared = await fetcher.fetch(PolicyTag(RUN, 1, 0))
    assert (prepared.folder / "model.safetensors").read_bytes() == data
    assert fetcher.num_repeated_chunks == 2


async def test_what_has_been_fetched_is_not_fetched_again(
    plane: WeightPlane, fetcher: WeightFetcher, model: Path
) -> None:
    await plane.publish(weights(model, scale=1.0), publication=1, version=0)
    repair = plane.damage(base=-1, publication=1, position=-1)
    with pytest.raises(WeightsError, match="does not match its checksum"):
        await fetcher.fetch(PolicyTag(RUN, 1, 0))
    num_bytes = fetcher.num_bytes
    assert num_bytes >= 2 * CHUNK_BYTES
    repair()
    await fetcher.fetch(PolicyTag(RUN, 1, 0))
    snapshot = plane.publisher._publications._parts[-1, 1].fields
    assert fetcher.num_bytes == snapshot.num_bytes
    assert snapshot.num_bytes - num_bytes < CHUNK_BYTES
    await fetcher.fetch(PolicyTag(RUN, 1, 0))
    assert fetcher.num_bytes == snapshot.num_bytes, "it is there"


@pytest.mark.parametrize("position", [0, 9, 1_000, -1])
async def test_a_bit_flipped_in_what_is_held_is_found_and_a_snapshot_heals_it(
    plane: WeightPlane, fetcher: WeightFetcher, model: Path, position: int
) -> None:
    data = weights(model, scale=1.0)
    await plane.publish(data, publication=1, version=0)
    file = (await fetcher.fetch(PolicyTag(RUN, 1, 0))).folder / "model.safetensors"
    damaged = bytearray(data)
    damaged[position] ^= 1
    file.write_bytes(damaged)
    data = nudged(data, seed=0)
    await plane.publish(data, publication=2, version=1)
    with pytest.raises(WeightsError, match="must have the checksum"):
        await fetcher.fetch(PolicyTag(RUN, 2, 1))
    prepared = await fetcher.fetch(PolicyTag(RUN, 2, 1))
    assert (prepared.folder / "model.safetensors").read_bytes() == data
    (prepared.folder / "model.safetensors").write_bytes(damaged)
    prepared = await fetcher.fetch(PolicyTag(RUN, 2, 1))
    assert (prepared.folder / "model.safetensors").read_bytes() == data


def manifest_for(model: Path) -> Manifest:
    offer = Series(RUN, chunk_bytes=CHUNK_BYTES).make_offer(weights(model, scale=1.0), publication=4, version=2)
    return offer.manifest.model_copy(update={"parts": [part.fields for part in offer.parts]})


def test_manifests_that_lead_elsewhere_are_refused(model: Path) -> None:
    tag, manifest = PolicyTag(RUN, 4, 2), manifest_for(model)
    check_manifest(manifest, tag, held=-1)
    check_manifest(manifest, tag, held=3)
    snapshot = manifest.parts[0]

    def changed(**update: object) -> PartFields:
        return snapshot.model_copy(update=update)

    for parts, held, message in [
        ([], -1, "the parts end at publication -1"),
        ([], 4, "the parts end at publication 4"),
        ([changed(publication=3)], -1, "the parts end at publication 3"),
        ([changed(base=2)], 3, "must begin at publication 3 or at nothing, got 2"),
        ([changed(publication=2), changed(base=1)], -1, "must begin where the last one ends, at publication 2, not 1"),
        ([changed(num_bytes=snapshot.num_bytes + CHUNK_BYTES)], -1, "need as many checksums"),
    ]:
        with pytest.raises(WeightsError, match=message):
            check_manifest(manifest.model_copy(update={"parts": parts}), tag, held=held)
    with pytest.raises(WeightsError, match="got a manifest of publication 4"):
        check_manifest(manifest, PolicyTag(RUN, 4, 3), held=-1)


def test_a_manifest_of_other_tensors_is_refused(model: Path) -> None:
    data, manifest = weights(model, scale=1.0), manifest_for(model)
    check_tensors(data, manifest)
    tensors = manifest.tensors
    for changed in (tensors[1:], [tensors[0].model_copy(update={"shape": [1]}), *tensors[1:]]):
        with pytest.raises(WeightsError, match="other tensors than its manifest"):
            check_tensors(data, manifest.model_copy(update={"tensors": changed}))


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0[1,2,3] ", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"])
def test_bytes_that_are_no_safetensors_are_refused(model: Path, data: bytes) -> None:
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        check_tensors(data, manifest_for(model))


# --- the agent and the embedded engine ---


@dataclass
class Engine:
    """The real engine on a port of its own, and its agent."""

    server: EngineServer
    client: SGLangClient
    agent: WeightAgent

    async def tag(self) -> PolicyTag | None:
        text = (await self.client.model_info()).weight_version or "default"
        return None if text == "default" else PolicyTag.parse(text)


@pytest.fixture
async def engine(
    plane: WeightPlane, requests: RequestClient, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    monkeypatch.setattr(weight_agent, "_RETRY_S", 0.05)
    monkeypatch.setattr(weight_agent, "_REPORT_EVERY_S", 0.05)
    server = EngineServer(model_path=model)
    await server.start()
    async with SGLangClient(server.url) as client:
        agent = WeightAgent(
            name="engine-0",
            engine=client,
            requests=requests,
            announcements=plane.transport.subscriber(plane.announcements.address),
            base_model=model,
            folder=tmp_path,
            url=server.url,
            pause_mode="retract",
            canary_tolerance=1e-3,
        )
        running = asyncio.create_task(agent.run())
        yield Engine(server, client, agent)
        assert not running.done(), "the agent runs until it is cancelled"
        running.cancel()
        await asyncio.wait([running])
    await server.stop()


def serves(plane: WeightPlane, publication: int) -> Callable[[], bool]:
    return lambda: [engine.publication for engine in plane.known()] == [publication]


async def test_the_engine_is_brought_to_each_version(
    plane: WeightPlane, engine: Engine, model: Path, tmp_path: Path
) -> None:
    await plane.until(lambda: plane.state() == "joining")
    assert plane.known() == []
    for version in range(3):
        publication = version + 1
        await plane.publish(weights(model, scale=1 + version), publication=publication, version=version)
        await plane.until(serves(plane, publication))
        assert await engine.tag() == PolicyTag(RUN, publication, version)
        assert [(known.name, known.url, known.version) for known in plane.known()] == [
            ("engine-0", engine.server.url, version)
        ]
    assert engine.agent.num_updates == 3
    assert [path.name for path in tmp_path.iterdir()] == ["publication-3"]
    assert plane.num_changes > 3


async def test_a_damaged_chunk_is_quarantined_and_fetched_again(
    plane: WeightPlane, engine: Engine, model: Path
) -> None:
    await plane.publish(weights(model, scale=1.0), publication=1, version=0)
    await plane.until(serves(plane, 1))
    await plane.publish(weights(model, scale=1.7), publication=2, version=1)
    repair = plane.damage(base=1, publication=2, position=CHUNK_BYTES + 5)
    await plane.until(lambda: plane.state() == "quarantined")
    assert "chunk 1 of publication 2 does not match its checksum" in plane.error()
    assert plane.known() == []
    assert await engine.tag() == PolicyTag(RUN, 1, 0), "all or nothing: the engine keeps what it had"
    repair()
    await plane.until(serves(plane, 2))
    assert await engine.tag() == PolicyTag(RUN, 2, 1)
    assert plane.error() == ""


async def test_an_update_that_the_engine_refuses_is_tried_again(
    plane: WeightPlane, engine: Engine, model: Path
) -> None:
    """Weights that lack a tensor verify as bytes, and fail in the engine; the next publication heals it."""
    lacking = dict(list(load_file(model / "model.safetensors").items())[1:])
    await plane.publish(save(lacking), publication=1, version=0)
    await plane.until(lambda: plane.state() == "quarantined" and engine.agent.num_failures >= 2)
    assert "update_weights_from_disk" in plane.error()
    assert plane.known() == []
    await plane.publish(weights(model, scale=1.0), publication=2, version=0)
    await plane.until(serves(plane, 2))
    assert await engine.tag() == PolicyTag(RUN, 2, 0)


async def test_weights_of_another_shape_never_reach_the_engine(plane: WeightPlane, engine: Engine, model: Path) -> None:
    await plane.publish(weights(model, scale=1.0), publication=1, version=0)
    await plane.until(serves(plane, 1))
    tensors = load_file(model / "model.safetensors")
    await plane.publish(save(tensors | {"model.norm.weight": torch.ones(17)}), publication=2, version=1)
    await plane.until(lambda: plane.state() == "quarantined")
    assert plane.error() == ("publication 2: model.norm.weight must have the shape [16] of the base model, got [17]")
    completion = await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    assert {span.weight_version for span in completion.spans} == {str(PolicyTag(RUN, 1, 0))}
    await plane.publish(weights(model, scale=2.0), publication=3, version=2)
    await plane.until(serves(plane, 3))


async def test_a_publication_that_is_gone_gives_way_to_the_newest(
    plane: WeightPlane, engine: Engine, model: Path
) -> None:
    data = weights(model, scale=1.0)
    await plane.publish(data, publication=1, version=0)
    await plane.until(serves(plane, 1))
    # The reply to a report names publication 2; before its manifest is asked for, two newer ones push it out.
    for publication in (2, 3, 4):
        data = weights(model, scale=0.3 + 0.37 * publication)
        await plane.publish(data, publication=publication, version=publication - 1)
    assert sorted(plane.publisher._publications._offers) == [3, 4]
    with pytest.raises(RemoteError, match="ask for the newest"):
        await engine.agent._fetcher.fetch(PolicyTag(RUN, 2, 1))
    await plane.until(serves(plane, 4))


async def test_an_engine_whose_continue_was_lost_is_brought_again(
    plane: WeightPlane, engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It states the new version and is paused: nobody may take it for serving before it runs again."""
    continue_ = engine.client.continue_
    lost = 0

    async def lose() -> None:
        nonlocal lost
        lost += 1
        raise EngineUnavailable("the connection broke")

    monkeypatch.setattr(engine.client, "continue_", lose)
    await plane.publish(weights(model, scale=1.0), publication=1, version=0)
    await plane.until(lambda: plane.state() == "quarantined" and lost >= 2)
    assert await engine.tag() == PolicyTag(RUN, 1, 0)
    assert plane.known() == []
    assert "the connection broke" in plane.error()
    monkeypatch.setattr(engine.client, "continue_", continue_)
    await plane.until(serves(plane, 1))
    completion = await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    assert {span.weight_version for span in completion.spans} == {str(PolicyTag(RUN, 1, 0))}


@pytest.mark.parametrize("mode", ["abort", "retract"])
async def test_what_an_update_does_to_requests_in_flight(
    plane: WeightPlane, engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch, mode: PauseMode
) -> None:
    monkeypatch.setattr(engine.agent, "_pause_mode", mode)
    await plane.publish(weights(model, scale=1.0), publication=1, version=0)
    await plane.until(serves(plane, 1))
    await engine.client.pause("in_place")
    sampling = SamplingParams(max_new_tokens=40)
    generating = asyncio.create_task(engine.client.generate([3], sampling))
    engine_core = engine.server._engine
    assert engine_core is not None
    await plane.until(lambda: any(True for _ in engine_core.scheduler.in_flight()))
    await plane.publish(weights(model, scale=2.0), publication=2, version=1)
    await plane.until(serves(plane, 2))
    if mode == "abort":
        with pytest.raises(EngineUnavailable, match="abort"):
            await generating
    else:
        assert (await generating).spans[-1].weight_version == str(PolicyTag(RUN, 2, 1))


async def test_reports_go_on_while_a_publication_is_fetched(
    plane: WeightPlane, engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.publish(weights(model, scale=1.0), publication=1, version=0)
    await plane.until(serves(plane, 1))
    fetch, go, begun = engine.agent._fetcher.fetch, asyncio.Event(), asyncio.Event()

    async def slow(tag: PolicyTag) -> Prepared:
        begun.set()
        await go.wait()
        return await fetch(tag)

    monkeypatch.setattr(engine.agent._fetcher, "fetch", slow)
    await plane.publish(weights(model, scale=2.0), publication=2, version=1)
    async with asyncio.timeout(WAIT_S):
        await begun.wait()
    num_reports = plane.num_changes
    await plane.until(lambda: plane.num_changes >= num_reports + 5)
    assert (plane.state(), [known.publication for known in plane.known()]) == ("serving", [1])
    go.set()
    await plane.until(serves(plane, 2))


async def test_an_engine_that_was_restarted_joins_anew(plane: WeightPlane, engine: Engine, model: Path) -> None:
    await plane.publish(weights(model, scale=2.0), publication=1, version=0)
    await plane.until(serves(plane, 1))
    await engine.server.stop()
    await plane.until(lambda: plane.state() == "quarantined" or engine.agent.num_failures > 0)
    again = EngineServer(model_path=model, port=int(engine.server.url.rpartition(":")[2]))
    await again.start()
    try:
        await plane.until(lambda: engine.agent.num_updates == 2)
        await plane.until(serves(plane, 1))
        assert await engine.tag() == PolicyTag(RUN, 1, 0)
    finally:
        await again.stop()


# --- the canary ---

PROMPTS = [[5, 6, 7], [9, 8, 4]]


def canary_of(model: Path, *, scale: float) -> CanaryFields:
    policy = Qwen2ForCausalLM.from_pretrained(model)
    policy.load_state_dict({name: tensor * scale for name, tensor in policy.state_dict().items()})
    with torch.no_grad():
        logits = [policy(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    return CanaryFields(prompts=PROMPTS, logprobs=[float(row.log_softmax(-1).max()) for row in logits])


async def test_an_engine_that_computes_with_the_published_weights_commits(
    plane: WeightPlane, engine: Engine, model: Path
) -> None:
    for publication, scale in ((1, 1.0), (2, 1.7)):
        canary = canary_of(model, scale=scale)
        data = weights(model, scale=scale)
        await plane.publish(data, publication=publication, version=publication, canary=canary)
        await plane.until(serves(plane, publication))
        assert engine.agent.canary_error < 1e-5
    assert engine.agent.paused_s > 0


async def test_an_engine_that_computes_otherwise_gives_no_tokens_until_it_is_healed(
    plane: WeightPlane, engine: Engine, model: Path
) -> None:
    await plane.publish(weights(model, scale=1.0), publication=1, version=0, canary=canary_of(model, scale=1.0))
    await plane.until(serves(plane, 1))
    wrong = canary_of(model, scale=1.0)
    wrong = wrong.model_copy(update={"logprobs": [value - 0.01 for value in wrong.logprobs]})
    await plane.publish(weights(model, scale=1.0), publication=2, version=1, canary=wrong)
    await plane.until(lambda: plane.state() == "quarantined" and engine.agent.num_failures >= 2)
    assert "must be within 0.001 nats of the learner's, got 0.01" in plane.error()
    assert plane.known() == []
    core = engine.server._engine
    assert core is not None
    await plane.until(lambda: core.scheduler.paused)
    with pytest.raises(EngineUnavailable, match="abort"):  # what comes while it stands still, the next try gives back
        await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    await plane.publish(weights(model, scale=2.0), publication=3, version=2, canary=canary_of(model, scale=2.0))
    await plane.until(serves(plane, 3))
    completion = await engine.client.generate([3], SamplingParams(max_new_tokens=2))
    assert {span.weight_version for span in completion.spans} == {str(PolicyTag(RUN, 3, 2))}


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"cached_tokens": 3}, "found 3 tokens of old weights in the cache"),
        ({"spans": (Span(0, 1, "run:9:9"),)}, "must be of run:1:0, got run:9:9"),
    ],
)
async def test_a_canary_from_the_cache_or_of_other_weights_is_refused(
    plane: WeightPlane,
    engine: Engine,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    update: dict[str, object],
    message: str,
) -> None:
    generate = engine.client.generate

    async def wrong(*args: object, **kwargs: object) -> Completion:
        return dataclasses.replace(await generate(*args, **kwargs), **update)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.client, "generate", wrong)
    await plane.publish(weights(model, scale=1.0), publication=1, version=0, canary=canary_of(model, scale=1.0))
    await plane.until(lambda: plane.state() == "quarantined")
    assert message in plane.error()
    monkeypatch.setattr(engine.client, "generate", generate)
    await plane.until(serves(plane, 1))


async def test_a_canary_may_begin_as_a_request_that_goes_on(
    plane: WeightPlane, engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retracted requests are computed anew before the canary's: a first token in common comes from the cache."""
    generate = engine.client.generate

    async def shared(*args: object, **kwargs: object) -> Completion:
        return dataclasses.replace(await generate(*args, **kwargs), cached_tokens=1)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.client, "generate", shared)
    await plane.publish(weights(model, scale=1.0), publication=1, version=0, canary=canary_of(model, scale=1.0))
    await plane.until(serves(plane, 1))
    assert engine.agent.num_failures == 0


async def test_an_engine_that_does_not_answer_the_canary_is_quarantined(
    plane: WeightPlane, engine: Engine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_agent, "_CANARY_TIMEOUT_S", 0.05)

    async def silent(*_: object, **__: object) -> Completion:
        await asyncio.sleep(math.inf)
        raise AssertionError

    generate = engine.client.generate
    monkeypatch.setattr(engine.client, "generate", silent)
    await plane.publish(weights(model, scale=1.0), publication=1, version=0, canary=canary_of(model, scale=1.0))
    await plane.until(lambda: "no answer to the canary in 0.05 s" in plane.error())
    assert plane.known() == []
    monkeypatch.setattr(engine.client, "generate", generate)
    monkeypatch.setattr(weight_agent, "_CANARY_TIMEOUT_S", WAIT_S)
    await plane.until(serves(plane, 1))
