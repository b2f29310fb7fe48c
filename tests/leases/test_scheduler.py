"""Single decisions: which actor gets a lease; stragglers, stuck engines and a full disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from learner.leases.admission import Rules
from learner.leases.decisions import Decision, Ended, EntryChanged, Granted, GroupReceived, SlotChanged, Trained
from learner.leases.entries import State
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.scheduler import Scheduler
from protocol.codec import encode_group
from protocol.framing import decode
from protocol.messages import (
    Drain,
    EngineFields,
    Goodbye,
    Heartbeat,
    Lease,
    RunStatus,
    SubmitGroup,
    SubmitReply,
)
from tests.leases.groups import GROUP_SIZE, RUN, VOCABULARY, make_group

LEASE_TIMEOUT_S = 60.0
STRAGGLER_S = 10.0
LOST_AFTER_S = 5.0


def make(*, groups_per_batch: int = 2, staleness_bound: int = 1, straggler_timeout_s: float | None = None) -> Scheduler:
    return Scheduler(
        LeaseTable(groups_per_batch=groups_per_batch, staleness_bound=staleness_bound, num_steps=100),
        rules=Rules(RUN, GROUP_SIZE, VOCABULARY, skip_zero_variance=True),
        timeouts=LeaseTimeouts(LEASE_TIMEOUT_S, straggler_timeout_s, lost_after_s=LOST_AFTER_S),
        publications={version + 1: version for version in range(100)},
        num_failures={},
        started_s=0.0,
    )


def engine(name: str, version: int) -> EngineFields:
    return EngineFields(name=name, url="http://127.0.0.1:1", version=version, publication=version + 1)


def beat(scheduler: Scheduler, name: str = "a", *, slots: int = 16, held: list[int] | None = None, **to: float):
    """Sends a heartbeat and returns the leases granted by it. `held`: by default all outstanding leases.

    The actor has `slots` trajectory slots; each lease that it holds uses GROUP_SIZE of them.
    """
    held = [lease.lease_id for lease in scheduler.lease_table.outstanding(name)] if held is None else held
    message = heartbeat(name, slots=slots, held=held)
    return leases(scheduler.on_heartbeat(name.encode(), message, now_s=to.get("now_s", 0.0)))


def heartbeat(name: str, *, slots: int, held: Sequence[int] = (), draining: bool = False) -> Heartbeat:
    free = max(0, slots - GROUP_SIZE * len(held))
    return Heartbeat(actor=name, incarnation="1", capacity=slots, free_slots=free, held=list(held), draining=draining)


def leases(decision: Decision) -> list[Lease]:
    return [send.message for send in decision.sends if isinstance(send.message, Lease)]


def submit(scheduler: Scheduler, lease: Lease, *, version: int = 0, now_s: float = 0.0) -> Decision:
    group = make_group(lease, version=version, publication=version + 1)
    frames = encode_group(group, lease_id=lease.lease_id)
    message, _ = decode(frames)
    assert isinstance(message, SubmitGroup)
    return scheduler.on_group(b"a", message, frames, now_s=now_s)


def outcome(decision: Decision) -> str:
    return next(send.message.outcome for send in decision.sends if isinstance(send.message, SubmitReply))


def train(scheduler: Scheduler) -> list[int]:
    batch = scheduler.lease_table.ready_batch()
    assert batch is not None
    assert scheduler.on_batch_trained(batch) == Decision([Trained(scheduler.lease_table.step - 1, tuple(batch))])
    return batch


def test_a_lease_is_recorded_with_its_question_and_sent() -> None:
    scheduler = make()
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    message = heartbeat("a", slots=2)
    decision = scheduler.on_heartbeat(b"peer", message, now_s=3.0)
    granted, placed = decision.records
    assert isinstance(granted, Granted)
    assert (granted.lease.actor, granted.lease.granted_s, granted.engine_version) == ("a", 3.0, 0)
    assert isinstance(placed, EntryChanged)
    assert (placed.entry.state, placed.entry.slot) == (State.RUNNING, 0)
    assert [(send.peer, type(send.message)) for send in decision.sends] == [(b"peer", RunStatus), (b"peer", Lease)]


def test_leases_go_to_the_actor_with_most_free_slots() -> None:
    scheduler = make(groups_per_batch=4)
    beat(scheduler, "a", slots=4)
    beat(scheduler, "b", slots=8)
    decision = scheduler.on_engines([engine("e", 0)], now_s=0.0)
    peers = [send.peer for send in decision.sends]
    assert peers[:2] == [b"b", b"b"], "b has 8 free slots, then 6; then both have 4"
    assert sorted(peers) == [b"a"] * 2 + [b"b"] * 4
    assert scheduler.on_engines([engine("e", 0)], now_s=0.0) == Decision()


def test_an_actor_with_fewer_slots_keeps_its_leases_and_gets_none() -> None:
    scheduler = make()
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    first = beat(scheduler, slots=6)
    assert len(first) == 3
    assert beat(scheduler, slots=2) == []
    assert leases(submit(scheduler, first[0])) == []
    assert len(beat(scheduler, slots=6)) == 1


def test_an_actor_gets_leases_while_it_has_a_free_slot() -> None:
    """The last lease may take more slots than are free: its other trajectories wait in the actor."""
    scheduler = make(groups_per_batch=8)
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    assert len(beat(scheduler, slots=5)) == 3
    assert len(beat(scheduler, "large groups", slots=1)) == 1, "the group has two trajectories"
    assert scheduler.num_free_slots() == 0


def test_leases_that_no_heartbeat_has_listed_take_slots() -> None:
    """A heartbeat that was sent before the leases arrived reports their slots as free."""
    scheduler = make(groups_per_batch=8)
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    assert len(beat(scheduler, slots=6)) == 3
    assert beat(scheduler, slots=6, held=[]) == []
    held = [lease.lease_id for lease in scheduler.lease_table.outstanding("a")][:2]
    assert beat(scheduler, slots=6, held=held) == [], "two slots are free, the third lease is under way"
    assert len(beat(scheduler, slots=8, held=held)) == 1


def test_slots_of_ended_trajectories_are_leased_before_their_group_is_complete() -> None:
    scheduler = make(groups_per_batch=8)
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    held = [lease.lease_id for lease in beat(scheduler, slots=4)]
    message = Heartbeat(actor="a", incarnation="1", capacity=4, free_slots=1, held=held)
    assert len(leases(scheduler.on_heartbeat(b"a", message, now_s=0.0))) == 1


def test_more_free_slots_than_slots_count_as_all_slots() -> None:
    scheduler = make(groups_per_batch=8)
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    message = Heartbeat(actor="a", incarnation="1", capacity=2, free_slots=1 << 30, held=[])
    assert len(leases(scheduler.on_heartbeat(b"a", message, now_s=0.0))) == 1


def test_a_draining_actor_gets_no_lease_and_gives_back_those_that_it_does_not_hold() -> None:
    scheduler = make()
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    first, second = beat(scheduler, slots=4)
    beat(scheduler, "b", slots=0)
    message = heartbeat("a", slots=4, held=[first.lease_id], draining=True)
    decision = scheduler.on_heartbeat(b"a", message, now_s=0.0)
    assert [record for record in decision.records if isinstance(record, Ended)] == [Ended(second.lease_id, "returned")]
    assert leases(decision) == []
    (again,) = beat(scheduler, "b", slots=2)
    assert (again.cursor, again.attempt) == (second.cursor, 1)
    assert outcome(submit(scheduler, first)) == "accepted"
    assert scheduler.lease_table.num_expired == 0


def test_goodbye_gives_leases_back_and_none_counts_as_expired() -> None:
    scheduler = make()
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    (lease,) = beat(scheduler, slots=2)
    decision = scheduler.on_goodbye(Goodbye(actor="a", incarnation="1"), now_s=0.0)
    assert Ended(lease.lease_id, "returned") in decision.records
    assert scheduler.lease_table.num_expired == 0


def test_an_engine_behind_the_bound_does_not_hold_the_others_back() -> None:
    """At step 2 with a bound of 1, version 0 can serve no lease."""
    scheduler = make(groups_per_batch=1)
    stuck = engine("stuck", 0)
    scheduler.on_engines([stuck, engine("good", 0)], now_s=0.0)
    given = beat(scheduler)
    submit(scheduler, given[0])
    train(scheduler)
    assert scheduler.on_engines([stuck, engine("good", 1)], now_s=0.0) == Decision(), "the lowest version counts"
    submit(scheduler, given[1])
    train(scheduler)
    assert scheduler.on_engines([stuck], now_s=0.0) == Decision()
    (lease,) = leases(scheduler.on_engines([stuck, engine("good", 1)], now_s=0.0))
    assert lease.min_version == 1


def test_an_engine_version_above_the_learners_does_not_raise_the_limit() -> None:
    scheduler = make(groups_per_batch=1)
    scheduler.on_engines([engine("liar", 99)], now_s=0.0)
    assert len(beat(scheduler)) == 2


def test_undelivered_leases_are_issued_to_another_actor() -> None:
    scheduler = make()
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    beat(scheduler, "a", slots=4)
    beat(scheduler, "b", slots=0)
    held = [lease.lease_id for lease in scheduler.lease_table.outstanding("a")]
    decision = scheduler.on_undelivered(held[:1], now_s=1.0)
    assert Ended(held[0], "lost") in decision.records
    assert leases(decision) == [], "a gets no lease before its next heartbeat"
    (again,) = beat(scheduler, "b", slots=2, now_s=1.0)
    assert (again.cursor, again.attempt) == (0, 1)
    assert [lease.lease_id for lease in scheduler.lease_table.outstanding("a")] == held[1:], (
        "it keeps the delivered lease"
    )


def test_a_lease_that_no_heartbeat_names_is_lost_after_lost_after_s() -> None:
    scheduler = make()
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    beat(scheduler, slots=2)
    assert beat(scheduler, slots=2, held=[], now_s=LOST_AFTER_S) == []
    (again,) = beat(scheduler, slots=2, held=[], now_s=LOST_AFTER_S + 0.1)
    assert (again.cursor, again.attempt) == (0, 1)


def test_a_stall_of_the_learner_extends_the_actors_deadlines() -> None:
    scheduler = make()
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    assert len(beat(scheduler)) == 4
    serving, now_s = [engine("e", 0)], 1e7
    for tick in range(int(LEASE_TIMEOUT_S)):
        assert scheduler.on_tick(serving, now_s=now_s + tick) == Decision()
    ended = scheduler.on_tick(serving, now_s=now_s + LEASE_TIMEOUT_S + 1.0)
    assert len(ended.records) == 8, "four leases and their questions, after a whole time-out without a heartbeat"


def test_a_straggler_is_overtaken_and_accepted_later() -> None:
    scheduler = make(straggler_timeout_s=STRAGGLER_S)
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    slow, second, third, fourth = beat(scheduler, slots=8)
    submit(scheduler, second)
    submit(scheduler, fourth)
    serving = [engine("e", 0)]
    assert scheduler.on_tick(serving, now_s=STRAGGLER_S) == Decision()
    decision = scheduler.on_tick(serving, now_s=STRAGGLER_S + 0.1)
    assert [record for record in decision.records if isinstance(record, SlotChanged)] == [
        SlotChanged(0, slow.cursor, 0, 3),
        SlotChanged(0, fourth.cursor, 3, 0),
    ]
    assert train(scheduler) == [fourth.cursor, second.cursor]
    submit(scheduler, third)
    for version in (1, 2):  # it is overtaken again, and its tokens of version 0 pass the bound of 1
        serving = [engine("e", version)]
        for lease in leases(scheduler.on_tick(serving, now_s=100.0)):
            submit(scheduler, lease, version=version)
        scheduler.on_tick(serving, now_s=100.0)
        train(scheduler)
    assert scheduler.lease_table.entries[slow.cursor].slot == 6
    assert scheduler.lease_table.min_version(6) == 2
    assert outcome(submit(scheduler, slow, version=0)) == "accepted", "over-age tokens are masked in training"
    assert scheduler.lease_table.num_overtaken == 3


@pytest.mark.parametrize("why", ["another is missing too", "no group has come for a later batch", "switched off"])
def test_no_straggler_is_overtaken_unless_that_completes_the_batch(why: str) -> None:
    scheduler = make(straggler_timeout_s=None if why == "switched off" else STRAGGLER_S)
    serving = [engine("e", 0)]
    scheduler.on_engines(serving, now_s=0.0)
    first, second, _, fourth = beat(scheduler, slots=8)
    if why != "no group has come for a later batch":
        submit(scheduler, fourth)
    if why != "another is missing too":
        submit(scheduler, second)
    assert scheduler.on_tick(serving, now_s=STRAGGLER_S + 1) == Decision()
    assert scheduler.lease_table.entries[first.cursor].slot == 0


def test_tokens_older_than_the_lease_allows_are_refused_unless_overtaken() -> None:
    scheduler = make(groups_per_batch=1)
    scheduler.on_engines([engine("e", 0)], now_s=0.0)
    for lease in beat(scheduler):
        submit(scheduler, lease)
        train(scheduler)
    (lease, *_) = leases(scheduler.on_engines([engine("e", 2)], now_s=0.0))
    decision = submit(scheduler, lease, version=0)
    assert outcome(decision) == "refused"
    assert Ended(lease.lease_id, "refused", "versions must be >= 1 for this lease, got 0") in decision.records


def test_no_decision_is_made_while_the_disk_is_full() -> None:
    scheduler = make()
    serving = [engine("e", 0)]
    scheduler.on_engines(serving, now_s=0.0)
    (lease,) = beat(scheduler, slots=2)
    assert outcome(submit(scheduler, lease)) == "accepted"  # ... but this decision could not be stored:
    stored = make().lease_table
    stored.grant(actor="a", now_s=0.0)
    scheduler.pause(stored, num_failures={})
    events: list[Callable[[], Decision]] = [
        lambda: submit(scheduler, lease),
        lambda: scheduler.on_tick(serving, now_s=1e7),
        lambda: scheduler.on_engines(serving, now_s=0.0),
        lambda: scheduler.on_goodbye(Goodbye(actor="a", incarnation="1"), now_s=0.0),
    ]
    for event in events:
        assert event() == Decision()
    message = heartbeat("a", slots=6)
    alive = scheduler.on_heartbeat(b"a", message, now_s=1e7)
    assert [type(send.message) for send in alive.sends] == [RunStatus], "heartbeats are still answered"
    assert alive.records == []
    scheduler.resume()
    again = submit(scheduler, lease, now_s=1e7)
    assert outcome(again) == "accepted"
    assert len([record for record in again.records if isinstance(record, GroupReceived)]) == 1
    assert len(leases(again)) == 3


def test_drain_is_sent_at_once_and_in_answer_to_each_heartbeat() -> None:
    scheduler = make()
    beat(scheduler, "a")
    assert [send.message for send in scheduler.drain("done").sends] == [Drain(reason="done")]
    assert scheduler.on_engines([engine("e", 0)], now_s=0.0) == Decision()
    message = heartbeat("b", slots=2)
    assert [send.message for send in scheduler.on_heartbeat(b"b", message, now_s=0.0).sends] == [Drain(reason="done")]
