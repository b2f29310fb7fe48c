"""The learner's half of the weight plane in a test's own process, on real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from learner.leases.engines import Engines
from learner.network.publisher import Publisher
from learner.network.weight_deltas import Series
from protocol.messages import CanaryFields, EngineFields
from protocol.transport import Transport

WAIT_S = 30.0
RUN = "run"
CHUNK_BYTES = 4_096


@dataclass
class WeightPlane:
    """A publisher, and what it knows of engines."""

    transport: Transport = field(default_factory=Transport)
    engines: Engines = field(default_factory=Engines)
    num_changes: int = 0

    def __post_init__(self) -> None:
        self.router = self.transport.router("tcp://127.0.0.1:0")
        self.announcements = self.transport.publisher("tcp://127.0.0.1:0")
        self.publisher = Publisher(
            router=self.router,
            announcements=self.announcements,
            engines=self.engines,
            run_id=RUN,
            on_engines_changed=self._changed,
        )
        self.series = Series(RUN, chunk_bytes=CHUNK_BYTES)
        self.serving = asyncio.create_task(self.publisher.serve())

    def _changed(self) -> None:
        self.num_changes += 1

    async def publish(self, data: bytes, *, publication: int, version: int, canary: CanaryFields | None = None) -> None:
        await self.publisher.announce(
            self.series.make_offer(data, publication=publication, version=version, canary=canary)
        )

    def damage(self, *, base: int, publication: int, position: int) -> Callable[[], None]:
        """Flips a bit of what is offered; the answer repairs it."""
        parts = self.publisher._publications._parts
        good = parts[base, publication]
        payload = bytearray(good.payload)
        payload[position] ^= 1
        parts[base, publication] = dataclasses.replace(good, payload=bytes(payload))
        return lambda: parts.update({(base, publication): good})

    async def close(self) -> None:
        self.serving.cancel()
        await asyncio.wait([self.serving])
        self.transport.close()

    def known(self) -> list[EngineFields]:
        return self.engines.serving(now_s=time.monotonic())

    def state(self) -> str:
        return next((known.report.state for known in self.engines._known.values()), "")

    def error(self) -> str:
        return next((known.report.error for known in self.engines._known.values()), "")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 (the agent reports when it likes)
                await asyncio.sleep(0.01)
