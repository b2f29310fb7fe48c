"""The lease table: which actor runs which question, and in which batch it will be trained. Pure: no clock, no IO.

It enforces the staleness bound. Batches are made of slots. Slot n is trained in batch n // B, which takes the learner
from step n // B to the next one. A lease takes the lowest open slot, and is granted only while

    slot < (eta + 1 + s) * B        s: the lowest step committed on the serving engines

so its tokens have a version >= s >= batch - eta, independent of timing. Batches are trained in slot order. If a group
is skipped, its slot is open again for a later question. If a lease expires, its question is leased again in the same
slot.

    open slot --grant--> running --accept--> buffered --finish--> trained
        ^                 |   ^
        |                 |   +--grant-- waiting <--expire, reissue-- running       (the next attempt)
        +--skip-----------+              (zero variance, or too many failures: another question takes the slot)

If the current batch waits only for stragglers, they may be overtaken: each swaps slots with a buffered group of a later
batch. That group is trained earlier, so its tokens are younger when trained. The straggler is trained
later, so its tokens may exceed the bound; such tokens are masked.

The table contains only questions that are neither trained nor skipped, so its size does not grow with the run's length.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable

from learner.leases.entries import Entry, LeaseRecord, State


class LeaseTable:
    """The lease rule as a state machine. Every method that changes it is one event."""

    def __init__(self, *, groups_per_batch: int, staleness_bound: int, num_steps: int) -> None:
        self.groups_per_batch = groups_per_batch
        self.staleness_bound = staleness_bound
        self.num_steps = num_steps
        self.step = 0
        self.entries: dict[int, Entry] = {}
        """The questions that are running, waiting or buffered, by cursor."""
        self.leases: dict[int, LeaseRecord] = {}
        self.next_lease_id = 1
        self.next_cursor = 0
        self.num_expired = 0
        self.num_overtaken = 0
        self._next_slot = 0
        self._open_slots: list[int] = []
        self._waiting: list[tuple[int, int]] = []
        self._buffered: dict[int, int] = {}
        self._leases_of: defaultdict[str, dict[int, LeaseRecord]] = defaultdict(dict)

    @classmethod
    def restore(
        cls,
        *,
        groups_per_batch: int,
        staleness_bound: int,
        num_steps: int,
        step: int,
        entries: Iterable[Entry],
        leases: Iterable[LeaseRecord],
        next_lease_id: int,
        next_cursor: int,
    ) -> LeaseTable:
        """Rebuilds a lease table from the stored open entries. Running leases stay valid until they expire."""
        lease_table = cls(groups_per_batch=groups_per_batch, staleness_bound=staleness_bound, num_steps=num_steps)
        lease_table.step = step
        lease_table.next_lease_id = next_lease_id
        lease_table.next_cursor = next_cursor
        lease_table.entries = {entry.cursor: entry for entry in entries}
        for lease in leases:
            lease_table._hold(lease)
        taken = {entry.slot for entry in lease_table.entries.values()}
        first = step * groups_per_batch
        lease_table._next_slot = max(max(taken, default=-1) + 1, first)
        lease_table._open_slots = sorted(set(range(first, lease_table._next_slot)) - taken)
        leased = {lease.cursor for lease in lease_table.leases.values()}
        for entry in lease_table.entries.values():
            if entry.state is State.RUNNING and entry.cursor not in leased:
                entry.state = State.WAITING
            if entry.state is State.WAITING:
                heapq.heappush(lease_table._waiting, (entry.slot, entry.cursor))
            elif entry.state is State.BUFFERED:
                lease_table._buffered[entry.slot] = entry.cursor
        return lease_table

    def limit(self, engine_version: int) -> int:
        """The lease rule: only slots below the returned one may be leased. `engine_version`: s of the rule."""
        return self.groups_per_batch * min(self.staleness_bound + 1 + engine_version, self.num_steps)

    def min_version(self, slot: int) -> int:
        """The oldest version that tokens of a group in this slot may have."""
        return max(0, slot // self.groups_per_batch - self.staleness_bound)

    def can_grant(self, *, engine_version: int) -> bool:
        """Whether the staleness bound and the number of steps allow another lease."""
        return self._next_place()[0] < self.limit(engine_version)

    def grant(self, *, actor: str, now_s: float) -> LeaseRecord:
        """Grants the next lease. Call it only if `can_grant` is true: it does not check the bound again."""
        slot, cursor = self._next_place()
        if cursor is not None:
            heapq.heappop(self._waiting)
            entry = self.entries[cursor]
            entry.attempt += 1
            entry.state = State.RUNNING
        else:
            if self._open_slots and slot == self._open_slots[0]:
                heapq.heappop(self._open_slots)
            else:
                self._next_slot += 1
            entry = Entry(cursor=self.next_cursor, slot=slot, attempt=0, state=State.RUNNING, first_slot=slot)
            self.next_cursor += 1
            self.entries[entry.cursor] = entry
        lease = LeaseRecord(self.next_lease_id, entry.cursor, slot, entry.attempt, actor, now_s)
        self.next_lease_id += 1
        self._hold(lease)
        return lease

    def expire(self, lease_id: int) -> LeaseRecord | None:
        """Ends a lease whose actor is gone or lost it. The question waits, unless it has a group or a newer attempt.

        Returns the lease; None if it had already ended.
        """
        lease = self.drop(lease_id)
        if lease is not None:
            self.num_expired += 1
            self._wait_again(lease)
        return lease

    def accept(self, *, lease_id: int, cursor: int) -> None:
        """Buffers a question whose valid group has arrived. If it needs no group any more: only ends the lease.

        A group of an expired lease is accepted too: every attempt has the same slot, hence the same bound.
        """
        self.drop(lease_id)
        entry = self.undecided(cursor)
        if entry is None:
            return
        self._leave_waiting(entry)
        entry.state = State.BUFFERED
        self._buffered[entry.slot] = cursor

    def reissue(self, *, lease_id: int, cursor: int) -> None:
        """Ends the lease of an attempt that failed, was refused or was given back. The question waits, unless it has a
        newer attempt."""
        lease = self.drop(lease_id)
        if lease is not None and lease.cursor == cursor:
            self._wait_again(lease)

    def skip(self, *, lease_id: int, cursor: int) -> None:
        """Removes the question and opens its slot. If the question needs no group any more: only ends the lease."""
        self.drop(lease_id)
        entry = self.undecided(cursor)
        if entry is None:
            return
        self._leave_waiting(entry)
        entry.state = State.SKIPPED
        heapq.heappush(self._open_slots, entry.slot)
        entry.slot = -1
        del self.entries[cursor]

    def drop(self, lease_id: int) -> LeaseRecord | None:
        """Ends the lease without changing the state of its question. Returns it; None if it had already ended."""
        lease = self.leases.pop(lease_id, None)
        if lease is not None:
            of_actor = self._leases_of[lease.actor]
            del of_actor[lease_id]
            if not of_actor:
                del self._leases_of[lease.actor]
        return lease

    def overtake(self, *, granted_before_s: float) -> list[tuple[Entry, Entry]]:
        """Completes the current batch: its stragglers swap slots with buffered groups of later batches.

        A straggler is a running question whose lease was granted before `granted_before_s`. Returns the pairs
        (straggler, group) that swapped slots. Changes nothing if a missing slot of the batch does not belong to a
        straggler, or if there are fewer buffered groups of later batches than missing slots.
        """
        slots = self._current_slots()
        missing = [slot for slot in slots if slot not in self._buffered]
        later = sorted(slot for slot in self._buffered if slot >= slots.stop)
        if not missing or len(later) < len(missing):
            return []
        late = {(lease.cursor, lease.attempt) for lease in self.leases.values() if lease.granted_s < granted_before_s}
        stragglers = {
            entry.slot: entry
            for entry in self.entries.values()
            if entry.state is State.RUNNING and (entry.cursor, entry.attempt) in late
        }
        if any(slot not in stragglers for slot in missing):
            return []
        pairs = []
        for slot, later_slot in zip(missing, later, strict=False):
            straggler, group = stragglers[slot], self.entries[self._buffered.pop(later_slot)]
            straggler.slot, group.slot = later_slot, slot
            self._buffered[slot] = group.cursor
            pairs.append((straggler, group))
        self.num_overtaken += len(pairs)
        return pairs

    def ready_batch(self) -> list[int] | None:
        """The cursors of the current batch in slot order; None if a slot has no group yet."""
        slots = self._current_slots()
        if any(slot not in self._buffered for slot in slots):
            return None
        return [self._buffered[slot] for slot in slots]

    def missing(self) -> tuple[int, LeaseRecord | None]:
        """(number of slots of the current batch without a group, the oldest running lease of these slots)."""
        missing = set(self._current_slots()) - self._buffered.keys()
        leases = [
            lease
            for lease in self.leases.values()
            if (entry := self.entries.get(lease.cursor)) is not None and entry.slot in missing
        ]
        return len(missing), min(leases, key=lambda lease: lease.granted_s, default=None)

    def finish(self, cursors: Iterable[int]) -> None:
        """Ends the current step, which was trained on the questions `cursors`."""
        for cursor in cursors:
            entry = self.entries.pop(cursor)
            entry.state = State.TRAINED
            del self._buffered[entry.slot]
        self.step += 1

    def undecided(self, cursor: int) -> Entry | None:
        """The entry of the question if it still needs a group (running or waiting), else None."""
        entry = self.entries.get(cursor)
        return entry if entry is not None and entry.state is not State.BUFFERED else None

    def outstanding(self, actor: str) -> list[LeaseRecord]:
        """The actor's running leases."""
        return list(self._leases_of[actor].values()) if actor in self._leases_of else []

    def counts(self) -> dict[State, int]:
        """State → number of questions of the whole run in that state."""
        counts = dict.fromkeys(State, 0)
        for entry in self.entries.values():
            counts[entry.state] += 1
        counts[State.TRAINED] = self.step * self.groups_per_batch
        counts[State.SKIPPED] = self.next_cursor - sum(counts.values())
        return counts

    def _current_slots(self) -> range:
        first = self.step * self.groups_per_batch
        return range(first, first + self.groups_per_batch)

    def _next_place(self) -> tuple[int, int | None]:
        """(slot of the next lease, cursor of the waiting question in it; None: a new question)."""
        fresh = self._open_slots[0] if self._open_slots else self._next_slot
        if self._waiting and self._waiting[0][0] < fresh:
            return self._waiting[0]
        return fresh, None

    def _hold(self, lease: LeaseRecord) -> None:
        self.leases[lease.lease_id] = lease
        self._leases_of[lease.actor][lease.lease_id] = lease

    def _wait_again(self, lease: LeaseRecord) -> None:
        entry = self.entries.get(lease.cursor)
        if entry is not None and entry.state is State.RUNNING and entry.attempt == lease.attempt:
            entry.state = State.WAITING
            heapq.heappush(self._waiting, (entry.slot, entry.cursor))

    def _leave_waiting(self, entry: Entry) -> None:
        if entry.state is State.WAITING:
            self._waiting.remove((entry.slot, entry.cursor))
            heapq.heapify(self._waiting)
