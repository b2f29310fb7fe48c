"""The publisher: manifests, chunks, announcements, and requests that it refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from safetensors.torch import load_file

from actor.weights.fetch import check_tensors
from protocol.deltas import decode
from protocol.errors import RemoteError
from protocol.framing import decode as decode_message
from protocol.request_client import RequestClient
from protocol.weight_messages import Announcement, Chunk, ChunkRequest, Manifest, ManifestRequest
from tests.weights.learner_side import CHUNK_BYTES, RUN, WAIT_S, LearnerSide
from tests.weights.models import scaled_weights


async def request_manifest(requests: RequestClient, publication: int) -> Manifest:
    request = ManifestRequest(request_id=requests.next_id(), publication=publication, held=-1)
    return (await requests.request(request, Manifest, timeout_s=WAIT_S))[0]


# --- the publisher ---


async def test_the_chunks_of_a_manifest_give_the_published_file(
    learner: LearnerSide, requests: RequestClient, model: Path
) -> None:
    data = scaled_weights(model, scale=1.0)
    await learner.publish(data, publication=7, version=3)
    manifest = await request_manifest(requests, 7)
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


async def test_only_the_last_two_publications_are_offered(
    learner: LearnerSide, requests: RequestClient, model: Path
) -> None:
    for publication in (1, 2, 3):
        data = scaled_weights(model, scale=0.3 + 0.37 * publication)
        await learner.publish(data, publication=publication, version=publication)
    with pytest.raises(RemoteError, match=r"publication 1 is not .* offered: ask for the newest"):
        await request_manifest(requests, 1)
    assert (await request_manifest(requests, 2)).version == 2
    request = ChunkRequest(request_id=requests.next_id(), base=-1, publication=3, index=10**6)
    with pytest.raises(RemoteError, match="publication 3"):
        await requests.request(request, Chunk, timeout_s=WAIT_S)


async def test_an_announcement_names_the_newest_publication(learner: LearnerSide, model: Path) -> None:
    subscriber = learner.transport.subscriber(learner.announcements.address)
    data = scaled_weights(model, scale=1.0)
    receiving = asyncio.create_task(subscriber.recv())
    publication = 0
    async with asyncio.timeout(WAIT_S):
        while not receiving.done():  # announcements before the subscription arrives are lost
            publication += 1
            await learner.publish(data, publication=publication, version=5)
            await asyncio.wait([receiving], timeout=0.05)
    message, _ = decode_message(receiving.result())
    assert isinstance(message, Announcement)
    assert (message.run_id, message.version) == (RUN, 5)


async def test_malformed_requests_are_counted_and_others_are_served(
    learner: LearnerSide, requests: RequestClient, model: Path
) -> None:
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    malicious = learner.transport.dealer(learner.router.address)
    for frames in ([b""], [b"\xff" * 10], [b"x"] * 20):
        await malicious.send(frames)
    await learner.until(lambda: learner.publisher.num_malformed == 3)
    assert (await request_manifest(requests, 1)).publication == 1
