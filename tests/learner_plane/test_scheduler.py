"""Single decisions: who gets leases, what a straggler, a stuck engine or a full disk change."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from learner.leases.admission import Limits, Rules
from learner.leases.decisions import Arrived, Decision, Ended, Granted, Moved, Placed, Trained
from learner.leases.lease_table import LeaseTable, State
from learner.leases.scheduler import LOST_AFTER_S, Scheduler
from protocol.codec import encode_group
from protocol.framing import decode
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, Lease, RunStatus, SubmitGroup, SubmitReply
from tests.learner_plane.peers import GROUP_SIZE, RUN, VOCABULARY, make_group

LEASE_TIMEOUT_S = 60.0
STRAGGLER_S = 10.0


def make(*, groups_per_batch: int = 2, staleness_bound: int = 1, straggler_timeout_s: float | None = None) -> Scheduler:
    return Scheduler(
        LeaseTable(groups_per_batch=groups_per_batch, staleness_bound=staleness_bound, num_steps=100),
        rules=Rules(RUN, GROUP_SIZE, VOCABULARY, skip_zero_variance=True),
        limits=Limits(lease_timeout_s=LEASE_TIMEOUT_S, straggler_timeout_s=straggler_timeout_s),
        publications={version + 1: version for version in range(100)},
        num_failures={},
        started_s=0.0,
    )


def engine(name: str, version: int) -> EngineFields:
    return EngineFields(name=name, url="http://127.0.0.1:1", version=version, publication=version + 1)


def beat(scheduler: Scheduler, name: str = "a", *, capacity: int = 8, held: list[int] | None = None, **to: float):
    """A heartbeat, and the leases that it brings. All outstanding leases are held unless told otherwise."""
    held = [lease.lease_id for lease in scheduler.lease_table.outstanding(name)] if held is None else held
    message = Heartbeat(actor=name, incarnation="1", capacity=capacity, held=held, counters={})
    return leases(scheduler.heartbeat(name.encode(), message, now_s=to.get("now_s", 0.0)))


def leases(decision: Decision) -> list[Lease]:
    return [send.message for send in decision.sends if isinstance(send.message, Lease)]


def submit(scheduler: Scheduler, lease: Lease, *, version: int = 0, now_s: float = 0.0, **how: object) -> Decision:
    group = make_group(lease, version=version, publication=version + 1, **how)
    frames = encode_group(group, lease_id=lease.lease_id)
    message, _ = decode(frames)
    assert isinstance(message, SubmitGroup)
    return scheduler.group(b"a", message, frames, now_s=now_s)


def outcome(decision: Decision) -> str:
    return next(send.message.outcome for send in decision.sends if isinstance(send.message, SubmitReply))


def train(scheduler: Scheduler) -> list[int]:
    batch = scheduler.lease_table.ready_batch()
    assert batch is not None
    assert scheduler.trained(batch) == Decision([Trained(scheduler.lease_table.step - 1, tuple(batch))])
    return batch


def test_a_lease_is_recorded_with_its_question_and_sent() -> None:
    scheduler = make()
    scheduler.engines([engine("e", 0)], now_s=0.0)
    message = Heartbeat(actor="a", incarnation="1", capacity=1, held=[], counters={})
    decision = scheduler.heartbeat(b"peer", message, now_s=3.0)
    granted, placed = decision.records
    assert isinstance(granted, Granted)
    assert (granted.lease.actor, granted.lease.granted_s, granted.engine_version) == ("a", 3.0, 0)
    assert isinstance(placed, Placed)
    assert (placed.entry.state, placed.entry.slot) == (State.RUNNING, 0)
    assert [(send.peer, type(send.message)) for send in decision.sends] == [(b"peer", RunStatus), (b"peer", Lease)]


def test_leases_go_to_whoever_has_most_credits() -> None:
    scheduler = make(groups_per_batch=4)
    beat(scheduler, "a", capacity=2)
    beat(scheduler, "b", capacity=4)
    decision = scheduler.engines([engine("e", 0)], now_s=0.0)
    peers = [send.peer for send in decision.sends]
    assert peers[:2] == [b"b", b"b"], "b has 4 credits, then 3; then both have 2"
    assert sorted(peers) == [b"a"] * 2 + [b"b"] * 4
    assert scheduler.engines([engine("e", 0)], now_s=0.0) == Decision()


def test_capacity_that_shrinks_takes_nothing_back_and_gives_nothing() -> None:
    scheduler = make()
    scheduler.engines([engine("e", 0)], now_s=0.0)
    first = beat(scheduler, capacity=3)
    assert len(first) == 3
    assert beat(scheduler, capacity=1) == []
    assert leases(submit(scheduler, first[0])) == []
    assert len(beat(scheduler, capacity=3)) == 1


def test_an_engine_behind_the_bound_does_not_hold_the_others_back() -> None:
    """At step 2 with a bound of 1, version 0 can serve nothing any more."""
    scheduler = make(groups_per_batch=1)
    stuck = engine("stuck", 0)
    scheduler.engines([stuck, engine("good", 0)], now_s=0.0)
    given = beat(scheduler)
    submit(scheduler, given[0])
    train(scheduler)
    assert scheduler.engines([stuck, engine("good", 1)], now_s=0.0) == Decision(), "the lowest version counts"
    submit(scheduler, given[1])
    train(scheduler)
    assert scheduler.engines([stuck], now_s=0.0) == Decision()
    (lease,) = leases(scheduler.engines([stuck, engine("good", 1)], now_s=0.0))
    assert lease.min_version == 1


def test_an_engine_cannot_raise_the_limit_beyond_the_learner() -> None:
    scheduler = make(groups_per_batch=1)
    scheduler.engines([engine("liar", 99)], now_s=0.0)
    assert len(beat(scheduler)) == 2


def test_leases_that_could_not_be_sent_go_to_another() -> None:
    scheduler = make()
    scheduler.engines([engine("e", 0)], now_s=0.0)
    beat(scheduler, "a", capacity=2)
    beat(scheduler, "b", capacity=0)
    held = [lease.lease_id for lease in scheduler.lease_table.outstanding("a")]
    decision = scheduler.undelivered(held[:1], now_s=1.0)
    assert Ended(held[0], "lost") in decision.records
    assert leases(decision) == [], "a gets nothing before it is heard of"
    (again,) = beat(scheduler, "b", capacity=1, now_s=1.0)
    assert (again.cursor, again.attempt) == (0, 1)
    assert [lease.lease_id for lease in scheduler.lease_table.outstanding("a")] == held[1:], "it may work on"


def test_a_lease_that_no_heartbeat_names_is_lost_after_a_while() -> None:
    scheduler = make()
    scheduler.engines([engine("e", 0)], now_s=0.0)
    beat(scheduler, capacity=1)
    assert beat(scheduler, capacity=1, held=[], now_s=LOST_AFTER_S) == []
    (again,) = beat(scheduler, capacity=1, held=[], now_s=LOST_AFTER_S + 0.1)
    assert (again.cursor, again.attempt) == (0, 1)


def test_actors_are_not_blamed_where_the_learner_stood_still() -> None:
    scheduler = make()
    scheduler.engines([engine("e", 0)], now_s=0.0)
    assert len(beat(scheduler)) == 4
    serving, now_s = [engine("e", 0)], 1e7
    for tick in range(int(LEASE_TIMEOUT_S)):
        assert scheduler.tick(serving, now_s=now_s + tick) == Decision()
    ended = scheduler.tick(serving, now_s=now_s + LEASE_TIMEOUT_S + 1.0)
    assert len(ended.records) == 8, "four leases and their questions, once it was silent for so long"


def test_a_straggler_is_overtaken_and_comes_in_later() -> None:
    scheduler = make(straggler_timeout_s=STRAGGLER_S)
    scheduler.engines([engine("e", 0)], now_s=0.0)
    slow, second, third, fourth = beat(scheduler, capacity=4)
    submit(scheduler, second)
    submit(scheduler, fourth)
    serving = [engine("e", 0)]
    assert scheduler.tick(serving, now_s=STRAGGLER_S) == Decision()
    decision = scheduler.tick(serving, now_s=STRAGGLER_S + 0.1)
    assert [record for record in decision.records if isinstance(record, Moved)] == [
        Moved(0, slow.cursor, 0, 3),
        Moved(0, fourth.cursor, 3, 0),
    ]
    assert train(scheduler) == [fourth.cursor, second.cursor]
    submit(scheduler, third)
    for version in (1, 2):  # it is overtaken again, and its tokens of version 0 pass the bound of 1
        serving = [engine("e", version)]
        for lease in leases(scheduler.tick(serving, now_s=100.0)):
            submit(scheduler, lease, version=version)
        scheduler.tick(serving, now_s=100.0)
        train(scheduler)
    assert scheduler.lease_table.entries[slow.cursor].slot == 6
    assert scheduler.lease_table.min_version(6) == 2
    assert outcome(submit(scheduler, slow, version=0)) == "accepted", "the rest is masked where tokens are trained"
    assert scheduler.lease_table.num_overtaken == 3


@pytest.mark.parametrize("why", ["another is missing too", "no group has come for a later batch", "switched off"])
def test_nobody_is_overtaken_in_vain(why: str) -> None:
    scheduler = make(straggler_timeout_s=None if why == "switched off" else STRAGGLER_S)
    serving = [engine("e", 0)]
    scheduler.engines(serving, now_s=0.0)
    first, second, _, fourth = beat(scheduler, capacity=4)
    if why != "no group has come for a later batch":
        submit(scheduler, fourth)
    if why != "another is missing too":
        submit(scheduler, second)
    assert scheduler.tick(serving, now_s=STRAGGLER_S + 1) == Decision()
    assert scheduler.lease_table.entries[first.cursor].slot == 0


def test_tokens_older_than_the_lease_are_refused_from_who_was_not_overtaken() -> None:
    scheduler = make(groups_per_batch=1)
    scheduler.engines([engine("e", 0)], now_s=0.0)
    for lease in beat(scheduler):
        submit(scheduler, lease)
        train(scheduler)
    (lease, *_) = leases(scheduler.engines([engine("e", 2)], now_s=0.0))
    decision = submit(scheduler, lease, version=0)
    assert outcome(decision) == "refused"
    assert Ended(lease.lease_id, "refused", "its lease asks for versions >= 1, got 0") in decision.records


def test_nothing_is_decided_while_the_disk_is_full() -> None:
    scheduler = make()
    serving = [engine("e", 0)]
    scheduler.engines(serving, now_s=0.0)
    (lease,) = beat(scheduler, capacity=1)
    assert outcome(submit(scheduler, lease)) == "accepted"  # ... and this could not be written:
    stored = make().lease_table
    stored.grant(actor="a", now_s=0.0, engine_version=0)
    scheduler.pause(stored, num_failures={})
    events: list[Callable[[], Decision]] = [
        lambda: submit(scheduler, lease),
        lambda: scheduler.tick(serving, now_s=1e7),
        lambda: scheduler.engines(serving, now_s=0.0),
        lambda: scheduler.goodbye(Goodbye(actor="a", incarnation="1"), now_s=0.0),
    ]
    for event in events:
        assert event() == Decision()
    message = Heartbeat(actor="a", incarnation="1", capacity=3, held=[], counters={})
    alive = scheduler.heartbeat(b"a", message, now_s=1e7)
    assert [type(send.message) for send in alive.sends] == [RunStatus], "the actor hears that it is not forgotten"
    assert alive.records == []
    scheduler.resume()
    again = submit(scheduler, lease, now_s=1e7)
    assert outcome(again) == "accepted"
    assert len([record for record in again.records if isinstance(record, Arrived)]) == 1
    assert len(leases(again)) == 3


def test_drain_is_said_once_and_at_each_heartbeat() -> None:
    scheduler = make()
    beat(scheduler, "a")
    assert [send.message for send in scheduler.drain("done").sends] == [Drain(reason="done")]
    assert scheduler.engines([engine("e", 0)], now_s=0.0) == Decision()
    message = Heartbeat(actor="b", incarnation="1", capacity=1, held=[], counters={})
    assert [send.message for send in scheduler.heartbeat(b"b", message, now_s=0.0).sends] == [Drain(reason="done")]
