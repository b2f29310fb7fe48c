"""The parts that an agent fetches, and bounds on bytes and memory, without sockets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save

from learner.network.weight_deltas import NOTHING, Offer, Publications, Series
from protocol.deltas import decode
from protocol.weight_messages import Manifest

NUM = 60_000


def weights(values: np.ndarray) -> bytes:
    """A safetensors file of one bf16 tensor with these bits, uint16 [N]."""
    return save({"w": torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)})


class Learner:
    """Publishes random weights that change by a fraction from one version to the next."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.series = Series("run", chunk_bytes=4096)
        self.publications = Publications()
        self.data: dict[int, bytes] = {}
        self.offers: dict[int, Offer] = {}
        self._values = (self.rng.normal(size=NUM) * 0.02).astype(np.float32).view(np.uint32).astype(np.uint32) >> 16
        self._values = self._values.astype(np.uint16)

    def publish(self, *, fraction: float, num: int = NUM) -> int:
        number = len(self.data)
        changed = self.rng.random(len(self._values)) < fraction
        self._values = self._values.copy()
        self._values[changed] += self.rng.integers(1, 3, size=int(changed.sum()), dtype=np.uint16)
        self.data[number] = weights(self._values[:num])
        self.offers[number] = self.series.make_offer(self.data[number], publication=number, version=number)
        self.publications.add(self.offers[number])
        return number

    def manifest(self, publication: int, *, held: int) -> Manifest:
        manifest = self.publications.manifest(publication, held=held)
        assert manifest is not None
        return manifest

    def fetched(self, manifest: Manifest, *, held: int) -> bytes:
        """The weights that an agent holding publication `held` reconstructs from the parts."""
        data = self.data.get(held, b"")
        for part in manifest.parts:
            chunks = [
                self.publications.chunk(base=part.base, publication=part.publication, index=index)
                for index in range(len(part.chunk_checksums))
            ]
            payload = b"".join(chunk for chunk in chunks if chunk is not None)
            assert len(payload) == part.num_bytes
            data = bytes(
                decode(
                    payload,
                    None if part.base == NOTHING else data,
                    num_bytes=manifest.num_bytes,
                    word_bytes=manifest.word_bytes,
                    expected=part.checksum,
                )
            )
        return data


@pytest.fixture
def learner() -> Learner:
    return Learner()


def steps(manifest: Manifest) -> list[tuple[int, int]]:
    return [(part.base, part.publication) for part in manifest.parts]


def test_the_newest_can_be_fetched_from_any_older_publication(learner: Learner) -> None:
    newest = -1
    for _ in range(12):
        newest = learner.publish(fraction=0.01)
        for held in range(-1, newest):
            manifest = learner.manifest(newest, held=held)
            assert manifest.word_bytes == 2
            assert learner.fetched(manifest, held=held) == learner.data[newest]
    assert steps(learner.manifest(newest, held=newest - 1)) == [(newest - 1, newest)]
    assert steps(learner.manifest(newest, held=newest - 2)) == [(newest - 2, newest - 1), (newest - 1, newest)]
    assert learner.manifest(newest, held=newest).parts == []


def test_a_late_agent_fetches_at_most_a_quarter_more_than_a_snapshot(learner: Learner) -> None:
    num_snapshots = snapshot_bytes = 0
    for _ in range(60):
        newest = learner.publish(fraction=0.01)
        snapshots = [part for part in learner.offers[newest].parts if part.fields.base == NOTHING]
        num_snapshots += len(snapshots)
        if snapshots:
            snapshot_bytes = snapshots[0].fields.num_bytes
        late = sum(part.num_bytes for part in learner.manifest(newest, held=-1).parts)
        assert late <= 1.25 * snapshot_bytes
        assert learner.publications.num_bytes <= 2.6 * snapshot_bytes
    assert 2 < num_snapshots < 8


@pytest.mark.parametrize("fraction", [0.001, 0.2, 1.0])
def test_the_parts_are_never_much_larger_than_a_snapshot(learner: Learner, fraction: float) -> None:
    for _ in range(6):
        newest = learner.publish(fraction=fraction)
        snapshot = Series("run").make_offer(learner.data[newest], publication=newest, version=newest).parts[0]
        for held in range(newest):
            way = sum(part.num_bytes for part in learner.manifest(newest, held=held).parts)
            assert way <= (1.0 if held == newest - 1 else 1.25) * snapshot.fields.num_bytes


def test_parts_before_the_last_but_one_snapshot_are_removed(learner: Learner) -> None:
    for _ in range(4):
        learner.publish(fraction=1.0)  # a snapshot each
    assert [learner.publications.manifest(number, held=-1) is None for number in range(4)] == [True, True, False, False]
    assert learner.publications.chunk(base=NOTHING, publication=1, index=0) is None
    assert learner.publications.chunk(base=NOTHING, publication=3, index=10**6) is None
    newest = learner.publications.newest
    assert newest is not None
    assert newest.publication == 3


def test_a_changed_size_makes_a_snapshot(learner: Learner) -> None:
    learner.publish(fraction=0.01)
    newest = learner.publish(fraction=0.01, num=NUM // 2)
    manifest = learner.manifest(newest, held=newest - 1)
    assert steps(manifest) == [(NOTHING, newest)]
    assert learner.fetched(manifest, held=newest - 1) == learner.data[newest]


def test_fp32_uses_words_of_four_bytes() -> None:
    data = save({"w": torch.randn(100), "n": torch.zeros(3, dtype=torch.int64)})
    manifest = Series("run").make_offer(data, publication=0, version=0).manifest
    assert manifest.word_bytes == 4
    assert {tensor.name: (tensor.dtype, tensor.num_bytes) for tensor in manifest.tensors} == {
        "w": ("F32", 400),
        "n": ("I64", 24),
    }
