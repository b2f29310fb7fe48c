"""The parts that weight agents can fetch: a delta from each publication to the next, and some snapshots.

    snapshot 4 ─► delta 5 ─► delta 6 ─► delta 7

    an agent with publication 6 fetches delta 7; an agent without weights fetches snapshot 4 and deltas 5 to 7

A snapshot is made when the deltas since the last snapshot have more than a quarter of its bytes. So a new agent fetches
at most 1.25 times the bytes of a snapshot; if nearly every weight changes, each publication has a snapshot. The newest
two snapshots and all later parts are kept, so that an agent can finish a fetch that it has begun. Memory: the newest
weights uncompressed, and three to four compressed snapshots with their deltas.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from protocol.deltas import checksum, encode
from protocol.weight_messages import CanaryFields, Manifest, PartFields, TensorFields

CHUNK_BYTES = 8 << 20
NOTHING = -1
"""Stands for "no publication": the base of a snapshot, and the publication of an agent without weights."""
_CHAIN_LIMIT = 0.25
_KEPT_SNAPSHOTS = 2
_HALF_WORDS = ("BF16", "F16")


@dataclass(frozen=True, slots=True)
class Part:
    """A delta or a snapshot. `fields`: its size and checksums; `payload`: its compressed bytes."""

    fields: PartFields
    payload: bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """A publication. `manifest`: request_id 0, no parts. `parts`: a snapshot, a delta from the previous publication, or
    both."""

    manifest: Manifest
    parts: tuple[Part, ...]


@dataclass(slots=True)
class Series:
    """Encodes successive weights as offers. Not thread-safe."""

    run_id: str
    chunk_bytes: int = CHUNK_BYTES
    _previous: tuple[int, bytes] | None = field(default=None, init=False)
    _snapshot_bytes: int = field(default=0, init=False)
    _chain_bytes: int = field(default=0, init=False)

    def make_offer(self, data: bytes, *, publication: int, version: int, canary: CanaryFields | None = None) -> Offer:
        """Encodes one publication; takes seconds for gigabytes. `data`: the bytes of a safetensors file.

        `data` stays in memory until the next call, which encodes its delta relative to it.
        """
        tensors = _tensors(data)
        half_bytes = sum(tensor.num_bytes for tensor in tensors if tensor.dtype in _HALF_WORDS)
        manifest = Manifest(
            request_id=0,
            run_id=self.run_id,
            publication=publication,
            version=version,
            num_bytes=len(data),
            word_bytes=2 if 2 * half_bytes > len(data) else 4,
            chunk_bytes=self.chunk_bytes,
            tensors=tensors,
            parts=[],
            canary=canary,
        )
        parts = self._parts(data, manifest)
        self._previous = publication, data
        return Offer(manifest, parts)

    def _parts(self, data: bytes, manifest: Manifest) -> tuple[Part, ...]:
        whole = checksum(data)
        delta = None
        if self._previous is not None and len(self._previous[1]) == len(data):
            base, held = self._previous
            delta = self._part(encode(data, held, word_bytes=manifest.word_bytes), base, manifest.publication, whole)
            self._chain_bytes += delta.fields.num_bytes
            if self._chain_bytes <= _CHAIN_LIMIT * self._snapshot_bytes:
                return (delta,)
        snapshot = self._part(encode(data, None, word_bytes=manifest.word_bytes), NOTHING, manifest.publication, whole)
        self._snapshot_bytes, self._chain_bytes = snapshot.fields.num_bytes, 0
        if delta is None or delta.fields.num_bytes >= snapshot.fields.num_bytes:
            return (snapshot,)
        return delta, snapshot

    def _part(self, payload: bytes, base: int, publication: int, whole: str) -> Part:
        view = memoryview(payload)
        chunks = [checksum(view[start : start + self.chunk_bytes]) for start in range(0, len(view), self.chunk_bytes)]
        fields = PartFields(
            base=base, publication=publication, num_bytes=len(payload), checksum=whole, chunk_checksums=chunks
        )
        return Part(fields, payload)


class Publications:
    """The offers that agents can fetch now."""

    def __init__(self) -> None:
        self._offers: dict[int, Offer] = {}
        self._parts: dict[tuple[int, int], Part] = {}

    @property
    def num_bytes(self) -> int:
        """Compressed size of all kept parts."""
        return sum(len(part.payload) for part in self._parts.values())

    @property
    def newest(self) -> Manifest | None:
        return self._offers[max(self._offers)].manifest if self._offers else None

    def add(self, offer: Offer) -> None:
        """Adds an offer and removes all parts before the second newest snapshot."""
        self._offers[offer.manifest.publication] = offer
        self._parts.update({(part.fields.base, part.fields.publication): part for part in offer.parts})
        snapshots = sorted(publication for base, publication in self._parts if base == NOTHING)
        oldest = snapshots[-_KEPT_SNAPSHOTS:][0]
        self._offers = {number: kept for number, kept in self._offers.items() if number >= oldest}
        self._parts = {key: part for key, part in self._parts.items() if key[1] >= oldest}

    def manifest(self, publication: int, *, held: int) -> Manifest | None:
        """The manifest with the parts to fetch, in order: the chain from `held` to `publication` with the fewest bytes.

        Returns None if `publication` is not kept.
        """
        offer = self._offers.get(publication)
        if offer is None:
            return None
        chains: list[list[PartFields]] = []
        chain: list[PartFields] = []
        at: int | None = publication
        while at is not None and at != held:
            snapshot = self._parts.get((NOTHING, at))
            if snapshot is not None:
                chains.append([snapshot.fields, *chain])
            delta = next((part for (base, to), part in self._parts.items() if to == at and base != NOTHING), None)
            if delta is not None:
                chain = [delta.fields, *chain]
            at = None if delta is None else delta.fields.base
        if at == held:
            chains.append(chain)
        parts = min(chains, key=lambda fields: sum(part.num_bytes for part in fields))
        return offer.manifest.model_copy(update={"parts": parts})

    def chunk(self, *, base: int, publication: int, index: int) -> memoryview | None:
        """Chunk `index` of the part from `base` to `publication`; None if there is no such chunk."""
        part = self._parts.get((base, publication))
        offer = self._offers.get(publication)
        if part is None or offer is None or index >= len(part.fields.chunk_checksums):
            return None
        chunk_bytes = offer.manifest.chunk_bytes
        return memoryview(part.payload)[index * chunk_bytes : (index + 1) * chunk_bytes]


def _tensors(data: bytes) -> list[TensorFields]:
    """The tensor table of a safetensors file."""
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    return [
        TensorFields(
            name=name,
            shape=list(entry["shape"]),
            dtype=entry["dtype"],
            offset=8 + header_bytes + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    ]
