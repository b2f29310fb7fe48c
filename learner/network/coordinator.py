"""The coordinator: passes messages and ticks to the scheduler, stores its decisions, then sends its messages.

    actors ─► ROUTER ─► serve ────┐
              every 0.25 s: tick ─┼─► Scheduler ─► Decision ─► Store: one transaction ─► ROUTER ─► actors
    publisher: engines_changed ───┤
    training loop: commit_batch ──┘   training loop: next_batch ◄── groups of the store

              consumes                       produces                      waits for             unblocked by
    serve     messages of actors             decisions                     a message             ROUTER
    tick      the clock, serving engines     decisions                     TICK_S                the clock
    next_batch, commit_batch, new_publication (coroutines that the training loop runs in this thread)
              stored groups                  a batch, a log entry, an id   all groups of the     a group that arrives;
                                                                           batch; room on disk   a tick that retries

Everything runs in the event loop of the network thread. A decision is committed in one transaction before any of its
messages is sent, so every acknowledged group is in the store. While the disk is full, no group is accepted and no lease
granted; heartbeats are answered, and actors keep their groups.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from learner.leases.admission import Rules
from learner.leases.decisions import Decision, GroupReceived, SlotChanged
from learner.leases.engines import Engines
from learner.leases.group_outcomes import GroupOutcomes
from learner.leases.identity_check import IdentityCheck
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.run_state import run_state
from learner.leases.scheduler import Scheduler
from learner.leases.wait_cause import RunState
from learner.network.refusal_log import RefusalLog
from learner.store.retention import drop_tokens, expired_steps
from learner.store.store import Store
from protocol.errors import NoProgressError, ProtocolError, StoreFullError
from protocol.fault_injection import fault_point, wall_clock_s
from protocol.framing import Buffer, Message, decode, encode
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, Lease, SubmitGroup, SubmitReply
from protocol.transport import Router
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)

T = TypeVar("T")

_TICK_S = 0.25


class Coordinator:
    """Runs the scheduler on real sockets and the store.

    full_retry_s  pause before a failed write is retried
    outcomes      counts failed and skipped groups; its limits end the run
    identity      the run's, which actors must agree with; empty: every actor is accepted
    """

    def __init__(
        self,
        *,
        router: Router,
        store: Store,
        lease_table: LeaseTable,
        engines: Engines,
        rules: Rules,
        timeouts: LeaseTimeouts,
        full_retry_s: float,
        identity: Mapping[str, str],
        outcomes: GroupOutcomes | None = None,
        max_actors: int = 2_048,
    ) -> None:
        self._router = router
        self._store = store
        self._engines = engines
        self._identity_check = IdentityCheck(identity)
        # Times are seconds since the epoch, because grant times of leases are stored and must be valid after a restart.
        # They advance with the monotonic clock, so that a change of the system clock does not expire all leases.
        self._epoch_s = wall_clock_s() - time.monotonic()
        self._scheduler = Scheduler(
            lease_table,
            rules=rules,
            timeouts=timeouts,
            publications=store.publications(),
            num_failures=store.num_failures(),
            started_s=self._now_s(),
            outcomes=outcomes,
            max_actors=max_actors,
        )
        self._groups: dict[int, TrajectoryGroup] = {}
        self._batch_ready = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._full_retry_s = full_retry_s
        self._retry_at_s = 0.0
        self._num_full = 0
        self._encoded: tuple[Message, bytes] | None = None
        self._refusals = RefusalLog(log)

    @property
    def address(self) -> str:
        """The address at which actors connect."""
        return self._router.address

    @property
    def num_dropped(self) -> int:
        """Number of messages that were dropped unread because their peer exceeded its rate limit."""
        return self._router.num_dropped

    # --- called by the training loop, run in the network thread ---

    async def next_batch(self) -> list[TrajectoryGroup]:
        """Waits until all groups of the current step are durable. Returns them in slot order.

        Raises: NoProgressError if the last groups failed or had no signal, up to the limit of `outcomes`.
        """
        while (cursors := self._scheduler.lease_table.ready_batch()) is None:
            if reason := self._why_over():
                raise NoProgressError(reason)
            self._batch_ready.clear()
            await self._batch_ready.wait()
        return [self._groups.pop(cursor, None) or self._store.group(cursor) for cursor in cursors]

    async def recorded_batch(self, step: int) -> list[TrajectoryGroup]:
        """The groups that step `step` was trained on, from the log of batches."""
        return [self._store.group(cursor) for cursor in self._store.batch(step)]

    async def commit_batch(self, cursors: Sequence[int]) -> None:
        """Writes the current step's batch to the log, durably. Waits while the disk is full.

        Call it before the version that the step made is published.
        """
        while not self._commit_and_send(self._scheduler.on_batch_trained(cursors)):
            await self._has_room.wait()

    async def new_publication(self, version: int) -> int:
        """Returns a publication id that this run has not used before. Waits while the disk is full."""
        while (publication := self._write_or_pause(lambda: self._store.new_publication(version))) is None:
            await self._has_room.wait()
        self._scheduler.on_publication(publication, version=version)
        return publication

    async def drop_old_tokens(self, *, checkpoint_step: int, keep_steps: int | None, keep_bytes: int | None) -> None:
        """Drops the tokens of old batches. The arguments are those of `expired_steps`."""
        steps = expired_steps(
            self._store, checkpoint_step=checkpoint_step, keep_steps=keep_steps, keep_bytes=keep_bytes
        )
        for step in steps:
            self._write_or_pause(lambda step=step: drop_tokens(self._store, step))
            await asyncio.sleep(0)  # lets the other tasks handle messages between two steps

    async def drain(self, reason: str) -> None:
        """Ends the run: sends `Drain` to every actor now, and as the reply to each later heartbeat."""
        self._commit_and_send(self._scheduler.drain(reason))

    async def gauges(self) -> dict[str, float]:
        """Metric tag → value: queue lengths, and the sums of the counters that actors and engines report."""
        now_s, scheduler, lease_table = time.monotonic(), self._scheduler, self._scheduler.lease_table
        gauges = {f"queue/{state.value}": float(count) for state, count in lease_table.counts().items()}
        gauges["queue/slots"] = float(sum(actor.capacity for actor in scheduler.actors.values()))
        gauges["queue/slots_free"] = float(scheduler.num_free_slots())
        gauges["queue/actors_refused"] = float(self._identity_check.num_refused)
        gauges["queue/actors"] = float(len(scheduler.actors))
        gauges["queue/engines"] = float(len(self._engines.serving(now_s=now_s)))
        gauges["queue/expired"] = float(lease_table.num_expired)
        gauges["queue/overtaken"] = float(lease_table.num_overtaken)
        gauges["queue/refused"] = float(scheduler.groups.num_refused)
        gauges["queue/malformed"] = float(scheduler.groups.num_malformed)
        gauges["queue/store_full"] = float(self._num_full)
        gauges["queue/failed_trajectories"] = float(scheduler.outcomes.total.total)
        gauges["queue/failed_in_a_row"] = float(scheduler.outcomes.num_failed_in_a_row)
        gauges["queue/skipped_in_a_row"] = float(scheduler.outcomes.num_skipped_in_a_row)
        for name, value in self._engines.counters(now_s=now_s).items():
            gauges[f"engine/{name}"] = value
        for actor in scheduler.actors.values():
            for name, value in actor.counters.items():
                gauges[f"actor/{name}"] = gauges.get(f"actor/{name}", 0.0) + value
        return gauges

    async def run_state(self) -> RunState:
        """The state of the run, from which `wait_cause` and `progress.json` are made."""
        return run_state(
            self._scheduler,
            engines=self._engines.reports(),
            num_refused_actors=self._identity_check.num_refused,
            is_disk_full=not self._has_room.is_set(),
            now_s=self._now_s(),
        )

    # --- tasks of the network thread ---

    async def serve(self) -> None:
        """Handles messages and ticks until cancelled. A malformed message is logged, counted and dropped."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            while True:
                peer, frames = await self._router.recv()
                try:
                    message, _ = decode(frames)
                    self._on(peer, message, frames)
                except ProtocolError as error:
                    self._scheduler.groups.num_malformed += 1
                    self._router.penalize(peer)
                    self._refusals.add(peer, error)

    def engines_changed(self) -> None:
        """Call it if an engine has connected or committed a version."""
        self._commit_and_send(self._scheduler.on_engines(self._serving(), now_s=self._now_s()))

    def _on(self, peer: bytes, message: Message, frames: Sequence[Buffer]) -> None:
        scheduler, now_s = self._scheduler, self._now_s()
        match message:
            case Heartbeat() if reason := self._identity_check.refusal(message):
                self._router.send(peer, [encode(Drain(reason=reason, refused=True))])
                return
            case Heartbeat():
                decision = scheduler.on_heartbeat(peer, message, now_s=now_s)
                if self._why_over():
                    self._batch_ready.set()
            case SubmitGroup():
                decision = scheduler.on_group(peer, message, frames, now_s=now_s)
            case Goodbye():
                decision = scheduler.on_goodbye(message, now_s=now_s)
            case _:
                raise ProtocolError(f"the coordinator does not accept messages of kind {message.kind}")
        self._commit_and_send(decision)

    def _why_over(self) -> str:
        return self._scheduler.outcomes.why_over(step=self._scheduler.lease_table.step)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if not self._has_room.is_set() and self._now_s() > self._retry_at_s:
                self._scheduler.resume()
                self._has_room.set()
            self._commit_and_send(self._scheduler.on_tick(self._serving(), now_s=self._now_s()))

    def _commit_and_send(self, decision: Decision) -> bool:
        """Commits the records, then sends the messages. False if the disk is full: nothing was stored or sent."""
        if self._write_or_pause(lambda: self._commit(decision)) is None:
            return False
        undelivered = []
        for send in decision.sends:
            sent = self._router.send(send.peer, [self._encode(send.message)])
            if isinstance(send.message, SubmitReply):
                fault_point("acknowledgement.sent")
            elif isinstance(send.message, Lease) and not sent:
                undelivered.append(send.message.lease_id)
        if undelivered:
            self._commit_and_send(self._scheduler.on_undelivered(undelivered, now_s=self._now_s()))
        return True

    def _commit(self, decision: Decision) -> bool:
        self._store.commit(decision.records)
        for record in decision.records:
            if isinstance(record, GroupReceived) and record.group.cursor in self._scheduler.lease_table.entries:
                self._groups[record.group.cursor] = record.group.unpack()
            if isinstance(record, GroupReceived | SlotChanged):
                self._batch_ready.set()
        return True

    def _write_or_pause(self, write: Callable[[], T]) -> T | None:
        """Returns the result of `write`; if the disk is full, pauses the scheduler and returns None."""
        try:
            return write()
        except StoreFullError as error:
            log.error("%s: no group is admitted until there is room (see learner.retention)", error)
            self._num_full += 1
            self._has_room.clear()
            self._retry_at_s = self._now_s() + self._full_retry_s
            lease_table = self._scheduler.lease_table
            self._scheduler.pause(
                self._store.restore_lease_table(
                    groups_per_batch=lease_table.groups_per_batch,
                    staleness_bound=lease_table.staleness_bound,
                    num_steps=lease_table.num_steps,
                    now_s=self._now_s(),
                ),
                num_failures=self._store.num_failures(),
            )
            return None

    def _encode(self, message: Message) -> bytes:
        """Encodes a message; caches the last one, because all actors get the same `RunStatus` object."""
        if self._encoded is None or self._encoded[0] is not message:
            self._encoded = message, encode(message)
        return self._encoded[1]

    def _serving(self) -> list[EngineFields]:
        return self._engines.serving(now_s=time.monotonic())

    def _now_s(self) -> float:
        return self._epoch_s + time.monotonic()
