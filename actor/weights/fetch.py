"""Fetches a publication from the learner, verifies it, and writes it to a Hugging Face folder.

    manifest ─► chunks, each verified, requested again if lost or damaged ─► parts, each applied and verified ─► folder

The manifest request names the publication that the fetcher holds, so that the learner sends a delta. The held weights
are verified against their checksum at every use. If they are damaged they are dropped, and the next attempt fetches a
snapshot.
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
from protocol.request_client import RequestClient
from protocol.types import PolicyTag
from protocol.weight_messages import CanaryFields, Chunk, ChunkRequest, Manifest, ManifestRequest, PartFields

log = logging.getLogger(__name__)

_MAX_CHUNK_ATTEMPTS = 3
# Concurrent chunk requests: enough to hide a round trip, few enough to bound memory at 8 MiB each.
_MAX_CHUNKS_IN_FLIGHT = 4
_NOTHING = -1
"""The base of a snapshot, and the publication that an empty fetcher holds."""
_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class PreparedWeights:
    """A verified publication, written to a Hugging Face folder. `checksum`: of its safetensors file."""

    tag: PolicyTag
    folder: Path
    checksum: str
    canary: CanaryFields | None


class WeightFetcher:
    """Fetches one publication at a time into a subfolder of `folder`, which no other process may use.

    The other files of the model (config, tokenizer) are copied from `base_model`. Memory: one set of weights, and the
    chunks of the current fetch. The default `chunk_timeout_s` allows a link of 1 MB/s: four chunks of 8 MiB at once.
    """

    def __init__(
        self,
        *,
        requests: RequestClient,
        base_model: Path,
        folder: Path,
        manifest_timeout_s: float = 10.0,
        chunk_timeout_s: float = 30.0,
    ) -> None:
        self._requests = requests
        self._base_model = base_model
        self._folder = folder
        self._manifest_timeout_s = manifest_timeout_s
        self._chunk_timeout_s = chunk_timeout_s
        self._held: PreparedWeights | None = None
        self._chunks: dict[tuple[int, int, int], Buffer] = {}
        self._buffer = bytearray()
        self.num_fetched_bytes = 0
        self.num_repeated_chunks = 0

    async def fetch(self, tag: PolicyTag) -> PreparedWeights:
        """Fetches the publication `tag` and writes it to disk. Takes seconds for gigabytes.

        If this fails or is cancelled, the fetched chunks are kept for the next attempt.

        Raises: WeightsError, RemoteError (no longer offered), ProtocolError, TimeoutError.
        """
        if self._held is not None and self._held.tag == tag:
            if await asyncio.to_thread(_is_intact, self._held):
                return self._held
            self._held = None
        held = _NOTHING
        if self._held is not None and self._held.tag.run_id == tag.run_id:
            held = self._held.tag.publication
        request = ManifestRequest(request_id=self._requests.next_id(), publication=tag.publication, held=held)
        manifest, _ = await self._requests.request(request, Manifest, timeout_s=self._manifest_timeout_s)
        check_manifest(manifest, tag, held=held)
        wanted = [(part, i) for part in manifest.parts for i in range(len(part.chunk_checksums))]
        keys = {(part.base, part.publication, i) for part, i in wanted}
        self._chunks = {key: data for key, data in self._chunks.items() if key in keys}
        await self._fetch_chunks(manifest, wanted)
        self._held = await asyncio.to_thread(self._prepare, tag, manifest)
        self._chunks.clear()
        return self._held

    def delete_other_folders(self) -> None:
        """Deletes the folders of all publications except the held one."""
        for folder in self._folder.glob("publication-*"):
            if self._held is None or folder != self._held.folder:
                shutil.rmtree(folder, ignore_errors=True)

    async def _fetch_chunks(self, manifest: Manifest, wanted: Sequence[tuple[PartFields, int]]) -> None:
        slots = asyncio.Semaphore(_MAX_CHUNKS_IN_FLIGHT)

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
        """Fetches and verifies one chunk, with retries. Raises: the error of the last attempt; RemoteError at once."""
        for attempt in range(1, _MAX_CHUNK_ATTEMPTS + 1):
            try:
                data = await self._request_chunk(manifest, part, index)
            except (TimeoutError, ProtocolError, WeightsError) as error:
                if attempt == _MAX_CHUNK_ATTEMPTS:
                    raise
                self.num_repeated_chunks += 1
                log.warning("requesting a chunk again: %s", error)
            else:
                self._chunks[part.base, part.publication, index] = data
                self.num_fetched_bytes += len(data)
                return

    async def _request_chunk(self, manifest: Manifest, part: PartFields, index: int) -> Buffer:
        request = ChunkRequest(
            request_id=self._requests.next_id(), base=part.base, publication=part.publication, index=index
        )
        _, payload = await self._requests.request(request, Chunk, timeout_s=self._chunk_timeout_s)
        expected = min(manifest.chunk_bytes, part.num_bytes - index * manifest.chunk_bytes)
        if len(payload) != 1 or len(payload[0]) != expected:
            raise WeightsError(f"chunk {index} of publication {part.publication} must have {expected} bytes")
        if checksum(payload[0]) != part.chunk_checksums[index]:
            raise WeightsError(f"chunk {index} of publication {part.publication} does not match its checksum")
        return payload[0]

    def _prepare(self, tag: PolicyTag, manifest: Manifest) -> PreparedWeights:
        """Applies the parts, verifies the result and writes it. Seconds for gigabytes. Raises: WeightsError."""
        try:
            self._apply_parts(manifest)
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
        return PreparedWeights(tag, folder, manifest.parts[-1].checksum, manifest.canary)

    def _apply_parts(self, manifest: Manifest) -> None:
        """Decodes the parts one after another, each in place, into `_buffer`. Raises: WeightsError."""
        if len(self._buffer) != manifest.num_bytes:
            self._buffer = bytearray(manifest.num_bytes)
        base: Data | None = None if self._held is None else _memory_map(self._held.folder / _FILE)
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
    """Checks that a manifest is of `tag` and that its parts lead to it, from publication `held` or from nothing.

    Raises: WeightsError.
    """
    if (manifest.run_id, manifest.publication, manifest.version) != (tag.run_id, tag.publication, tag.version):
        raise WeightsError(f"requested {tag}, got a manifest of publication {manifest.publication}")
    at = manifest.parts[0].base if manifest.parts else held
    if at not in (held, _NOTHING):
        raise WeightsError(f"{tag}: the first part must have the base {held} or {_NOTHING} (nothing), got {at}")
    for part in manifest.parts:
        if part.base != at:
            raise WeightsError(f"{tag}: the base of a part must be {at}, the end of the previous part, got {part.base}")
        num_chunks = -(-part.num_bytes // manifest.chunk_bytes)
        if len(part.chunk_checksums) != num_chunks:
            raise WeightsError(f"{tag}: a part must have {num_chunks} chunk checksums, got {len(part.chunk_checksums)}")
        at = part.publication
    if at != tag.publication or not manifest.parts:
        raise WeightsError(f"{tag}: the parts must end at publication {tag.publication}, got {at}")


def check_tensors(data: Data, manifest: Manifest) -> None:
    """Checks that the safetensors header of `data` lists the manifest's tensors. Raises: WeightsError."""
    try:
        found = _read_header(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"publication {manifest.publication} is not a safetensors file: {error}") from error
    wanted = {tensor.name: (tensor.dtype, tensor.shape, tensor.offset) for tensor in manifest.tensors}
    if found != wanted:
        raise WeightsError(f"publication {manifest.publication} has other tensors than its manifest lists")


