"""The learner's side of weight publication in the test's process, on real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from learner.leases.engines import Engines
from learner.network.publisher import Publisher
from learner.network.weight_deltas import Offer, Series
from protocol.messages import EngineFields
from protocol.transport import Transport
from protocol.weight_messages import CanaryFields, Chunk, EngineReport, PartFields
from tests.weights.publisher_proxy import PublisherProxy

WAIT_S = 30.0
RUN = "run"
CHUNK_BYTES = 4_096


@dataclass
class LearnerSide:
    """A publisher, the engines that reported to it, and a proxy in front of it: agents use `address`.

    `num_reports`: reports of agents so far.
    """

    transport: Transport = field(default_factory=Transport)
    engines: Engines = field(default_factory=Engines)
    offers: dict[int, Offer] = field(default_factory=dict)
    num_reports: int = 0

    def __post_init__(self) -> None:
        self.router = self.transport.router("tcp://127.0.0.1:0")
        self.announcements = self.transport.publisher("tcp://127.0.0.1:0")
        self.publisher = Publisher(
            router=self.router,
            announcements=self.announcements,
            engines=self.engines,
            run_id=RUN,
            on_engines_changed=self._count_report,
        )
        self.proxy = PublisherProxy(self.transport, self.router.address)
        self.series = Series(RUN, chunk_bytes=CHUNK_BYTES)
        self._tasks = [asyncio.create_task(self.publisher.serve()), asyncio.create_task(self.proxy.run())]

    @property
    def address(self) -> str:
        return self.proxy.address

    def _count_report(self) -> None:
        self.num_reports += 1

    async def publish(self, data: bytes, *, publication: int, version: int, canary: CanaryFields | None = None) -> None:
        offer = self.series.make_offer(data, publication=publication, version=version, canary=canary)
        self.offers[publication] = offer
        await self.publisher.announce(offer)

    def part(self, *, base: int, publication: int) -> PartFields:
        """Returns the part from `base` (-1: a snapshot) to `publication`."""
        return next(part.fields for part in self.offers[publication].parts if part.fields.base == base)

    def damage(self, *, base: int, publication: int, position: int) -> Callable[[], None]:
        """Flips one bit at byte `position` of a part in all replies, until the returned function is called."""
        index, offset = divmod(position % self.part(base=base, publication=publication).num_bytes, CHUNK_BYTES)

        def flip_bit(chunk: Chunk, payload: bytes) -> bytes:
            if (chunk.base, chunk.publication, chunk.index) != (base, publication, index):
                return payload
            damaged = bytearray(payload)
            damaged[offset] ^= 1
            return bytes(damaged)

        def repair() -> None:
            self.proxy.edit_chunk = None

        self.proxy.edit_chunk = flip_bit
        return repair

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.transport.close()

    def serving(self) -> list[EngineFields]:
        """The engines that may serve leases, except the one of `keep_another_engine_serving`."""
        return [engine for engine in self.engines.serving(now_s=time.monotonic()) if engine.name != "other"]

    def keep_another_engine_serving(self) -> Callable[[], None]:
        """Reports another engine, which serves until the returned function is called."""

        def report(version: int) -> None:
            fields = EngineFields(name="other", url="http://127.0.0.1:1", version=version, publication=version)
            report = EngineReport(request_id=1, engine=fields, state="serving", counters={})
            self.engines.report(report, now_s=time.monotonic() + 3600)

        report(0)
        return lambda: report(-1)

    def state(self) -> str:
        """The reported state of the only engine; "" before its first report."""
        return next((report.state for report in self.engines.reports()), "")

    def error(self) -> str:
        """The reported error of the only engine."""
        return next((report.error for report in self.engines.reports()), "")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 (agents report on their own schedule)
                await asyncio.sleep(0.01)
