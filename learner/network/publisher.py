"""The publisher: offers weights in checksummed chunks; the weight agent of each engine requests them one by one.

    training loop ─► Series.make_offer (main thread) ─► announce ─► Announcement on PUB
    weight agents ─► ROUTER ─► serve ─► ROUTER:    EngineReport    ─► EngineReply (newest publication)
                                                   ManifestRequest ─► Manifest
                                                   ChunkRequest    ─► Chunk
    serve   consumes: requests   produces: replies, engine states   waits for: a request   unblocked by: ROUTER

weight_deltas.py makes the offers: deltas and snapshots of a safetensors file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from learner.leases.engines import Engines
from learner.network.refusal_log import RefusalLog
from learner.network.weight_deltas import Offer, Publications
from protocol.errors import ProtocolError
from protocol.fault_injection import fault_point
from protocol.framing import Message, decode, encode
from protocol.search_messages import ErrorReply
from protocol.transport import Publisher as PubSocket
from protocol.transport import Router
from protocol.weight_messages import Announcement, Chunk, ChunkRequest, EngineReply, EngineReport, ManifestRequest

log = logging.getLogger(__name__)

# Requests of weight agents are short.
MAX_REQUEST_BYTES = 1 << 20


class Publisher:
    """Announces publications and answers the requests of weight agents. Runs in the network thread."""

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
        self._refusals = RefusalLog(log)

    @property
    def weights_address(self) -> str:
        """The address at which weight agents send requests."""
        return self._router.address

    @property
    def announce_address(self) -> str:
        """The address at which weight agents subscribe to announcements."""
        return self._announcements.address

    @property
    def num_dropped(self) -> int:
        """Number of messages that were dropped unread because their peer exceeded its rate limit."""
        return self._router.num_dropped

    async def announce(self, offer: Offer) -> None:
        """Makes `offer` the newest publication that can be fetched, then announces it."""
        self._publications.add(offer)
        fault_point("publication.offered")
        manifest = offer.manifest
        announcement = Announcement(run_id=manifest.run_id, publication=manifest.publication, version=manifest.version)
        self._announcements.send([encode(announcement)])
        fault_point("publication.announced")

    async def serve(self) -> None:
        """Answers requests until cancelled. A malformed message is logged, counted and dropped."""
        while True:
            peer, frames = await self._router.recv()
            try:
                message, _ = decode(frames)
                reply, payload = self._answer(message)
            except ProtocolError as error:
                self.num_malformed += 1
                self._router.penalize(peer)
                self._refusals.add(peer, error)
                continue
            self._router.send(peer, [encode(reply), *payload])

    def _answer(self, message: Message) -> tuple[Message, list[memoryview]]:
        match message:
            case EngineReport():
                if not self._engines.report(message, now_s=time.monotonic()):
                    error = "too many engines report (network.max_engines): this one is not used"
                    return ErrorReply(request_id=message.request_id, error=error), []
                self._on_engines_changed()
                newest, name = self._publications.newest, message.engine.name
                serving = self._engines.serving(now_s=time.monotonic())
                reply = EngineReply(
                    request_id=message.request_id,
                    run_id=self._run_id,
                    publication=newest.publication if newest else -1,
                    version=newest.version if newest else -1,
                    num_other_serving=sum(engine.name != name for engine in serving),
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
                raise ProtocolError(f"the publisher does not accept messages of kind {message.kind}")

    def _gone(self, request: ManifestRequest | ChunkRequest) -> ErrorReply:
        return ErrorReply(
            request_id=request.request_id,
            error=f"publication {request.publication} is not (or no longer) offered: ask for the newest",
        )