def check_shapes(manifest: Manifest, base_model: Path) -> None:
    """Checks that tensors of the manifest have the same shapes as in `base_model`.

    With other shapes SGLang would crash: after a load that fails part-way, it loads the same files again to undo it.

    Raises: WeightsError.
    """
    published = {tensor.name: tensor.shape for tensor in manifest.tensors}
    for path in sorted(base_model.glob("*.safetensors")):
        try:
            header = _read_header(_memory_map(path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path} is not a safetensors file: {error}") from error
        for name, (_, shape, _) in header.items():
            if published.get(name, shape) != shape:
                raise WeightsError(
                    f"publication {manifest.publication}: {name} must have the shape {shape} of the base model, "
                    f"got {published[name]}"
                )


def _read_header(data: Data) -> dict[str, tuple[str, list[int], int]]:
    """Reads the header of a safetensors file: name → (dtype, shape, offset of its bytes in the file)."""
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + header_bytes]))
    return {
        name: (entry["dtype"], list(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _is_intact(held: PreparedWeights) -> bool:
    try:
        return checksum(_memory_map(held.folder / _FILE)) == held.checksum
    except WeightsError:
        return False


def _memory_map(path: Path) -> Data:
    """Maps a file into memory; its bytes are read on access. Raises: WeightsError."""
    try:
        return np.memmap(path, np.uint8, "r").data
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
