"""Brings a publication's weights to the disk: what is missing of it, checked at every step.

    manifest ─► chunks, each checked, asked for again where missing ─► parts, each applied and checked ─► folder

It says which publication it holds, so that it gets a delta; what it holds is checked against its checksum with every
use, and given up where that does not fit: the next try begins with a snapshot.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protocol.deltas import Data, checksum, decode
from protocol.errors import ProtocolError, WeightsError
from protocol.framing import Buffer
from protocol.messages import CanaryFields, Chunk, ChunkRequest, Manifest, ManifestRequest, PartFields
from protocol.request_client import RequestClient
from protocol.types import PolicyTag

log = logging.getLogger(__name__)

_MANIFEST_TIMEOUT_S = 10.0
# For 8 MiB: a link of 1 MB/s passes with what else is in flight.
_CHUNK_TIMEOUT_S = 30.0
_CHUNK_ATTEMPTS = 3
# Chunks asked for at once: enough to hide a round trip, few enough to bound memory at 8 MiB each.
_CHUNKS_IN_FLIGHT = 4
_NOTHING = -1
_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A verified publication in a Hugging Face folder."""

    tag: PolicyTag
    folder: Path
    checksum: str
    canary: CanaryFields | None


class WeightFetcher:
    """Fetches one publication at a time into `folder`, which is its own. Other files of a model are `base_model`'s.

    Memory: one set of weights, and what is being fetched.
    """

    def __init__(self, *, requests: RequestClient, base_model: Path, folder: Path) -> None:
        self._requests = requests
        self._base_model = base_model
        self._folder = folder
        self._held: Prepared | None = None
        self._chunks: dict[tuple[int, int, int], Buffer] = {}
        self._buffer = bytearray()
        self.num_bytes = 0
        self.num_repeated_chunks = 0

    async def fetch(self, tag: PolicyTag) -> Prepared:
        """The publication `tag`, all of it. What has been fetched of it is kept where this fails or is cancelled.

        Raises: WeightsError, RemoteError (it is no longer offered), ProtocolError, TimeoutError.
        """
        if self._held is not None and self._held.tag == tag:
            if await asyncio.to_thread(_is_intact, self._held):
                return self._held
            self._held = None
        number = _NOTHING
        if self._held is not None and self._held.tag.run_id == tag.run_id:
            number = self._held.tag.publication
        request = ManifestRequest(request_id=self._requests.next_id(), publication=tag.publication, held=number)
        manifest, _ = await self._requests.request(request, Manifest, timeout_s=_MANIFEST_TIMEOUT_S)
        check_manifest(manifest, tag, held=number)
        wanted = [(part, i) for part in manifest.parts for i in range(len(part.chunk_checksums))]
        kept = {(part.base, part.publication, i) for part, i in wanted}
        self._chunks = {key: data for key, data in self._chunks.items() if key in kept}
        await self._fetch_chunks(manifest, wanted)
        self._held = await asyncio.to_thread(self._prepare, tag, manifest)
        self._chunks.clear()
        return self._held

    def forget_others(self) -> None:
        """Removes all folders but that of what is held."""
        for folder in self._folder.glob("publication-*"):
            if self._held is None or folder != self._held.folder:
                shutil.rmtree(folder, ignore_errors=True)

    async def _fetch_chunks(self, manifest: Manifest, wanted: Sequence[tuple[PartFields, int]]) -> None:
        slots = asyncio.Semaphore(_CHUNKS_IN_FLIGHT)

        async def fetch(part: PartFields, index: int) -> None:
            async with slots:
                await self._fetch_chunk(manifest, part, index)

        missing = [(part, i) for part, i in wanted if (part.base, part.publication, i) not in self._chunks]
        tasks = [asyncio.ensure_future(fetch(part, index)) for part, index in missing]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch_chunk(self, manifest: Manifest, part: PartFields, index: int) -> None:
        """Until it is there and fits its checksum. Raises: what the last attempt failed by; RemoteError at once."""
        for attempt in range(1, _CHUNK_ATTEMPTS + 1):
            try:
                data = await self._request_chunk(manifest, part, index)
            except (TimeoutError, ProtocolError, WeightsError) as error:
                if attempt == _CHUNK_ATTEMPTS:
                    raise
                self.num_repeated_chunks += 1
                log.warning("asked for again: %s", error)
            else:
                self._chunks[part.base, part.publication, index] = data
                self.num_bytes += len(data)
                return

    async def _request_chunk(self, manifest: Manifest, part: PartFields, index: int) -> Buffer:
        request = ChunkRequest(
            request_id=self._requests.next_id(), base=part.base, publication=part.publication, index=index
        )
        _, payload = await self._requests.request(request, Chunk, timeout_s=_CHUNK_TIMEOUT_S)
        expected = min(manifest.chunk_bytes, part.num_bytes - index * manifest.chunk_bytes)
        if len(payload) != 1 or len(payload[0]) != expected:
            raise WeightsError(f"chunk {index} of publication {part.publication} must have {expected} bytes")
        if checksum(payload[0]) != part.chunk_checksums[index]:
            raise WeightsError(f"chunk {index} of publication {part.publication} does not match its checksum")
        return payload[0]

    def _prepare(self, tag: PolicyTag, manifest: Manifest) -> Prepared:
        """Applies the parts, checks and writes the whole; in a thread: seconds for gigabytes. Raises: WeightsError."""
        try:
            self._apply(manifest)
        except WeightsError:
            self._held = None
            self._chunks.clear()
            raise
        check_tensors(self._buffer, manifest)
        check_shapes(manifest, self._base_model)
        folder = self._folder / f"publication-{tag.publication}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _FILE).write_bytes(self._buffer)
            for path in self._base_model.iterdir():
                if path.is_file() and ".safetensors" not in path.name and path.suffix != ".bin":
                    shutil.copyfile(path, folder / path.name)
        except OSError as error:
            raise WeightsError(f"{folder} cannot be written: {error.strerror or error}") from error
        return Prepared(tag, folder, manifest.parts[-1].checksum, manifest.canary)

    def _apply(self, manifest: Manifest) -> None:
        """Leaves the weights in `_buffer`, part upon part in place."""
        if len(self._buffer) != manifest.num_bytes:
            self._buffer = bytearray(manifest.num_bytes)
        base: Data | None = None if self._held is None else _mapped(self._held.folder / _FILE)
        for part in manifest.parts:
            chunks = [self._chunks[part.base, part.publication, i] for i in range(len(part.chunk_checksums))]
            base = decode(
                chunks[0] if len(chunks) == 1 else b"".join(chunks),
                None if part.base == _NOTHING else base,
                num_bytes=manifest.num_bytes,
                word_bytes=manifest.word_bytes,
                expected=part.checksum,
                out=self._buffer,
            )


