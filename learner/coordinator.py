"""The coordinator: leases questions to actors against their credits, takes their groups, hands out batches.

    Heartbeat ──► renew, find lost leases ──► grant what the ledger allows ──► Lease
    SubmitGroup ─► decode ─► judge ─► store (durable) ─► ledger ─► SubmitReply ─► grant again
    ticker ──────► expire silent actors ─► grant again

It decides with `Ledger` and `judge`; here are only the sockets, the clock and the store. One task; runs in the plane's
thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from learner.admission import Rules, Verdict, judge
from learner.engines import Engines
from learner.ledger import LeaseRecord, Ledger, State
from learner.store import Store
from protocol.codec import decode_group
from protocol.errors import ProtocolError
from protocol.faults import fault_point
from protocol.messages import (
    Drain,
    Goodbye,
    Heartbeat,
    Lease,
    RunStatus,
    SubmitGroup,
    SubmitReply,
)
from protocol.transport import Router
from protocol.types import TrajectoryGroup
from protocol.wire import Buffer, Message, decode, encode

log = logging.getLogger(__name__)

Outcome = Literal["accepted", "duplicate", "refused"]

# A question whose groups failed or were refused so often (expired leases do not count) is skipped.
MAX_FAILURES = 4
_TICK_S = 0.25
# A lease that the actor's heartbeats do not name after so long was lost on the way.
_LOST_AFTER_S = 5.0


@dataclass(slots=True)
class _Actor:
    peer: bytes
    incarnation: str
    capacity: int
    seen_s: float
    counters: dict[str, float] = field(default_factory=dict)


class Coordinator:
    """Owns the ledger. `next_batch` and `finish_batch` are what the learner's loop asks of it."""

    def __init__(
        self,
        *,
        router: Router,
        store: Store,
        ledger: Ledger,
        engines: Engines,
        rules: Rules,
        lease_timeout_s: float,
    ) -> None:
        self._router = router
        self._store = store
        self._ledger = ledger
        self._engines = engines
        self._rules = rules
        self._lease_timeout_s = lease_timeout_s
        self._actors: dict[str, _Actor] = {}
        self._groups: dict[int, TrajectoryGroup] = {}
        self._batch_ready = asyncio.Event()
        self._superseded: dict[str, str] = {}
        self._failures: Counter[int] = Counter()
        self._started_s = time.time()
        self._draining = ""
        self._publications = store.publications()
        self.num_malformed = 0
        self.num_refused = 0

    # --- what the loop asks ---

    async def next_batch(self) -> list[TrajectoryGroup]:
        """The current step's groups in slot order, as soon as the last of them is durable."""
        while (cursors := self._ledger.ready_batch()) is None:
            self._batch_ready.clear()
            await self._batch_ready.wait()
        return [self._groups.pop(cursor, None) or self._store.group(cursor) for cursor in cursors]

    async def recorded_batch(self, step: int) -> list[TrajectoryGroup]:
        """The groups that step `step` was trained on, from the log."""
        return [self._store.group(cursor) for cursor in self._store.batch(step)]

    async def finish_batch(self, cursors: Sequence[int]) -> None:
        """Step done: logged in the store before any later version can be seen."""
        self._store.record_batch(step=self._ledger.step, cursors=cursors)
        self._ledger.finish(cursors)

    async def new_publication(self, version: int) -> int:
        publication = self._store.new_publication(version)
        self._publications[publication] = version
        return publication

    async def drain(self, reason: str) -> None:
        """Tells every actor, now and at each heartbeat, that there is nothing more to do."""
        self._draining = reason
        for actor in self._actors.values():
            await self._send(actor.peer, Drain(reason=reason))

    async def gauges(self) -> dict[str, float]:
        """Queue lengths and the peers' own counters, for metrics and the live view."""
        now = time.monotonic()
        counts = self._ledger.counts()
        gauges = {f"queue/{state.value}": float(counts[state]) for state in State}
        capacity = sum(actor.capacity for actor in self._actors.values())
        gauges["queue/credits_free"] = float(capacity - len(self._ledger.leases))
        gauges["queue/actors"] = float(len(self._actors))
        gauges["queue/engines"] = float(len(self._engines.serving(now_s=now)))
        gauges["queue/expired"] = float(self._ledger.num_expired)
        gauges["queue/refused"] = float(self.num_refused)
        gauges["queue/malformed"] = float(self.num_malformed)
        for name, value in self._engines.counters(now_s=now).items():
            gauges[f"engine/{name}"] = value
        for actor in self._actors.values():
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
                    message, payload = decode(frames)
                    await self._on(peer, message, payload, frames)
                except ProtocolError as error:
                    self.num_malformed += 1
                    log.warning("refused a message: %s", error)

    async def engines_changed(self) -> None:
        await self._grant()

    async def _on(self, peer: bytes, message: Message, payload: Sequence[Buffer], frames: Sequence[Buffer]) -> None:
        match message:
            case Heartbeat():
                await self._on_heartbeat(peer, message)
            case SubmitGroup():
                await self._on_group(peer, message, payload, frames)
            case Goodbye():
                known = self._actors.get(message.actor)
                if known is None or known.incarnation == message.incarnation:
                    self._forget(message.actor)
            case _:
                raise ProtocolError(f"{message.kind} has no business at the coordinator")
        await self._grant()

    async def _on_heartbeat(self, peer: bytes, message: Heartbeat) -> None:
        now = time.monotonic()
        if self._superseded.get(message.actor) == message.incarnation:
            await self._send(peer, Drain(reason=f"another actor has joined under the name {message.actor}"))
            return
        known = self._actors.get(message.actor)
        if known is not None and known.incarnation != message.incarnation:
            log.warning("actor %s was started again: its old leases are issued again", message.actor)
            self._superseded[message.actor] = known.incarnation
            self._forget(message.actor)
        self._actors[message.actor] = _Actor(peer, message.incarnation, message.capacity, now, dict(message.counters))
        held = set(message.held)
        for lease in self._ledger.outstanding(message.actor):
            if lease.lease_id not in held and time.time() - lease.granted_s > _LOST_AFTER_S:
                self._expire(lease, "lost")
        if self._draining:
            await self._send(peer, Drain(reason=self._draining))
            return
        status = RunStatus(
            run_id=self._rules.run_id,
            step=self._ledger.step,
            num_steps=self._ledger.num_steps,
            engines=self._engines.serving(now_s=now),
        )
        await self._send(peer, status)

    async def _on_group(
        self, peer: bytes, message: SubmitGroup, payload: Sequence[Buffer], frames: Sequence[Buffer]
    ) -> None:
        entry = self._ledger.entries.get(message.cursor)
        outcome: Outcome
        if entry is None or message.run_id != self._rules.run_id:
            outcome, reason = "refused", f"question {message.cursor} of run {message.run_id} was never leased here"
        elif not self._was_leased(message):
            outcome, reason = "refused", f"lease {message.lease_id} was never given for question {message.cursor}"
        elif entry.state not in (State.RUNNING, State.WAITING):
            outcome, reason = "duplicate", ""
            if self._ledger.leases.pop(message.lease_id, None) is not None:
                self._store.record_end(entry=None, lease_id=message.lease_id, outcome="duplicate")
        else:
            outcome, reason = self._decide(message, payload, frames)
        if outcome == "refused":
            self.num_refused += 1
            log.warning("refused group %d: %s", message.cursor, reason)
        await self._send(peer, SubmitReply(lease_id=message.lease_id, outcome=outcome, reason=reason))
        fault_point("acknowledgement.sent")

    def _was_leased(self, message: SubmitGroup) -> bool:
        """False where the lease is another question's, or nobody's yet. One that has expired counts as leased."""
        lease = self._ledger.leases.get(message.lease_id)
        if lease is None:
            return message.lease_id < self._ledger.next_lease_id
        return lease.cursor == message.cursor

    def _decide(self, message: SubmitGroup, payload: Sequence[Buffer], frames: Sequence[Buffer]) -> tuple[Outcome, str]:
        """(outcome, reason) for the group of an open question; durable when it returns."""
        lease_id, cursor = message.lease_id, message.cursor
        entry = self._ledger.entries[cursor]
        try:
            group = decode_group(message, payload)
            verdict = judge(
                group,
                rules=self._rules,
                publications=self._publications,
                step=self._ledger.step,
                min_version=self._ledger.min_version(entry.slot),
            )
        except ProtocolError as error:
            self.num_malformed += 1
            group, verdict = None, Verdict("refuse", str(error))
        if group is not None and verdict.kind == "accept" and self._ledger.accept(lease_id=lease_id, cursor=cursor):
            self._store.record_group(entry=entry, lease_id=lease_id, group=group, frames=frames, outcome="accepted")
            self._groups[cursor] = group
            self._batch_ready.set()
            return "accepted", ""
        if group is not None and verdict.kind == "skip" and self._ledger.skip(lease_id=lease_id, cursor=cursor):
            self._store.record_group(entry=entry, lease_id=lease_id, group=group, frames=frames, outcome="skipped")
            return "accepted", verdict.reason
        self._failures[cursor] += 1
        is_current = message.attempt == entry.attempt
        if (
            is_current
            and self._failures[cursor] >= MAX_FAILURES
            and self._ledger.skip(lease_id=lease_id, cursor=cursor)
        ):
            log.warning("question %d gave no trainable group %d times: skipped", cursor, MAX_FAILURES)
        else:
            self._ledger.reissue(lease_id=lease_id, cursor=cursor)
        ended = "failed" if verdict.kind == "retry" else "refused"
        self._store.record_end(entry=entry, lease_id=lease_id, outcome=ended, reason=verdict.reason)
        return "refused", verdict.reason

    async def _grant(self) -> None:
        """Leases to whoever has most credits left, until the rule or the credits say stop."""
        if self._draining:
            return
        version = self._engines.lowest_version(now_s=time.monotonic())
        if version is None:
            return
        while (actor := self._most_credits()) is not None:
            lease = self._ledger.grant(actor=actor, now_s=time.time(), engine_version=version)
            if lease is None:
                return
            self._store.record_lease(lease, engine_version=version)
            message = Lease(
                lease_id=lease.lease_id,
                run_id=self._rules.run_id,
                cursor=lease.cursor,
                attempt=lease.attempt,
                group_size=self._rules.group_size,
                min_version=self._ledger.min_version(lease.slot),
            )
            if not await self._send(self._actors[actor].peer, message):
                self._forget(actor)

    def _most_credits(self) -> str | None:
        outstanding = Counter(lease.actor for lease in self._ledger.leases.values())
        free = {name: actor.capacity - outstanding[name] for name, actor in self._actors.items()}
        best = max(free, key=lambda name: free[name], default=None)
        return best if best is not None and free[best] > 0 else None

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for name, actor in list(self._actors.items()):
                if now - actor.seen_s > self._lease_timeout_s:
                    log.warning("actor %s is silent for %.0f s: its leases are issued again", name, now - actor.seen_s)
                    self._forget(name)
            for lease in list(self._ledger.leases.values()):
                # After a restart of ours, actors get as long as ever to be heard of again.
                silent_s = time.time() - max(lease.granted_s, self._started_s)
                if lease.actor not in self._actors and silent_s > self._lease_timeout_s:
                    self._expire(lease, "expired")
            await self._grant()

    def _forget(self, actor: str) -> None:
        self._actors.pop(actor, None)
        for lease in self._ledger.outstanding(actor):
            self._expire(lease, "expired")

    def _expire(self, lease: LeaseRecord, outcome: str) -> None:
        if self._ledger.expire(lease.lease_id) is not None:
            entry = self._ledger.entries[lease.cursor]
            self._store.record_end(entry=entry, lease_id=lease.lease_id, outcome=outcome)

    async def _send(self, peer: bytes, message: Message) -> bool:
        return await self._router.send(peer, [encode(message)])
