"""The lease rule under random timings: the bound, the order and the counts hold, and the run always ends."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.ledger import Entry, LeaseRecord, Ledger, State

MAX_EVENTS = 200_000


class World:
    """A learner, its engines and its actors, with every delay drawn from a seed.

    Engines lag behind the learner's version and sample at whatever version they have when a token is made; actors
    finish in any order, late, twice or never; groups are refused or skipped; the learner is killed and restored from
    what a store would hold. After each event the promises are checked.
    """

    def __init__(self, *, seed: int, groups_per_batch: int, staleness_bound: int, num_steps: int, chaos: float) -> None:
        self.random = random.Random(seed)
        self.chaos = chaos
        self.shape = {
            "groups_per_batch": groups_per_batch,
            "staleness_bound": staleness_bound,
            "num_steps": num_steps,
        }
        self.ledger = Ledger(**self.shape)
        self.num_events = 0
        self.num_restarts = 0
        self.engines = [0] * self.random.randint(1, 3)
        self.capacity = {f"actor-{i}": self.random.randint(1, 2 * groups_per_batch) for i in range(3)}
        self.at_work: dict[int, LeaseRecord] = {}
        """Groups that an actor works on, whether or not the ledger still knows the lease."""
        self.oldest: dict[int, int] = {}
        """lease → the oldest version among its tokens."""
        self.group_age_of: dict[int, int] = {}
        """cursor → the oldest version of its accepted group."""
        self.trained: list[int] = []

    def run(self) -> None:
        while self.ledger.step < self.ledger.num_steps:
            self.num_events += 1
            assert self.num_events < MAX_EVENTS, f"no progress: {self.ledger.counts()}"
            self.event()
            if self.num_events < 1_000 or self.num_events % 20 == 0:  # looks at every entry, of which there are many
                self.check()
        assert len(self.trained) == self.ledger.num_steps * self.ledger.groups_per_batch

    def event(self) -> None:
        kind = self.random.random()
        if kind < 0.4:
            self.grant()
        elif kind < 0.7:
            self.complete()
        elif kind < 0.8:
            self.catch_up()
        elif kind < 0.9 or self.random.random() > self.chaos:
            self.train()
        else:
            self.random.choice([self.expire, self.lose_actor, self.restart, self.submit_again])()

    def grant(self) -> None:
        actor = self.random.choice(list(self.capacity))
        if len(self.ledger.outstanding(actor)) >= self.capacity[actor]:
            return
        version = min(self.engines)
        lease = self.ledger.grant(actor=actor, now_s=0.0, engine_version=version)
        if lease is not None:
            assert lease.lease_id not in self.at_work
            assert self.ledger.min_version(lease.slot) <= version
            self.at_work[lease.lease_id] = lease
            self.oldest[lease.lease_id] = self.random.choice(self.engines)

    def complete(self) -> None:
        """One attempt ends: a group, a refusal, a skip; or silence, and the lease expires some time."""
        if not self.at_work:
            return
        lease = self.at_work.pop(self.random.choice(list(self.at_work)))
        self.submit(lease)

    def submit(self, lease: LeaseRecord) -> None:
        decided = self.ledger.undecided(lease.cursor) is None
        draw = self.random.random() / max(self.chaos, 1e-9)
        ids = {"lease_id": lease.lease_id, "cursor": lease.cursor}
        if draw < 0.1 and not decided:
            self.ledger.reissue(**ids)
        elif draw < 0.2:
            assert self.ledger.skip(**ids) is not decided
        else:
            accepted = self.ledger.accept(**ids)
            assert accepted is not decided
            if accepted:
                self.group_age_of[lease.cursor] = self.oldest[lease.lease_id]
        assert lease.lease_id not in self.ledger.leases or decided

    def submit_again(self) -> None:
        """An acknowledgement was lost: an attempt on a decided question comes again, and changes nothing."""
        cursor = self.random.randrange(self.ledger.next_cursor) if self.ledger.next_cursor else 0
        if self.ledger.undecided(cursor) is None:
            before = replace(entry) if (entry := self.ledger.entries.get(cursor)) else None
            assert not self.ledger.accept(lease_id=0, cursor=cursor)
            assert not self.ledger.skip(lease_id=0, cursor=cursor)
            self.ledger.reissue(lease_id=0, cursor=cursor)
            assert self.ledger.entries.get(cursor) == before

    def catch_up(self) -> None:
        """An engine commits some version between its own and the learner's."""
        i = self.random.randrange(len(self.engines))
        self.engines[i] = self.random.randint(self.engines[i], self.ledger.step)

    def train(self) -> None:
        batch = self.ledger.ready_batch()
        if batch is None:
            return
        step, size = self.ledger.step, self.ledger.groups_per_batch
        assert [self.ledger.entries[c].slot for c in batch] == list(range(step * size, (step + 1) * size))
        for cursor in batch:
            assert step - self.group_age_of[cursor] <= self.ledger.staleness_bound
        self.ledger.finish(batch)
        self.trained += batch

    def expire(self) -> None:
        """A lease runs out although its actor still works on it; the group comes late."""
        if self.ledger.leases:
            self.ledger.expire(self.random.choice(list(self.ledger.leases)))

    def lose_actor(self) -> None:
        """Killed: its leases expire, its work is gone."""
        actor = self.random.choice(list(self.capacity))
        for lease in self.ledger.outstanding(actor):
            self.ledger.expire(lease.lease_id)
        self.at_work = {i: lease for i, lease in self.at_work.items() if lease.actor != actor}

    def restart(self) -> None:
        """The learner is killed, and restored from what the store holds; actors go on."""
        self.num_restarts += 1
        entries = [replace(entry) for entry in self.ledger.entries.values()]
        self.random.shuffle(entries)
        old = self.ledger
        self.ledger = Ledger.restore(
            **self.shape,
            step=old.step,
            entries=entries,
            leases=list(old.leases.values()),
            next_lease_id=old.next_lease_id,
            next_cursor=old.next_cursor,
        )
        assert self.ledger.counts() == old.counts()
        assert self.ledger.ready_batch() == old.ready_batch()

    def check(self) -> None:
        ledger = self.ledger
        counts = ledger.counts()
        assert sum(counts.values()) == ledger.next_cursor
        assert counts[State.TRAINED] == len(self.trained) == ledger.step * ledger.groups_per_batch
        slots = Counter(entry.slot for entry in ledger.entries.values())
        assert not slots or slots.most_common(1)[0][1] == 1
        running = {entry.cursor for entry in ledger.entries.values() if entry.state is State.RUNNING}
        assert running <= {lease.cursor for lease in ledger.leases.values()}, "a running question without a lease"
        assert len(slots) <= (ledger.staleness_bound + 1) * ledger.groups_per_batch


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    groups_per_batch=st.integers(1, 6),
    staleness_bound=st.integers(0, 3),
    num_steps=st.integers(1, 12),
    chaos=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_promises_hold_under_random_timings(
    seed: int, groups_per_batch: int, staleness_bound: int, num_steps: int, chaos: float
) -> None:
    world = World(
        seed=seed,
        groups_per_batch=groups_per_batch,
        staleness_bound=staleness_bound,
        num_steps=num_steps,
        chaos=chaos,
    )
    world.run()
    assert len(set(world.trained)) == len(world.trained)


