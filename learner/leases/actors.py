"""The connected actors, and a priority queue that yields the one with the most free slots. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


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


class Actors(dict[str, Actor]):
    """Actors by name. `queue` and `take` maintain a priority queue of the actors with free slots."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, str]] = []

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

    def take(self) -> str | None:
        """Removes the actor with the most free slots from the queue and returns its name; None if there is none."""
        while self._heap:
            free, name = heapq.heappop(self._heap)
            actor = self.get(name)
            if actor is not None and actor.queued_slots == -free:
                actor.queued_slots = 0
                return name
        return None
