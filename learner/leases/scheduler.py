"""The scheduler: (state, event) → Decision, which is records to store and messages to send. No sockets, no files.

    on_heartbeat, on_goodbye, on_undelivered ─┐                             ┌─► records: one transaction
    on_group ─────────────────────────────────┼─► Scheduler ─► Decision ────┤
    on_tick, on_engines, on_batch_trained ────┘   LeaseTable, Actors,       └─► sends: after the transaction
                                                  ReceivedGroups

After every event except `on_batch_trained` and `drain`, it grants all leases that the lease table and the actors' free
trajectory slots allow. An actor gets a lease while it has at least one free slot. Up to group_size - 1 trajectories
then wait in the actor, so the next slots that become free are used at once, and a group may have more trajectories than
the actor has slots.

The state in memory can be discarded between any two events: its durable part is in the store, and peers send the rest
again with every heartbeat. tests/leases/simulation.py runs it in simulated time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from learner.leases.actors import Actor, Actors
from learner.leases.admission import Rules
from learner.leases.decisions import (
    ACTOR_DIED,
    Decision,
    Ended,
    EntryChanged,
    Granted,
    LeaseOutcome,
    Send,
    SlotChanged,
    Trained,
)
from learner.leases.engines import version_to_lease_by
from learner.leases.entries import LeaseRecord, State
from learner.leases.group_outcomes import GroupOutcomes
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.received_groups import MAX_FAILURES, ReceivedGroups
from learner.leases.run_status import CurrentStatus
from protocol.framing import Buffer
from protocol.messages import (
    Drain,
    EngineFields,
    Goodbye,
    Heartbeat,
    Lease,
    SubmitGroup,
)

log = logging.getLogger(__name__)

# Incarnations that another one of the same name has replaced; a forgotten one replaces its successor if it reports.
_MAX_SUPERSEDED = 1_024
# If there are too many actors, one that has missed this many seconds of heartbeats makes room for a new one.
_SILENT_AFTER_S = 5.0


class Scheduler:
    """Every public method is one event. `now_s`: seconds on a clock that never goes back.

    publications  publication → version, from the store
    num_failures  cursor → number of its failures (see `learner.leases.received_groups.MAX_FAILURES`)
    started_s     time at which this learner started: leases of actors that have not reconnected expire no earlier than
                  lease_timeout_s after it
    """

    def __init__(
        self,
        lease_table: LeaseTable,
        *,
        rules: Rules,
        timeouts: LeaseTimeouts,
        publications: Mapping[int, int],
        num_failures: Mapping[int, int],
        started_s: float,
        outcomes: GroupOutcomes | None = None,
        max_actors: int = 2_048,
    ) -> None:
        self.lease_table = lease_table
        self.outcomes = outcomes or GroupOutcomes()
        self.actors = Actors(max_actors=max_actors)
        self.serving: list[EngineFields] = []
        self.groups = ReceivedGroups(
            rules=rules, publications=publications, num_failures=num_failures, outcomes=self.outcomes
        )
        self._rules = rules
        self._timeouts = timeouts
        self._started_s = self._ticked_s = started_s
        self._superseded: dict[str, str] = {}
        self._draining = ""
        self._paused = False
        self._status = CurrentStatus(run_id=rules.run_id)

    def pause(self, lease_table: LeaseTable, *, num_failures: Mapping[int, int]) -> None:
        """Call it if a decision could not be committed. Replaces the state in memory by the stored one and blocks all
        decisions that need a record until `resume`."""
        lease_table.num_expired = self.lease_table.num_expired
        lease_table.num_overtaken = self.lease_table.num_overtaken
        self.lease_table = lease_table
        self.groups.restore(num_failures)
        self._paused = True

    def resume(self) -> None:
        """Allows decisions again; the caller will try to write."""
        self._paused = False
        for name in self.actors:
            self._queue_actor(name)

    # --- events ---

    def on_heartbeat(self, peer: bytes, message: Heartbeat, *, now_s: float) -> Decision:
        decision, name = Decision(), message.actor
        if self._superseded.get(name) == message.incarnation:
            decision.sends.append(Send(peer, Drain(reason=f"another actor with the name {name} has connected")))
            return decision
        known = self.actors.get(name)
        if known is not None and known.incarnation != message.incarnation:
            if self._paused:
                return decision
            log.warning("actor %s was restarted: its old leases expire and are issued again", name)
            self._superseded[name] = known.incarnation
            if len(self._superseded) > _MAX_SUPERSEDED:
                del self._superseded[next(iter(self._superseded))]
            self._remove_actor(decision, name, died=True)
            known = None
        if known is None:
            if not self._make_room(decision, name, now_s=now_s):
                return decision
            known = self.actors[name] = Actor(peer, message.incarnation)
        known.update(peer, message, running=self.lease_table.outstanding(name), now_s=now_s)
        self.outcomes.reported(name, message.incarnation, message.failures)
        self._queue_actor(name)
        for lease in known.unlisted(self.lease_table.outstanding(name)) if not self._paused else ():
            if message.draining:
                self._expire(decision, lease, "returned")
            elif now_s - lease.granted_s > self._timeouts.lost_after_s:
                self._expire(decision, lease, "lost")
        reply = Drain(reason=self._draining) if self._draining else self._status.message(self.lease_table, self.serving)
        decision.sends.append(Send(peer, reply))
        return self._grant(decision, now_s)

    def on_goodbye(self, message: Goodbye, *, now_s: float) -> Decision:
        decision, known = Decision(), self.actors.get(message.actor)
        if not self._paused and (known is None or known.incarnation == message.incarnation):
            self._remove_actor(decision, message.actor, died=False)
        return self._grant(decision, now_s)

    def on_undelivered(self, lease_ids: Sequence[int], *, now_s: float) -> Decision:
        """Expires leases that could not be sent. Their actors get no other lease before their next heartbeat."""
        decision = Decision()
        for lease in [lease for i in lease_ids if (lease := self.lease_table.leases.get(i)) is not None]:
            if (actor := self.actors.get(lease.actor)) is not None:
                actor.free_slots = 0
            if not self._paused:
                self._expire(decision, lease, "lost")
        return self._grant(decision, now_s)

    def on_group(self, peer: bytes, message: SubmitGroup, frames: Sequence[Buffer], *, now_s: float) -> Decision:
        """Handles a received group. `message`: its decoded header; `frames`: the frames of header and columns."""
        decision = Decision()
        if self._paused:  # without a reply, the actor keeps the group and sends it again
            return decision
        lease = self.lease_table.leases.get(message.lease_id)
        decision.sends.append(Send(peer, self.groups.decide(decision, self.lease_table, message, frames)))
        if lease is not None:
            self._queue_actor(lease.actor)
        return self._grant(decision, now_s)

    def on_tick(self, serving: list[EngineFields], *, now_s: float) -> Decision:
        """Expires leases, overtakes stragglers, grants leases. `serving`: the engines that serve now."""
        decision, timeout_s = Decision(), self._timeouts.lease_timeout_s
        self.serving = serving
        self._extend_deadlines_after_stall(now_s)
        if self._paused:
            return decision
        for name in [name for name, actor in self.actors.items() if now_s - actor.seen_s > timeout_s]:
            log.warning(
                "actor %s sent no heartbeat for %.0f s: its leases expire and are issued again", name, timeout_s
            )
            self._remove_actor(decision, name, died=True)
        for lease in list(self.lease_table.leases.values()):
            if lease.actor not in self.actors and now_s - max(lease.granted_s, self._started_s) > timeout_s:
                self._expire(decision, lease, "expired")
        if self._timeouts.straggler_timeout_s is not None:
            self._overtake(decision, granted_before_s=now_s - self._timeouts.straggler_timeout_s)
        return self._grant(decision, now_s)

    def on_engines(self, serving: list[EngineFields], *, now_s: float) -> Decision:
        """Call it if an engine has connected or committed a version. `serving`: the engines that serve now."""
        self.serving = serving
        return self._grant(Decision(), now_s)

    def on_batch_trained(self, cursors: Sequence[int]) -> Decision:
        """Ends the current step. The next `on_engines` or `on_tick` grants the leases that the new version allows."""
        decision = Decision([Trained(self.lease_table.step, tuple(cursors))])
        self.lease_table.finish(cursors)
        return decision

    def on_publication(self, publication: int, *, version: int) -> None:
        """Adds a publication, so that groups sampled by it are admitted."""
        self.groups.add_publication(publication, version=version)

    def num_free_slots(self) -> int:
        """The free trajectory slots of all connected actors, less those that leases under way will take."""
        return sum(max(0, self._free_slots(name)) for name in self.actors)

    def drain(self, reason: str) -> Decision:
        """Ends the run: no more leases; `Drain` is sent to every actor now and as the reply to each later heartbeat."""
        self._draining = reason
        return Decision(sends=[Send(actor.peer, Drain(reason=reason)) for actor in self.actors.values()])

    # --- inside ---

    def _overtake(self, decision: Decision, *, granted_before_s: float) -> None:
        for straggler, group in self.lease_table.overtake(granted_before_s=granted_before_s):
            log.warning("straggler: question %d moves from slot %d to %d", straggler.cursor, group.slot, straggler.slot)
            for entry, from_slot in ((straggler, group.slot), (group, straggler.slot)):
                decision.records.append(SlotChanged(self.lease_table.step, entry.cursor, from_slot, entry.slot))
                decision.records.append(EntryChanged(replace(entry)))

    def _grant(self, decision: Decision, now_s: float) -> Decision:
        """Grants leases until the lease table allows no more or no actor has a free slot; most free slots first."""
        lease_table = self.lease_table
        version = version_to_lease_by(self.serving, step=lease_table.step, staleness_bound=lease_table.staleness_bound)
        if self._draining or self._paused or version is None:
            return decision
        while lease_table.can_grant(engine_version=version) and (name := self.actors.take()) is not None:
            lease = lease_table.grant(actor=name, now_s=now_s)
            entry = lease_table.entries[lease.cursor]
            decision.records.extend([Granted(lease, version), EntryChanged(replace(entry))])
            message = Lease(
                lease_id=lease.lease_id,
                run_id=self._rules.run_id,
                cursor=lease.cursor,
                attempt=lease.attempt,
                group_size=self._rules.group_size,
                min_version=lease_table.min_version(lease.slot),
            )
            decision.sends.append(Send(self.actors[name].peer, message))
            self._queue_actor(name)
        return decision

    def _free_slots(self, name: str) -> int:
        """The free slots of a connected actor; each lease that its last heartbeat did not list takes group_size.

        Negative if trajectories of these leases will wait for a slot.
        """
        actor = self.actors[name]
        return actor.free_slots - self._rules.group_size * len(actor.unlisted(self.lease_table.outstanding(name)))

    def _queue_actor(self, name: str) -> None:
        if name in self.actors:
            self.actors.queue(name, free_slots=self._free_slots(name))

    def _make_room(self, decision: Decision, name: str, *, now_s: float) -> bool:
        """Removes the longest silent actor if there are too many. Returns False if all are alive: no reply is sent."""
        if self.actors.has_room():
            return True
        silent = self.actors.longest_silent(silent_since_s=now_s - _SILENT_AFTER_S)
        if silent is None or self._paused:
            log.warning("actor %s cannot join: %d actors are connected (network.max_peers)", name, len(self.actors))
            return False
        self._remove_actor(decision, silent, died=True)
        return True

    def _extend_deadlines_after_stall(self, now_s: float) -> None:
        """Extends the actors' deadlines by the time that the event loop stalled: the tick interval minus max_tick_s."""
        stalled_s = max(0.0, now_s - self._ticked_s - self._timeouts.max_tick_s)
        self._ticked_s = now_s
        self._started_s += stalled_s
        for actor in self.actors.values():
            actor.seen_s += stalled_s

    def _remove_actor(self, decision: Decision, name: str, *, died: bool) -> None:
        """Ends the actor's leases. If it `died`, one of their questions may be the cause: each counts a failure."""
        self.actors.pop(name, None)
        for lease in self.lease_table.outstanding(name):
            self._expire(decision, lease, "expired" if died else "returned", reason=ACTOR_DIED if died else "")

    def _expire(self, decision: Decision, lease: LeaseRecord, outcome: LeaseOutcome, *, reason: str = "") -> None:
        """Ends a lease without a group; its question waits. A returned lease is not counted as expired."""
        cursor = lease.cursor
        if outcome == "returned":
            self.lease_table.reissue(lease_id=lease.lease_id, cursor=cursor)
        else:
            self.lease_table.expire(lease.lease_id)
        decision.records.append(Ended(lease.lease_id, outcome, reason))
        if (entry := self.lease_table.entries.get(cursor)) is not None:
            is_newest = entry.state is State.WAITING and entry.attempt == lease.attempt
            if reason == ACTOR_DIED and is_newest and self.groups.count_failure(cursor):
                log.warning("question %d is skipped: %d failures; the last time, its actor died", cursor, MAX_FAILURES)
                self.groups.forget_failures(cursor)
                self.lease_table.skip(lease_id=lease.lease_id, cursor=cursor)
                self.outcomes.fatal_questions.append(cursor)
            decision.records.append(EntryChanged(replace(entry)))
        self._queue_actor(lease.actor)
