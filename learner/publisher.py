"""Offers weights: a snapshot in checked chunks, fetched by each engine's weight agent at its own pace.

    make_snapshot(bytes) ─► offer ─► Announcement on PUB
    EngineReport ─► registry, EngineReply(newest)     ManifestRequest ─► Manifest     ChunkRequest ─► Chunk

A snapshot is the bytes of a safetensors file. The last two publications can be fetched, so that an agent which has
begun one can finish it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from learner.engines import Engines
from protocol.errors import ProtocolError
from protocol.faults import fault_point
from protocol.messages import (
    Announcement,
    Chunk,
    ChunkRequest,
    EngineReply,
    EngineReport,
    ErrorReply,
    Manifest,
    ManifestRequest,
    TensorFields,
)
from protocol.transport import Publisher as PubSocket
from protocol.transport import Router
from protocol.wire import Message, decode, encode

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
_KEPT = 2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`data` is a whole safetensors file; `manifest` (request_id 0) says how to check it."""

    manifest: Manifest
    data: bytes


def make_snapshot(
    data: bytes, *, run_id: str, publication: int, version: int, chunk_bytes: int = CHUNK_BYTES
) -> Snapshot:
    """Checksums and the tensor table of a safetensors file."""
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = [
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
    view = memoryview(data)
    manifest = Manifest(
        request_id=0,
        run_id=run_id,
        publication=publication,
        version=version,
        num_bytes=len(data),
        chunk_bytes=chunk_bytes,
        tensors=tensors,
        chunk_sha256=[
            hashlib.sha256(view[start : start + chunk_bytes]).hexdigest() for start in range(0, len(data), chunk_bytes)
        ],
        sha256=hashlib.sha256(view).hexdigest(),
    )
    return Snapshot(manifest, data)


class Publisher:
    """The learner's half of the weight plane. Runs in the plane's thread."""

    def __init__(
        self,
        *,
        router: Router,
        announcements: PubSocket,
        engines: Engines,
        run_id: str,
        on_engines_changed: Callable[[], Awaitable[None]],
    ) -> None:
        self._router = router
        self._announcements = announcements
        self._engines = engines
        self._run_id = run_id
        self._on_engines_changed = on_engines_changed
        self._snapshots: dict[int, Snapshot] = {}
        self.num_malformed = 0

    async def offer(self, snapshot: Snapshot) -> None:
        """From now on the newest. The last two stay to be fetched."""
        manifest = snapshot.manifest
        self._snapshots[manifest.publication] = snapshot
        for old in sorted(self._snapshots)[:-_KEPT]:
            del self._snapshots[old]
        fault_point("publication.offered")
        announcement = Announcement(run_id=manifest.run_id, publication=manifest.publication, version=manifest.version)
        await self._announcements.send([encode(announcement)])
        fault_point("publication.announced")

    async def serve(self) -> None:
        """Until cancelled."""
        while True:
            peer, frames = await self._router.recv()
            try:
                message, _ = decode(frames)
                reply, payload = await self._answer(message)
            except ProtocolError as error:
                self.num_malformed += 1
                log.warning("refused a message: %s", error)
                continue
            await self._router.send(peer, [encode(reply), *payload])

    async def _answer(self, message: Message) -> tuple[Message, list[memoryview]]:
        match message:
            case EngineReport():
                self._engines.report(message, now_s=time.monotonic())
                await self._on_engines_changed()
                newest = self._snapshots[max(self._snapshots)].manifest if self._snapshots else None
                reply = EngineReply(
                    request_id=message.request_id,
                    run_id=self._run_id,
                    publication=newest.publication if newest else -1,
                    version=newest.version if newest else -1,
                )
                return reply, []
            case ManifestRequest():
                snapshot = self._snapshots.get(message.publication)
                if snapshot is None:
                    return self._gone(message.request_id, message.publication), []
                return snapshot.manifest.model_copy(update={"request_id": message.request_id}), []
            case ChunkRequest():
                snapshot = self._snapshots.get(message.publication)
                if snapshot is None or message.index >= len(snapshot.manifest.chunk_sha256):
                    return self._gone(message.request_id, message.publication), []
                start = message.index * snapshot.manifest.chunk_bytes
                chunk = Chunk(request_id=message.request_id, publication=message.publication, index=message.index)
                return chunk, [memoryview(snapshot.data)[start : start + snapshot.manifest.chunk_bytes]]
            case _:
                raise ProtocolError(f"{message.kind} has no business at the publisher")

    def _gone(self, request_id: int, publication: int) -> ErrorReply:
        return ErrorReply(
            request_id=request_id, error=f"publication {publication} is not (or no longer) offered: ask for the newest"
        )
