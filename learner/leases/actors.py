"""The connected actors, and a priority queue that yields the one with the most free slots. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from learner.leases.entries import LeaseRecord
from protocol.messages import Heartbeat

_MIN_COMPACTED = 64


@dataclass(slots=True)
class Actor:
    """A connected actor.

    capacity    its trajectory slots in total, from its last heartbeat
    free_slots  its free trajectory slots, from its last heartbeat
    held        ids of the running leases that this heartbeat listed: `free_slots` accounts for them
    seen_s      time of its last heartbeat, later if the learner's event loop stalled
    counters    its own metrics, from its last heartbeat
    """

    peer: bytes
    incarnation: str
    capacity: int = 0
    free_slots: int = 0
    held: frozenset[int] = frozenset()
    seen_s: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)
    queued_slots: int = 0
    """Free slots in the actor's current heap entry; 0: it has none. Heap entries with another number are stale."""

    def update(self, peer: bytes, message: Heartbeat, *, running: Iterable[LeaseRecord], now_s: float) -> None:
        """Takes over the content of a heartbeat. `running`: the actor's leases.

        Of `message.held`, only ids of running leases are kept, so their number is bounded.
        """
        held = set(message.held)
        self.peer, self.seen_s = peer, now_s
        self.capacity = message.capacity
        self.free_slots = 0 if message.draining else min(message.free_slots, message.capacity)
        self.held = frozenset(lease.lease_id for lease in running if lease.lease_id in held)
        self.counters = dict(message.counters)

    def unlisted(self, running: Iterable[LeaseRecord]) -> list[LeaseRecord]:
        """The running leases that the last heartbeat did not list: the actor may not have received them yet."""
        return [lease for lease in running if lease.lease_id not in self.held]


class Actors(dict[str, Actor]):
    """Actors by name. `queue` and `take` maintain a priority queue of the actors with free slots."""

    def __init__(self, *, max_actors: int = 2_048) -> None:
        super().__init__()
        self._max_actors = max_actors
        self._heap: list[tuple[int, str]] = []

    @property
    def num_queued(self) -> int:
        """Entries of the queue, stale ones included; fewer than 2 for each actor, and _MIN_COMPACTED."""
        return len(self._heap)

    def has_room(self) -> bool:
        """Whether one more actor may connect."""
        return len(self) < self._max_actors

    def longest_silent(self, *, silent_since_s: float) -> str | None:
        """The actor whose last heartbeat is the oldest, and older than `silent_since_s`; None if there is none."""
        name = min(self, key=lambda name: self[name].seen_s, default=None)
        return name if name is not None and self[name].seen_s < silent_since_s else None

    def queue(self, name: str, *, free_slots: int) -> None:
        """Updates the actor's place in the queue. `free_slots` <= 0: it has none.

        Does nothing if the actor is not connected or the number has not changed.
        """
        actor = self.get(name)
        if actor is None:
            return
        free = max(0, free_slots)
        if free != actor.queued_slots:
            actor.queued_slots = free
            if free:
                heapq.heappush(self._heap, (-free, name))
                self._compact()

    def _compact(self) -> None:
        """Removes stale entries if they are the majority: actors that report other numbers leave one each time."""
        if len(self._heap) > max(_MIN_COMPACTED, 2 * len(self)):
            self._heap = [(-actor.queued_slots, name) for name, actor in self.items() if actor.queued_slots]
            heapq.heapify(self._heap)

    def take(self) -> str | None:
        """Removes the actor with the most free slots from the queue and returns its name; None if there is none."""
        while self._heap:
            free, name = heapq.heappop(self._heap)
            actor = self.get(name)
            if actor is not None and actor.queued_slots == -free:
                actor.queued_slots = 0
                return name
        return None