def check_manifest(manifest: Manifest, tag: PolicyTag, *, held: int) -> None:
    """It is of `tag`, and its parts lead there from `held` or from nothing. Raises: WeightsError."""
    if (manifest.run_id, manifest.publication, manifest.version) != (tag.run_id, tag.publication, tag.version):
        raise WeightsError(f"asked for {tag}, got a manifest of publication {manifest.publication}")
    at = manifest.parts[0].base if manifest.parts else held
    if at not in (held, _NOTHING):
        raise WeightsError(f"{tag}: the first part must begin at publication {held} or at nothing, got {at}")
    for part in manifest.parts:
        if part.base != at:
            raise WeightsError(
                f"{tag}: a part must begin where the last one ends, at publication {at}, not {part.base}"
            )
        num_chunks = -(-part.num_bytes // manifest.chunk_bytes)
        if len(part.chunk_checksums) != num_chunks:
            raise WeightsError(f"{tag}: {num_chunks} chunks need as many checksums, got {len(part.chunk_checksums)}")
        at = part.publication
    if at != tag.publication or not manifest.parts:
        raise WeightsError(f"{tag}: the parts end at publication {at}")


def check_tensors(data: Data, manifest: Manifest) -> None:
    """The safetensors header of `data` lists the manifest's tensors. Raises: WeightsError."""
    try:
        found = _table(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"publication {manifest.publication} is not a safetensors file: {error}") from error
    wanted = {tensor.name: (tensor.dtype, tensor.shape, tensor.offset) for tensor in manifest.tensors}
    if found != wanted:
        raise WeightsError(f"publication {manifest.publication} holds other tensors than its manifest says")


def check_shapes(manifest: Manifest, base_model: Path) -> None:
    """The manifest's tensors have the shapes that those of the same name have in `base_model`.

    SGLang ends where they do not: it undoes a load that failed halfway by loading the same files again.
    Raises: WeightsError.
    """
    published = {tensor.name: tensor.shape for tensor in manifest.tensors}
    for path in sorted(base_model.glob("*.safetensors")):
        try:
            table = _table(_mapped(path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path} is not a safetensors file: {error}") from error
        for name, (_, shape, _) in table.items():
            if published.get(name, shape) != shape:
                raise WeightsError(
                    f"publication {manifest.publication}: {name} must have the shape {shape} of the base model, "
                    f"got {published[name]}"
                )


def _table(data: Data) -> dict[str, tuple[str, list[int], int]]:
    """Of a safetensors file: name → (dtype, shape, where its bytes begin)."""
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    return {
        name: (entry["dtype"], list(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _is_intact(held: Prepared) -> bool:
    try:
        return checksum(_mapped(held.folder / _FILE)) == held.checksum
    except WeightsError:
        return False


def _mapped(path: Path) -> Data:
    """A file's bytes, read as they are looked at. Raises: WeightsError."""
    try:
        return np.memmap(path, np.uint8, "r").data
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
