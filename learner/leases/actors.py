"""The connected actors, and a priority queue that yields the one with the most free credits. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True)
class Actor:
    """A connected actor.

    capacity  number of groups that it can run at once
    seen_s    time of its last heartbeat, later if the learner's event loop stalled
    counters  its own metrics, from its last heartbeat
    """

    peer: bytes
    incarnation: str
    capacity: int = 0
    seen_s: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)
    queued_credits: int = 0
    """Free credits in the actor's current heap entry; 0: it has none. Heap entries with another number are stale."""


class Actors(dict[str, Actor]):
    """Actors by name. `queue` and `take` maintain a priority queue of the actors with free credits."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, str]] = []

    def queue(self, name: str, *, num_outstanding: int) -> None:
        """Updates the actor's place in the queue. Free credits: `capacity` - `num_outstanding` (running leases).

        Does nothing if the actor is not connected or its free credits have not changed.
        """
        actor = self.get(name)
        if actor is None:
            return
        free = max(0, actor.capacity - num_outstanding)
        if free != actor.queued_credits:
            actor.queued_credits = free
            if free:
                heapq.heappush(self._heap, (-free, name))

    def take(self) -> str | None:
        """Removes the actor with the most free credits from the queue and returns its name; None if there is none."""
        while self._heap:
            free, name = heapq.heappop(self._heap)
            actor = self.get(name)
            if actor is not None and actor.queued_credits == -free:
                actor.queued_credits = 0
                return name
        return None
