"""The actors that the learner knows, and which of them has the most free credits. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True)
class Actor:
    """An actor whose heartbeats arrive. `capacity`: the number of groups that it can hold at once."""

    peer: bytes
    incarnation: str
    capacity: int = 0
    seen_s: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)
    queued_credits: int = 0
    """The free credits of this actor's valid entry in the heap; 0: it has no valid entry."""


class Actors(dict[str, Actor]):
    """Actors by name, with a priority queue of those that have free credits (`queue`, `take`)."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, str]] = []

    def queue(self, name: str, *, num_outstanding: int) -> None:
        """Puts the actor into the queue with its current free credits (capacity - `num_outstanding` leases).

        Does nothing if the actor is unknown or its free credits have not changed.
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
