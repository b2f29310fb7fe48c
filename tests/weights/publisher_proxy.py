"""A proxy between weight agents and the publisher, which can delay manifests and lose or change chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from protocol.errors import ProtocolError
from protocol.framing import Buffer, Message, decode
from protocol.transport import Dealer, Router, Transport
from protocol.weight_messages import Chunk, ManifestRequest

EditChunk = Callable[[Chunk, bytes], bytes | None]


class PublisherProxy:
    """Forwards the messages of each peer over a separate DEALER. Runs until cancelled.

    `edit_chunk` returns the payload to forward instead of a chunk's, or None to lose the reply. `manifests_allowed`:
    while it is clear, manifest requests wait; `manifest_requested` is set when one arrives.
    """

    def __init__(self, transport: Transport, publisher_address: str) -> None:
        self._transport = transport
        self._publisher_address = publisher_address
        self._router: Router = transport.router("tcp://127.0.0.1:0")
        self._dealers: dict[bytes, Dealer] = {}
        self.edit_chunk: EditChunk | None = None
        self.manifests_allowed = asyncio.Event()
        self.manifests_allowed.set()
        self.manifest_requested = asyncio.Event()

    @property
    def address(self) -> str:
        return self._router.address

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                peer, frames = await self._router.recv()
                if peer not in self._dealers:
                    self._dealers[peer] = self._transport.dealer(self._publisher_address)
                    tasks.create_task(self._forward_replies(peer))
                tasks.create_task(self._forward_request(self._dealers[peer], [bytes(frame) for frame in frames]))

    async def _forward_request(self, dealer: Dealer, frames: Sequence[Buffer]) -> None:
        if isinstance(_decode(frames)[0], ManifestRequest):
            self.manifest_requested.set()
            await self.manifests_allowed.wait()
        await dealer.send(frames)

    async def _forward_replies(self, peer: bytes) -> None:
        while True:
            frames: list[Buffer] = [bytes(frame) for frame in await self._dealers[peer].recv()]
            message, payload = _decode(frames)
            if isinstance(message, Chunk) and self.edit_chunk is not None:
                edited = self.edit_chunk(message, bytes(payload[0]))
                if edited is None:
                    continue
                frames[-1] = edited
            self._router.send(peer, frames)


def _decode(frames: Sequence[Buffer]) -> tuple[Message | None, Sequence[Buffer]]:
    try:
        return decode(frames)
    except ProtocolError:
        return None, []
