"""The coordinator's shell: messages and time in, the scheduler's decisions out to the store and the sockets.

    receive ─► decode ─► Scheduler (decides) ─► Store (durable) ─► send
    a tick every quarter second; the loop's questions; engines that change

One task; runs in the plane's thread. What a decision says is committed in one transaction before anybody hears of it.
While the disk is full nothing is decided: heartbeats are answered, actors hold their groups, and what was acknowledged
is in the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from learner.leases.admission import Limits, Rules
from learner.leases.decisions import Arrived, Decision, Moved
from learner.leases.engines import Engines
from learner.leases.lease_table import LeaseTable
from learner.leases.scheduler import Scheduler
from learner.store.retention import drop_tokens, expired_steps
from learner.store.store import Store
from protocol.errors import ProtocolError, StoreFullError
from protocol.fault_injection import fault_point
from protocol.framing import Buffer, Message, decode, encode
from protocol.messages import EngineFields, Goodbye, Heartbeat, Lease, SubmitGroup, SubmitReply
from protocol.transport import Router
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)

T = TypeVar("T")

_TICK_S = 0.25
# So long after the disk was found full, writing is tried again.
_FULL_RETRY_S = 2.0


class Coordinator:
    """Owns the scheduler. `next_batch` and `finish_batch` are what the learner's loop asks of it."""

    def __init__(
        self, *, router: Router, store: Store, lease_table: LeaseTable, engines: Engines, rules: Rules, limits: Limits
    ) -> None:
        self._router = router
        self._store = store
        self._engines = engines
        # Leases name the time at which they were granted across restarts, so seconds count from the epoch; but a clock
        # that is set must not expire them all.
        self._epoch_s = time.time() - time.monotonic()
        self._scheduler = Scheduler(
            lease_table,
            rules=rules,
            limits=limits,
            publications=store.publications(),
            num_failures=store.num_failures(),
            started_s=self._now_s(),
        )
        self._groups: dict[int, TrajectoryGroup] = {}
        self._batch_ready = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._retry_s = 0.0
        self._num_full = 0
        self._encoded: tuple[Message, bytes] | None = None

    # --- what the loop asks ---

    async def next_batch(self) -> list[TrajectoryGroup]:
        """The current step's groups in slot order, as soon as the last of them is durable."""
        while (cursors := self._scheduler.lease_table.ready_batch()) is None:
            self._batch_ready.clear()
            await self._batch_ready.wait()
        return [self._groups.pop(cursor, None) or self._store.group(cursor) for cursor in cursors]

    async def recorded_batch(self, step: int) -> list[TrajectoryGroup]:
        """The groups that step `step` was trained on, from the log."""
        return [self._store.group(cursor) for cursor in self._store.batch(step)]

    async def finish_batch(self, cursors: Sequence[int]) -> None:
        """Step done: logged in the store before any later version can be seen. Waits while the disk is full."""
        while not self._carry_out(self._scheduler.trained(cursors)):
            await self._room.wait()

    async def new_publication(self, version: int) -> int:
        """A publication id that was never used before. Waits while the disk is full."""
        while (publication := self._durably(lambda: self._store.new_publication(version))) is None:
            await self._room.wait()
        self._scheduler.published(publication, version=version)
        return publication

    async def retain(self, *, checkpoint_step: int, keep_steps: int | None, keep_bytes: int | None) -> None:
        """Drops the tokens of old batches, but none that a resume from the checkpoint of that step would train."""
        steps = expired_steps(
            self._store, checkpoint_step=checkpoint_step, keep_steps=keep_steps, keep_bytes=keep_bytes
        )
        for step in steps:
            self._durably(lambda step=step: drop_tokens(self._store, step))
            await asyncio.sleep(0)  # actors are heard in between

    async def drain(self, reason: str) -> None:
        """Tells every actor, now and at each heartbeat, that there is nothing more to do."""
        self._carry_out(self._scheduler.drain(reason))

    async def gauges(self) -> dict[str, float]:
        """Queue lengths and the peers' own counters, for metrics and the live view."""
        now_s, scheduler, lease_table = time.monotonic(), self._scheduler, self._scheduler.lease_table
        gauges = {f"queue/{state.value}": float(count) for state, count in lease_table.counts().items()}
        capacity = sum(actor.capacity for actor in scheduler.actors.values())
        gauges["queue/credits_free"] = float(capacity - len(lease_table.leases))
        gauges["queue/actors"] = float(len(scheduler.actors))
        gauges["queue/engines"] = float(len(self._engines.serving(now_s=now_s)))
        gauges["queue/expired"] = float(lease_table.num_expired)
        gauges["queue/overtaken"] = float(lease_table.num_overtaken)
        gauges["queue/refused"] = float(scheduler.num_refused)
        gauges["queue/malformed"] = float(scheduler.num_malformed)
        gauges["queue/store_full"] = float(self._num_full)
        for name, value in self._engines.counters(now_s=now_s).items():
            gauges[f"engine/{name}"] = value
        for actor in scheduler.actors.values():
            for name, value in actor.counters.items():
                gauges[f"actor/{name}"] = gauges.get(f"actor/{name}", 0.0) + value
        return gauges

    # --- the shell ---

    async def serve(self) -> None:
        """Until cancelled. A malformed message costs its sender that message only."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            while True:
                peer, frames = await self._router.recv()
                try:
                    message, _ = decode(frames)
                    self._on(peer, message, frames)
                except ProtocolError as error:
                    self._scheduler.num_malformed += 1
                    self._router.refused(peer)
                    log.warning("refused a message: %s", error)

    def engines_changed(self) -> None:
        """An engine has joined, left or committed a version."""
        self._carry_out(self._scheduler.engines(self._serving(), now_s=self._now_s()))

    def _on(self, peer: bytes, message: Message, frames: Sequence[Buffer]) -> None:
        scheduler, now_s = self._scheduler, self._now_s()
        match message:
            case Heartbeat():
                decision = scheduler.heartbeat(peer, message, now_s=now_s)
            case SubmitGroup():
                decision = scheduler.group(peer, message, frames, now_s=now_s)
            case Goodbye():
                decision = scheduler.goodbye(message, now_s=now_s)
            case _:
                raise ProtocolError(f"{message.kind} has no business at the coordinator")
        self._carry_out(decision)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if not self._room.is_set() and self._now_s() > self._retry_s:
                self._scheduler.resume()
                self._room.set()
            self._carry_out(self._scheduler.tick(self._serving(), now_s=self._now_s()))

    def _carry_out(self, decision: Decision) -> bool:
        """Makes it durable, then known. False where the disk is full: then it has not happened."""
        if self._durably(lambda: self._commit(decision)) is None:
            return False
        undelivered = []
        for send in decision.sends:
            sent = self._router.send(send.peer, [self._encode(send.message)])
            if isinstance(send.message, SubmitReply):
                fault_point("acknowledgement.sent")
            elif isinstance(send.message, Lease) and not sent:
                undelivered.append(send.message.lease_id)
        if undelivered:
            self._carry_out(self._scheduler.undelivered(undelivered, now_s=self._now_s()))
        return True

    def _commit(self, decision: Decision) -> bool:
        self._store.commit(decision.records)
        for record in decision.records:
            if isinstance(record, Arrived) and record.group.cursor in self._scheduler.lease_table.entries:
                self._groups[record.group.cursor] = record.group.unpack()
            if isinstance(record, Arrived | Moved):
                self._batch_ready.set()
        return True

    def _durably(self, write: Callable[[], T]) -> T | None:
        """What `write` returns; None where the disk is full, and then nothing is decided for a while."""
        try:
            return write()
        except StoreFullError as error:
            log.error("%s: no group is admitted until there is room (see learner.retention)", error)
            self._num_full += 1
            self._room.clear()
            self._retry_s = self._now_s() + _FULL_RETRY_S
            lease_table = self._scheduler.lease_table
            self._scheduler.pause(
                self._store.restore_lease_table(
                    groups_per_batch=lease_table.groups_per_batch,
                    staleness_bound=lease_table.staleness_bound,
                    num_steps=lease_table.num_steps,
                ),
                num_failures=self._store.num_failures(),
            )
            return None

    def _encode(self, message: Message) -> bytes:
        """A status goes out to every actor as the same object."""
        if self._encoded is None or self._encoded[0] is not message:
            self._encoded = message, encode(message)
        return self._encoded[1]

    def _serving(self) -> list[EngineFields]:
        return self._engines.serving(now_s=time.monotonic())

    def _now_s(self) -> float:
        return self._epoch_s + time.monotonic()
