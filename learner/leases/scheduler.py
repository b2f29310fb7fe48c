"""What the coordinator decides: a state and an event in, what to make durable and whom to tell out. No socket, no file.

    heartbeat, goodbye, undelivered ─┐                         ┌─► records: one transaction, first
    group ───────────────────────────┼─► Scheduler ─► Decision ┤
    tick, engines, trained, drain ───┘   (LeaseTable, actors)      └─► sends: once the records are durable

Every event ends by granting leases to the actors with the most free credits, as far as the lease table's bound allows.
The state can be thrown away at any moment: the durable part of it is in the store, and peers repeat the rest with every
heartbeat.
`learner/network/coordinator.py` drives it from sockets, tests/learner_plane/simulation.py from a seed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from learner.leases.actors import Actor, Actors
from learner.leases.admission import Limits, Rules, Verdict, judge
from learner.leases.decisions import Arrived, Decision, Ended, Granted, LeaseOutcome, Moved, Placed, Send, Trained
from learner.leases.engines import version_to_lease_by
from learner.leases.lease_table import Entry, LeaseRecord, LeaseTable
from protocol.codec import decode_group
from protocol.errors import ProtocolError
from protocol.framing import Buffer
from protocol.group_view import GroupView
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, Lease, RunStatus, SubmitGroup, SubmitReply

log = logging.getLogger(__name__)

# A question whose groups failed or were refused so often (expired leases do not count) is skipped.
MAX_FAILURES = 4
# A lease that the actor's heartbeats do not name after so long was lost on the way.
LOST_AFTER_S = 5.0
# What passes between two ticks beyond this, the learner stood still: nobody was silent in it.
MAX_TICK_S = 1.0


class Scheduler:
    """Every method but the properties is one event, at `now_s` on a clock that never goes back.

    publications  publication → version, as the store has them
    num_failures  question → its groups that failed or were refused
    started_s     when this learner started: actors get as long as ever to be heard of again
    """

    def __init__(
        self,
        lease_table: LeaseTable,
        *,
        rules: Rules,
        limits: Limits,
        publications: Mapping[int, int],
        num_failures: Mapping[int, int],
        started_s: float,
    ) -> None:
        self.lease_table = lease_table
        self.actors = Actors()
        self.serving: list[EngineFields] = []
        self.num_malformed = 0
        self.num_refused = 0
        self._rules = rules
        self._limits = limits
        self._publications = dict(publications)
        self._failures = Counter(num_failures)
        self._listening_s = self._ticked_s = started_s
        self._superseded: dict[str, str] = {}
        self._draining = ""
        self._paused = False
        self._known_status: RunStatus | None = None

    def pause(self, lease_table: LeaseTable, *, num_failures: Mapping[int, int]) -> None:
        """A decision could not be made durable: the store's state replaces it. Nothing is decided until `resume`."""
        lease_table.num_expired, lease_table.num_overtaken = (
            self.lease_table.num_expired,
            self.lease_table.num_overtaken,
        )
        self.lease_table = lease_table
        self._failures = Counter(num_failures)
        self._paused = True

    def resume(self) -> None:
        """There may be room again."""
        self._paused = False
        for name in self.actors:
            self._offer(name)

    # --- events ---

    def heartbeat(self, peer: bytes, message: Heartbeat, *, now_s: float) -> Decision:
        decision, name = Decision(), message.actor
        if self._superseded.get(name) == message.incarnation:
            decision.sends.append(Send(peer, Drain(reason=f"another actor has joined under the name {name}")))
            return decision
        known = self.actors.get(name)
        if known is not None and known.incarnation != message.incarnation:
            if self._paused:
                return decision
            log.warning("actor %s was started again: its old leases are issued again", name)
            self._superseded[name] = known.incarnation
            self._forget(decision, name)
            known = None
        if known is None:
            known = self.actors[name] = Actor(peer, message.incarnation)
        known.peer, known.capacity, known.seen_s = peer, message.capacity, now_s
        known.counters = dict(message.counters)
        self._offer(name)
        held = set(message.held)
        for lease in self.lease_table.outstanding(name) if not self._paused else ():
            if lease.lease_id not in held and now_s - lease.granted_s > LOST_AFTER_S:
                self._expire(decision, lease, "lost")
        answer = Drain(reason=self._draining) if self._draining else self._status()
        decision.sends.append(Send(peer, answer))
        return self._grant(decision, now_s)

    def goodbye(self, message: Goodbye, *, now_s: float) -> Decision:
        decision, known = Decision(), self.actors.get(message.actor)
        if not self._paused and (known is None or known.incarnation == message.incarnation):
            self._forget(decision, message.actor)
        return self._grant(decision, now_s)

    def undelivered(self, lease_ids: Sequence[int], *, now_s: float) -> Decision:
        """These leases could not be sent. Their actors get no other before they are heard of again."""
        decision = Decision()
        for lease in [lease for i in lease_ids if (lease := self.lease_table.leases.get(i)) is not None]:
            if (actor := self.actors.get(lease.actor)) is not None:
                actor.capacity = 0
            if not self._paused:
                self._expire(decision, lease, "lost")
        return self._grant(decision, now_s)

    def group(self, peer: bytes, message: SubmitGroup, frames: Sequence[Buffer], *, now_s: float) -> Decision:
        """A group has come: its header, and all its frames, of which the columns are read where it is wanted at all."""
        decision, cursor, lease_id = Decision(), message.cursor, message.lease_id
        if self._paused:  # without an answer, the actor holds it
            return decision
        lease = self.lease_table.leases.get(lease_id)
        reason = ""
        if cursor >= self.lease_table.next_cursor or message.run_id != self._rules.run_id:
            outcome, reason = "refused", f"question {cursor} of run {message.run_id} was never leased here"
        elif lease_id >= self.lease_table.next_lease_id or (lease is not None and lease.cursor != cursor):
            outcome, reason = "refused", f"lease {lease_id} was never given for question {cursor}"
        elif (entry := self.lease_table.undecided(cursor)) is None:
            outcome = "duplicate"
            if self.lease_table.drop(lease_id) is not None:
                decision.records.append(Ended(lease_id, "duplicate"))
        else:
            verdict, group = self._judge(entry, message, frames[1:])
            if group is not None:
                outcome, reason = "accepted", verdict.reason
                self._keep(decision, entry, Arrived(lease_id, group, frames), verdict)
            else:
                outcome, reason = "refused", verdict.reason
                self._try_again(decision, entry, message, verdict)
        if outcome == "refused":
            self.num_refused += 1
            log.warning("refused group %d: %s", cursor, reason)
        decision.sends.append(Send(peer, SubmitReply(lease_id=lease_id, outcome=outcome, reason=reason)))
        if lease is not None:
            self._offer(lease.actor)
        return self._grant(decision, now_s)

    def tick(self, serving: list[EngineFields], *, now_s: float) -> Decision:
        """Time has passed: silent actors lose their leases, stragglers are overtaken. `serving`: the engines by now."""
        decision, timeout_s = Decision(), self._limits.lease_timeout_s
        self.serving = serving
        self._forgive(now_s)
        if self._paused:
            return decision
        for name in [name for name, actor in self.actors.items() if now_s - actor.seen_s > timeout_s]:
            log.warning("actor %s is silent for %.0f s: its leases are issued again", name, timeout_s)
            self._forget(decision, name)
        for lease in list(self.lease_table.leases.values()):
            if lease.actor not in self.actors and now_s - max(lease.granted_s, self._listening_s) > timeout_s:
                self._expire(decision, lease, "expired")
        if self._limits.straggler_timeout_s is not None:
            self._overtake(decision, granted_before_s=now_s - self._limits.straggler_timeout_s)
        return self._grant(decision, now_s)

    def engines(self, serving: list[EngineFields], *, now_s: float) -> Decision:
        """An engine has joined, left or committed a version."""
        self.serving = serving
        return self._grant(Decision(), now_s)

    def trained(self, cursors: Sequence[int]) -> Decision:
        """The current step is done; leases wait for an engine that has its version, or for the next tick."""
        decision = Decision([Trained(self.lease_table.step, tuple(cursors))])
        self.lease_table.finish(cursors)
        return decision

    def published(self, publication: int, *, version: int) -> None:
        self._publications[publication] = version

    def drain(self, reason: str) -> Decision:
        """There is nothing more to do: every actor is told, now and at each heartbeat."""
        self._draining = reason
        return Decision(sends=[Send(actor.peer, Drain(reason=reason)) for actor in self.actors.values()])

    # --- inside ---

    def _judge(self, entry: Entry, header: SubmitGroup, data: Sequence[Buffer]) -> tuple[Verdict, GroupView | None]:
        """The group where it is to be kept."""
        try:
            group = decode_group(header, data)
        except ProtocolError as error:
            self.num_malformed += 1
            return Verdict("refuse", str(error)), None
        # A straggler that was overtaken may hold what its lease allowed: what is over age by now is masked in training.
        verdict = judge(
            group,
            rules=self._rules,
            publications=self._publications,
            step=self.lease_table.step,
            min_version=self.lease_table.min_version(min(entry.slot, entry.first_slot)),
        )
        return verdict, group if verdict.kind in ("accept", "skip") else None

    def _keep(self, decision: Decision, entry: Entry, arrived: Arrived, verdict: Verdict) -> None:
        accepted = verdict.kind == "accept"
        decide = self.lease_table.accept if accepted else self.lease_table.skip
        decide(lease_id=arrived.lease_id, cursor=entry.cursor)
        self._failures.pop(entry.cursor, None)
        ended = Ended(arrived.lease_id, "accepted" if accepted else "skipped")
        decision.records.extend([arrived, Placed(replace(entry)), ended])

    def _try_again(self, decision: Decision, entry: Entry, message: SubmitGroup, verdict: Verdict) -> None:
        """Issues the question again, or gives it up after too many failures; an attempt that goes on may still win."""
        lease_id, cursor = message.lease_id, message.cursor
        self._failures[cursor] += 1
        if message.attempt == entry.attempt and self._failures[cursor] >= MAX_FAILURES:
            log.warning("question %d gave no trainable group %d times: skipped", cursor, MAX_FAILURES)
            self.lease_table.skip(lease_id=lease_id, cursor=cursor)
            self._failures.pop(cursor)
        else:
            self.lease_table.reissue(lease_id=lease_id, cursor=cursor)
        ended = Ended(lease_id, "failed" if verdict.kind == "retry" else "refused", verdict.reason)
        decision.records.extend([Placed(replace(entry)), ended])

    def _overtake(self, decision: Decision, *, granted_before_s: float) -> None:
        for straggler, group in self.lease_table.overtake(granted_before_s=granted_before_s):
            log.warning("question %d is overtaken: slot %d for %d", straggler.cursor, straggler.slot, group.slot)
            for entry, left in ((straggler, group.slot), (group, straggler.slot)):
                decision.records.append(Moved(self.lease_table.step, entry.cursor, left, entry.slot))
                decision.records.append(Placed(replace(entry)))

    def _grant(self, decision: Decision, now_s: float) -> Decision:
        """Leases to whoever has most credits left, until the bound or the credits say stop."""
        lease_table = self.lease_table
        version = version_to_lease_by(self.serving, step=lease_table.step, staleness_bound=lease_table.staleness_bound)
        if self._draining or self._paused or version is None:
            return decision
        while lease_table.can_grant(engine_version=version) and (name := self.actors.take()) is not None:
            lease = lease_table.grant(actor=name, now_s=now_s, engine_version=version)
            assert lease is not None
            entry = lease_table.entries[lease.cursor]
            decision.records.extend([Granted(lease, version), Placed(replace(entry))])
            message = Lease(
                lease_id=lease.lease_id,
                run_id=self._rules.run_id,
                cursor=lease.cursor,
                attempt=lease.attempt,
                group_size=self._rules.group_size,
                min_version=lease_table.min_version(lease.slot),
            )
            decision.sends.append(Send(self.actors[name].peer, message))
            self._offer(name)
        return decision

    def _offer(self, name: str) -> None:
        self.actors.offer(name, num_outstanding=self.lease_table.num_outstanding(name))

    def _status(self) -> RunStatus:
        """The same object as long as it says the same, so that it is encoded once."""
        known = self._known_status
        if known is None or known.step != self.lease_table.step or known.engines != self.serving:
            known = self._known_status = RunStatus(
                run_id=self._rules.run_id,
                step=self.lease_table.step,
                num_steps=self.lease_table.num_steps,
                engines=list(self.serving),
            )
        return known

    def _forgive(self, now_s: float) -> None:
        stood_still_s = max(0.0, now_s - self._ticked_s - MAX_TICK_S)
        self._ticked_s = now_s
        self._listening_s += stood_still_s
        for actor in self.actors.values():
            actor.seen_s += stood_still_s

    def _forget(self, decision: Decision, name: str) -> None:
        self.actors.pop(name, None)
        for lease in self.lease_table.outstanding(name):
            self._expire(decision, lease, "expired")

    def _expire(self, decision: Decision, lease: LeaseRecord, outcome: LeaseOutcome) -> None:
        self.lease_table.expire(lease.lease_id)
        decision.records.append(Ended(lease.lease_id, outcome))
        if (entry := self.lease_table.entries.get(lease.cursor)) is not None:
            decision.records.append(Placed(replace(entry)))
        self._offer(lease.actor)
