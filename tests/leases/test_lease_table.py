"""The lease rule under random timings: the bound, the order and the counts hold, and every run ends."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.leases.entries import Entry, LeaseRecord, State
from learner.leases.lease_table import LeaseTable

MAX_EVENTS = 200_000


class World:
    """A learner, its engines and its actors, with every delay drawn from a seed.

    Engines lag behind the learner's version and sample with their current version; actors finish in any order, late,
    twice or never; groups are refused or skipped; the learner is killed and restored from the records that a store
    would have. The invariants are checked after each event.
    """

    def __init__(self, *, seed: int, groups_per_batch: int, staleness_bound: int, num_steps: int, chaos: float) -> None:
        self.random = random.Random(seed)
        self.chaos = chaos
        self.shape = {
            "groups_per_batch": groups_per_batch,
            "staleness_bound": staleness_bound,
            "num_steps": num_steps,
        }
        self.lease_table = LeaseTable(**self.shape)
        self.num_events = 0
        self.num_restarts = 0
        self.engines = [0] * self.random.randint(1, 3)
        self.capacity = {f"actor-{i}": self.random.randint(1, 2 * groups_per_batch) for i in range(3)}
        self.at_work: dict[int, LeaseRecord] = {}
        """Leases that an actor works on, even if they have expired."""
        self.oldest: dict[int, int] = {}
        """lease_id → the oldest version of its tokens."""
        self.group_age_of: dict[int, int] = {}
        """cursor → the oldest version of its accepted group."""
        self.trained: list[int] = []

    def run(self) -> None:
        while self.lease_table.step < self.lease_table.num_steps:
            self.num_events += 1
            assert self.num_events < MAX_EVENTS, f"no progress: {self.lease_table.counts()}"
            self.event()
            if self.num_events < 1_000 or self.num_events % 20 == 0:  # slow: it reads every entry
                self.check()
        assert len(self.trained) == self.lease_table.num_steps * self.lease_table.groups_per_batch

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
        if len(self.lease_table.outstanding(actor)) >= self.capacity[actor]:
            return
        version = min(self.engines)
        if self.lease_table.can_grant(engine_version=version):
            lease = self.lease_table.grant(actor=actor, now_s=0.0)
            assert lease.lease_id not in self.at_work
            assert self.lease_table.min_version(lease.slot) <= version
            self.at_work[lease.lease_id] = lease
            self.oldest[lease.lease_id] = self.random.choice(self.engines)

    def complete(self) -> None:
        """One attempt ends: its group is accepted, refused or skipped."""
        if not self.at_work:
            return
        lease = self.at_work.pop(self.random.choice(list(self.at_work)))
        self.submit(lease)

    def submit(self, lease: LeaseRecord) -> None:
        decided = self.lease_table.undecided(lease.cursor) is None
        draw = self.random.random() / max(self.chaos, 1e-9)
        ids = {"lease_id": lease.lease_id, "cursor": lease.cursor}
        before = self.lease_table.counts()
        if draw < 0.1 and not decided:
            self.lease_table.reissue(**ids)
        elif draw < 0.2:
            self.lease_table.skip(**ids)
            assert self.lease_table.counts()[State.SKIPPED] == before[State.SKIPPED] + (not decided)
        else:
            self.lease_table.accept(**ids)
            assert self.lease_table.counts()[State.BUFFERED] == before[State.BUFFERED] + (not decided)
            if not decided:
                self.group_age_of[lease.cursor] = self.oldest[lease.lease_id]
        assert lease.lease_id not in self.lease_table.leases or decided

    def submit_again(self) -> None:
        """An acknowledgement was lost: an attempt at a decided question arrives again and changes nothing."""
        cursor = self.random.randrange(self.lease_table.next_cursor) if self.lease_table.next_cursor else 0
        if self.lease_table.undecided(cursor) is None:
            before = replace(entry) if (entry := self.lease_table.entries.get(cursor)) else None
            counts = self.lease_table.counts()
            self.lease_table.accept(lease_id=0, cursor=cursor)
            self.lease_table.skip(lease_id=0, cursor=cursor)
            self.lease_table.reissue(lease_id=0, cursor=cursor)
            assert self.lease_table.entries.get(cursor) == before
            assert self.lease_table.counts() == counts

    def catch_up(self) -> None:
        """An engine commits some version between its own and the learner's."""
        i = self.random.randrange(len(self.engines))
        self.engines[i] = self.random.randint(self.engines[i], self.lease_table.step)

    def train(self) -> None:
        batch = self.lease_table.ready_batch()
        if batch is None:
            return
        step, size = self.lease_table.step, self.lease_table.groups_per_batch
        assert [self.lease_table.entries[c].slot for c in batch] == list(range(step * size, (step + 1) * size))
        for cursor in batch:
            assert step - self.group_age_of[cursor] <= self.lease_table.staleness_bound
        self.lease_table.finish(batch)
        self.trained += batch

    def expire(self) -> None:
        """Expires a lease although its actor still works on it, so that its group arrives late."""
        if self.lease_table.leases:
            self.lease_table.expire(self.random.choice(list(self.lease_table.leases)))

    def lose_actor(self) -> None:
        """An actor is killed: its leases expire, its work is lost."""
        actor = self.random.choice(list(self.capacity))
        for lease in self.lease_table.outstanding(actor):
            self.lease_table.expire(lease.lease_id)
        self.at_work = {i: lease for i, lease in self.at_work.items() if lease.actor != actor}

    def restart(self) -> None:
        """The learner is killed and restored from the records of the store; actors continue."""
        self.num_restarts += 1
        entries = [replace(entry) for entry in self.lease_table.entries.values()]
        self.random.shuffle(entries)
        old = self.lease_table
        self.lease_table = LeaseTable.restore(
            **self.shape,
            step=old.step,
            entries=entries,
            leases=list(old.leases.values()),
            next_lease_id=old.next_lease_id,
            next_cursor=old.next_cursor,
        )
        assert self.lease_table.counts() == old.counts()
        assert self.lease_table.ready_batch() == old.ready_batch()

    def check(self) -> None:
        lease_table = self.lease_table
        counts = lease_table.counts()
        assert sum(counts.values()) == lease_table.next_cursor
        assert counts[State.TRAINED] == len(self.trained) == lease_table.step * lease_table.groups_per_batch
        slots = Counter(entry.slot for entry in lease_table.entries.values())
        assert not slots or slots.most_common(1)[0][1] == 1
        running = {entry.cursor for entry in lease_table.entries.values() if entry.state is State.RUNNING}
        assert running <= {lease.cursor for lease in lease_table.leases.values()}, "a running question without a lease"
        assert len(slots) <= (lease_table.staleness_bound + 1) * lease_table.groups_per_batch


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    groups_per_batch=st.integers(1, 6),
    staleness_bound=st.integers(0, 3),
    num_steps=st.integers(1, 12),
    chaos=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_invariants_hold_under_random_timings(
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
    """Thousands of events with every fault; ages reach the bound and never exceed it."""
    world = World(seed=seed, groups_per_batch=8, staleness_bound=2, num_steps=250, chaos=1.0)
    world.run()
    ages = [i // 8 - world.group_age_of[cursor] for i, cursor in enumerate(world.trained)]
    assert max(ages) == 2
    assert world.num_restarts > 20
    assert world.num_events > 9_000


def make(*, groups_per_batch: int = 2, staleness_bound: int = 1, num_steps: int = 4) -> LeaseTable:
    return LeaseTable(groups_per_batch=groups_per_batch, staleness_bound=staleness_bound, num_steps=num_steps)


def grant_all(lease_table: LeaseTable, version: int) -> list[LeaseRecord]:
    leases = []
    while lease_table.can_grant(engine_version=version):
        leases.append(lease_table.grant(actor="a", now_s=0.0))
    return leases


def accept(lease_table: LeaseTable, lease: LeaseRecord) -> bool:
    """Accepts a group of `lease`. Returns True if its question was undecided."""
    was_undecided = lease_table.undecided(lease.cursor) is not None
    lease_table.accept(lease_id=lease.lease_id, cursor=lease.cursor)
    return was_undecided


def test_the_staleness_bound_limits_the_slots_that_are_leased() -> None:
    lease_table = make()
    assert [lease.slot for lease in grant_all(lease_table, 0)] == [0, 1, 2, 3]
    assert [lease.slot for lease in grant_all(lease_table, 1)] == [4, 5]
    assert [lease_table.min_version(slot) for slot in (0, 2, 4, 6)] == [0, 0, 1, 2]


def test_synchronous_mode_leases_one_batch() -> None:
    lease_table = make(staleness_bound=0)
    first = grant_all(lease_table, 0)
    assert len(first) == 2
    assert all(accept(lease_table, lease) for lease in first)
    assert grant_all(lease_table, 0) == []
    assert lease_table.ready_batch() == [0, 1]
    lease_table.finish([0, 1])
    assert grant_all(lease_table, 0) == []
    assert len(grant_all(lease_table, 1)) == 2


def test_nothing_is_leased_beyond_the_last_step() -> None:
    lease_table = make(num_steps=1)
    assert [lease.slot for lease in grant_all(lease_table, 100)] == [0, 1]


def test_a_batch_waits_for_its_lowest_slot() -> None:
    lease_table = make()
    slow, *rest = grant_all(lease_table, 0)
    assert all(accept(lease_table, lease) for lease in rest)
    assert lease_table.ready_batch() is None
    assert accept(lease_table, slow)
    assert lease_table.ready_batch() == [0, 1]


def test_an_expired_question_is_issued_again_before_a_new_one() -> None:
    lease_table = make()
    first = grant_all(lease_table, 0)[0]
    assert lease_table.expire(first.lease_id) == first
    assert lease_table.expire(first.lease_id) is None
    again = lease_table.grant(actor="b", now_s=1.0)
    assert again == LeaseRecord(5, first.cursor, first.slot, 1, "b", 1.0)
    assert lease_table.num_expired == 1


def test_the_first_attempt_to_arrive_wins() -> None:
    lease_table = make()
    first = grant_all(lease_table, 0)[0]
    lease_table.expire(first.lease_id)
    again = lease_table.grant(actor="b", now_s=0.0)
    assert accept(lease_table, first)
    assert not accept(lease_table, again)
    assert again.lease_id not in lease_table.leases
    assert lease_table.entries[first.cursor].state is State.BUFFERED


def test_a_refusal_of_an_old_attempt_keeps_the_newer_one_running() -> None:
    lease_table = make()
    first = grant_all(lease_table, 0)[0]
    lease_table.expire(first.lease_id)
    lease_table.grant(actor="b", now_s=0.0)
    lease_table.reissue(lease_id=first.lease_id, cursor=first.cursor)
    assert lease_table.entries[first.cursor] == Entry(first.cursor, first.slot, 1, State.RUNNING, first.slot)


def test_a_skipped_slot_goes_to_the_next_question() -> None:
    lease_table = make()
    leases = grant_all(lease_table, 0)
    lease_table.skip(lease_id=leases[1].lease_id, cursor=leases[1].cursor)
    replacement = lease_table.grant(actor="a", now_s=0.0)
    assert (replacement.slot, replacement.cursor, replacement.attempt) == (1, 4, 0)
    assert not accept(lease_table, leases[1])


def test_restore_issues_running_questions_without_a_lease_again() -> None:
    entries = [
        Entry(0, 0, 0, State.BUFFERED, 0),
        Entry(2, 2, 0, State.RUNNING, 2),
        Entry(3, 3, 1, State.RUNNING, 3),
    ]
    lease_table = LeaseTable.restore(
        groups_per_batch=2,
        staleness_bound=1,
        num_steps=4,
        step=0,
        entries=entries,
        leases=[LeaseRecord(5, 3, 3, 1, "a", 0.0)],
        next_lease_id=9,
        next_cursor=5,
    )
    assert [(lease.lease_id, lease.slot, lease.cursor, lease.attempt) for lease in grant_all(lease_table, 0)] == [
        (9, 1, 5, 0),
        (10, 2, 2, 1),
    ]