@pytest.mark.parametrize("seed", range(3))
def test_a_long_run(seed: int) -> None:
    """Thousands of events each, with everything that can go wrong; ages reach the bound and never pass it."""
    world = World(seed=seed, groups_per_batch=8, staleness_bound=2, num_steps=250, chaos=1.0)
    world.run()
    ages = [i // 8 - world.group_age_of[cursor] for i, cursor in enumerate(world.trained)]
    assert max(ages) == 2
    assert world.num_restarts > 20
    assert world.num_events > 9_000


def make(*, groups_per_batch: int = 2, staleness_bound: int = 1, num_steps: int = 4) -> Ledger:
    return Ledger(groups_per_batch=groups_per_batch, staleness_bound=staleness_bound, num_steps=num_steps)


def grant_all(ledger: Ledger, version: int) -> list[LeaseRecord]:
    leases = []
    while (lease := ledger.grant(actor="a", now_s=0.0, engine_version=version)) is not None:
        leases.append(lease)
    return leases


def accept(ledger: Ledger, lease: LeaseRecord) -> bool:
    return ledger.accept(lease_id=lease.lease_id, cursor=lease.cursor)


def test_the_bound_limits_what_is_leased() -> None:
    ledger = make()
    assert [lease.slot for lease in grant_all(ledger, 0)] == [0, 1, 2, 3]
    assert [lease.slot for lease in grant_all(ledger, 1)] == [4, 5]
    assert [ledger.min_version(slot) for slot in (0, 2, 4, 6)] == [0, 0, 1, 2]


def test_synchronous_mode_leases_one_batch() -> None:
    ledger = make(staleness_bound=0)
    first = grant_all(ledger, 0)
    assert len(first) == 2
    assert all(accept(ledger, lease) for lease in first)
    assert grant_all(ledger, 0) == []
    assert ledger.ready_batch() == [0, 1]
    ledger.finish([0, 1])
    assert grant_all(ledger, 0) == []
    assert len(grant_all(ledger, 1)) == 2


def test_nothing_is_leased_beyond_the_last_step() -> None:
    ledger = make(num_steps=1)
    assert [lease.slot for lease in grant_all(ledger, 100)] == [0, 1]


def test_a_batch_waits_for_its_lowest_slot() -> None:
    ledger = make()
    slow, *rest = grant_all(ledger, 0)
    assert all(accept(ledger, lease) for lease in rest)
    assert ledger.ready_batch() is None
    assert accept(ledger, slow)
    assert ledger.ready_batch() == [0, 1]


def test_an_expired_question_is_issued_again_before_a_new_one() -> None:
    ledger = make()
    first = grant_all(ledger, 0)[0]
    assert ledger.expire(first.lease_id) == first
    assert ledger.expire(first.lease_id) is None
    again = ledger.grant(actor="b", now_s=1.0, engine_version=0)
    assert again == LeaseRecord(5, first.cursor, first.slot, 1, "b", 1.0)
    assert ledger.num_expired == 1


def test_the_first_attempt_to_arrive_wins() -> None:
    ledger = make()
    first = grant_all(ledger, 0)[0]
    ledger.expire(first.lease_id)
    again = ledger.grant(actor="b", now_s=0.0, engine_version=0)
    assert again is not None
    assert accept(ledger, first)
    assert not accept(ledger, again)
    assert again.lease_id not in ledger.leases
    assert ledger.entries[first.cursor].state is State.BUFFERED


def test_an_old_refusal_does_not_stop_a_newer_attempt() -> None:
    ledger = make()
    first = grant_all(ledger, 0)[0]
    ledger.expire(first.lease_id)
    again = ledger.grant(actor="b", now_s=0.0, engine_version=0)
    assert again is not None
    ledger.reissue(lease_id=first.lease_id, cursor=first.cursor)
    assert ledger.entries[first.cursor] == Entry(first.cursor, first.slot, 1, State.RUNNING, first.slot)


def test_a_skipped_slot_goes_to_the_next_question() -> None:
    ledger = make()
    leases = grant_all(ledger, 0)
    assert ledger.skip(lease_id=leases[1].lease_id, cursor=leases[1].cursor)
    replacement = ledger.grant(actor="a", now_s=0.0, engine_version=0)
    assert replacement is not None
    assert (replacement.slot, replacement.cursor, replacement.attempt) == (1, 4, 0)
    assert not accept(ledger, leases[1])


def test_restore_issues_again_what_no_lease_runs() -> None:
    entries = [
        Entry(0, 0, 0, State.BUFFERED, 0),
        Entry(2, 2, 0, State.RUNNING, 2),
        Entry(3, 3, 1, State.RUNNING, 3),
    ]
    ledger = Ledger.restore(
        groups_per_batch=2,
        staleness_bound=1,
        num_steps=4,
        step=0,
        entries=entries,
        leases=[LeaseRecord(5, 3, 3, 1, "a", 0.0)],
        next_lease_id=9,
        next_cursor=5,
    )
    assert [(lease.lease_id, lease.slot, lease.cursor, lease.attempt) for lease in grant_all(ledger, 0)] == [
        (9, 1, 5, 0),
        (10, 2, 2, 1),
    ]
