"""Offers weights in checked chunks, fetched by each engine's weight agent at its own pace.

    Series (outside the plane) ─► offer ─► Announcement on PUB
    EngineReport ─► registry, EngineReply(newest)     ManifestRequest ─► Manifest     ChunkRequest ─► Chunk

What is offered are deltas and snapshots of a safetensors file: `learner.network.weight_deltas`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from learner.leases.engines import Engines
from learner.network.weight_deltas import Offer, Publications
from protocol.errors import ProtocolError
from protocol.fault_injection import fault_point
from protocol.framing import Message, decode, encode
from protocol.messages import (
    Announcement,
    Chunk,
    ChunkRequest,
    EngineReply,
    EngineReport,
    ErrorReply,
    ManifestRequest,
)
from protocol.transport import Publisher as PubSocket
from protocol.transport import Router

log = logging.getLogger(__name__)

# What agents ask for is short.
MAX_REQUEST_BYTES = 1 << 20


class Publisher:
    """The learner's half of the weight plane. Runs in the plane's thread."""

    def __init__(
        self,
        *,
        router: Router,
        announcements: PubSocket,
        engines: Engines,
        run_id: str,
        on_engines_changed: Callable[[], None],
    ) -> None:
        self._router = router
        self._announcements = announcements
        self._engines = engines
        self._run_id = run_id
        self._on_engines_changed = on_engines_changed
        self._publications = Publications()
        self.num_malformed = 0

    async def offer(self, offer: Offer) -> None:
        """From now on the newest."""
        self._publications.add(offer)
        fault_point("publication.offered")
        manifest = offer.manifest
        announcement = Announcement(run_id=manifest.run_id, publication=manifest.publication, version=manifest.version)
        self._announcements.send([encode(announcement)])
        fault_point("publication.announced")

    async def serve(self) -> None:
        """Until cancelled."""
        while True:
            peer, frames = await self._router.recv()
            try:
                message, _ = decode(frames)
                reply, payload = self._answer(message)
            except ProtocolError as error:
                self.num_malformed += 1
                self._router.penalize(peer)
                log.warning("refused a message: %s", error)
                continue
            self._router.send(peer, [encode(reply), *payload])

    def _answer(self, message: Message) -> tuple[Message, list[memoryview]]:
        match message:
            case EngineReport():
                self._engines.report(message, now_s=time.monotonic())
                self._on_engines_changed()
                newest = self._publications.newest
                reply = EngineReply(
                    request_id=message.request_id,
                    run_id=self._run_id,
                    publication=newest.publication if newest else -1,
                    version=newest.version if newest else -1,
                )
                return reply, []
            case ManifestRequest():
                manifest = self._publications.manifest(message.publication, held=message.held)
                if manifest is None:
                    return self._gone(message), []
                return manifest.model_copy(update={"request_id": message.request_id}), []
            case ChunkRequest(base=base, publication=publication, index=index):
                data = self._publications.chunk(base=base, publication=publication, index=index)
                if data is None:
                    return self._gone(message), []
                chunk = Chunk(request_id=message.request_id, base=base, publication=publication, index=index)
                return chunk, [data]
            case _:
                raise ProtocolError(f"{message.kind} has no business at the publisher")

    def _gone(self, request: ManifestRequest | ChunkRequest) -> ErrorReply:
        return ErrorReply(
            request_id=request.request_id,
            error=f"publication {request.publication} is not (or no longer) offered: ask for the newest",
        )
