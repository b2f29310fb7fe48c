"""The weight fetcher: deltas, damaged and lost chunks, and manifests that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from actor.weights.fetch import WeightFetcher, check_manifest, check_tensors
from learner.network.weight_deltas import Series
from protocol.errors import WeightsError
from protocol.request_client import RequestClient
from protocol.types import PolicyTag
from protocol.weight_messages import Chunk, Manifest, PartFields
from tests.weights.learner_side import CHUNK_BYTES, RUN, LearnerSide
from tests.weights.models import nudged, scaled_weights


@pytest.fixture
def fetcher(requests: RequestClient, model: Path, tmp_path: Path) -> WeightFetcher:
    return WeightFetcher(requests=requests, base_model=model, folder=tmp_path / "fetched")


async def test_a_fetcher_that_holds_a_publication_gets_deltas_also_across_several(
    learner: LearnerSide, requests: RequestClient, fetcher: WeightFetcher, model: Path, tmp_path: Path
) -> None:
    data = scaled_weights(model, scale=1.0)
    versions = {1: data}
    await learner.publish(data, publication=1, version=0)
    first = await fetcher.fetch(PolicyTag(RUN, 1, 0))
    snapshot_bytes = fetcher.num_fetched_bytes
    assert (first.folder / "model.safetensors").read_bytes() == data
    for publication in range(2, 7):
        data = versions[publication] = nudged(data, seed=publication)
        await learner.publish(data, publication=publication, version=publication - 1)
    for publication in (2, 5, 6):  # one publication later, three, one
        prepared = await fetcher.fetch(PolicyTag(RUN, publication, publication - 1))
        assert (prepared.folder / "model.safetensors").read_bytes() == versions[publication]
    assert 0 < fetcher.num_fetched_bytes - snapshot_bytes < 0.15 * snapshot_bytes
    late = WeightFetcher(requests=requests, base_model=model, folder=tmp_path / "late")
    prepared = await late.fetch(PolicyTag(RUN, 6, 5))
    assert (prepared.folder / "model.safetensors").read_bytes() == versions[6]
    assert late.num_fetched_bytes < 1.25 * snapshot_bytes


async def test_a_damaged_or_lost_chunk_is_requested_again(
    learner: LearnerSide, requests: RequestClient, model: Path, tmp_path: Path
) -> None:
    fetcher = WeightFetcher(requests=requests, base_model=model, folder=tmp_path, chunk_timeout_s=0.2)
    data = scaled_weights(model, scale=1.0)
    await learner.publish(data, publication=1, version=0)
    num_chunks = 0

    def lose_first_damage_second(_: Chunk, payload: bytes) -> bytes | None:
        nonlocal num_chunks
        num_chunks += 1
        if num_chunks == 1:
            return None
        return payload[:-1] + bytes([payload[-1] ^ 1]) if num_chunks == 2 else payload

    learner.proxy.edit_chunk = lose_first_damage_second
    prepared = await fetcher.fetch(PolicyTag(RUN, 1, 0))
    assert (prepared.folder / "model.safetensors").read_bytes() == data
    assert fetcher.num_repeated_chunks == 2


async def test_chunks_of_a_failed_fetch_are_not_fetched_again(
    learner: LearnerSide, fetcher: WeightFetcher, model: Path
) -> None:
    await learner.publish(scaled_weights(model, scale=1.0), publication=1, version=0)
    repair = learner.damage(base=-1, publication=1, position=-1)
    with pytest.raises(WeightsError, match="does not match its checksum"):
        await fetcher.fetch(PolicyTag(RUN, 1, 0))
    num_bytes = fetcher.num_fetched_bytes
    assert num_bytes >= 2 * CHUNK_BYTES
    repair()
    await fetcher.fetch(PolicyTag(RUN, 1, 0))
    snapshot = learner.part(base=-1, publication=1)
    assert fetcher.num_fetched_bytes == snapshot.num_bytes
    assert snapshot.num_bytes - num_bytes < CHUNK_BYTES
    await fetcher.fetch(PolicyTag(RUN, 1, 0))
    assert fetcher.num_fetched_bytes == snapshot.num_bytes, "the held publication is not fetched again"


@pytest.mark.parametrize("position", [0, 9, 1_000, -1])
async def test_a_flipped_bit_in_the_held_weights_is_detected_and_a_snapshot_replaces_them(
    learner: LearnerSide, fetcher: WeightFetcher, model: Path, position: int
) -> None:
    data = scaled_weights(model, scale=1.0)
    await learner.publish(data, publication=1, version=0)
    file = (await fetcher.fetch(PolicyTag(RUN, 1, 0))).folder / "model.safetensors"
    damaged = bytearray(data)
    damaged[position] ^= 1
    file.write_bytes(damaged)
    data = nudged(data, seed=0)
    await learner.publish(data, publication=2, version=1)
    with pytest.raises(WeightsError, match="must have the checksum"):
        await fetcher.fetch(PolicyTag(RUN, 2, 1))
    prepared = await fetcher.fetch(PolicyTag(RUN, 2, 1))
    assert (prepared.folder / "model.safetensors").read_bytes() == data
    (prepared.folder / "model.safetensors").write_bytes(damaged)
    prepared = await fetcher.fetch(PolicyTag(RUN, 2, 1))
    assert (prepared.folder / "model.safetensors").read_bytes() == data


def manifest_for(model: Path) -> Manifest:
    offer = Series(RUN, chunk_bytes=CHUNK_BYTES).make_offer(scaled_weights(model, scale=1.0), publication=4, version=2)
    return offer.manifest.model_copy(update={"parts": [part.fields for part in offer.parts]})


def test_a_manifest_whose_parts_do_not_lead_to_its_publication_is_refused(model: Path) -> None:
    tag, manifest = PolicyTag(RUN, 4, 2), manifest_for(model)
    check_manifest(manifest, tag, held=-1)
    check_manifest(manifest, tag, held=3)
    snapshot = manifest.parts[0]

    def changed(**update: object) -> PartFields:
        return snapshot.model_copy(update=update)

    for parts, held, message in [
        ([], -1, "the parts must end at publication 4, got -1"),
        ([], 4, "the parts must end at publication 4, got 4"),
        ([changed(publication=3)], -1, "the parts must end at publication 4, got 3"),
        ([changed(base=2)], 3, r"must have the base 3 or -1 \(nothing\), got 2"),
        (
            [changed(publication=2), changed(base=1)],
            -1,
            "the base of a part must be 2, the end of the previous part, got 1",
        ),
        ([changed(num_bytes=snapshot.num_bytes + CHUNK_BYTES)], -1, r"must have \d+ chunk checksums, got"),
    ]:
        with pytest.raises(WeightsError, match=message):
            check_manifest(manifest.model_copy(update={"parts": parts}), tag, held=held)
    with pytest.raises(WeightsError, match="got a manifest of publication 4"):
        check_manifest(manifest, PolicyTag(RUN, 4, 3), held=-1)


def test_a_manifest_of_other_tensors_is_refused(model: Path) -> None:
    data, manifest = scaled_weights(model, scale=1.0), manifest_for(model)
    check_tensors(data, manifest)
    tensors = manifest.tensors
    for changed in (tensors[1:], [tensors[0].model_copy(update={"shape": [1]}), *tensors[1:]]):
        with pytest.raises(WeightsError, match="other tensors than its manifest lists"):
            check_tensors(data, manifest.model_copy(update={"tensors": changed}))


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0[1,2,3] ", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"])
def test_bytes_that_are_not_safetensors_are_refused(model: Path, data: bytes) -> None:
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        check_tensors(data, manifest_for(model))
