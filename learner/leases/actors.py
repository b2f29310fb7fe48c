"""What the learner knows of the actors: who is heard of, and who has most credits left. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True)
class Actor:
    """An actor that is heard of. `capacity`: the groups that it can hold at once."""

    peer: bytes
    incarnation: str
    capacity: int = 0
    seen_s: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)
    offered: int = 0
    """Free credits, as the newest entry of the heap has them; 0: none counts."""


class Actors(dict[str, Actor]):
    """Actors by name. An actor is offered leases after `offer`, until it was `take`n."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, str]] = []

    def offer(self, name: str, *, num_outstanding: int) -> None:
        """The actor's free credits may have changed. Costs nothing where they have not, or it is not heard of."""
        actor = self.get(name)
        if actor is None:
            return
        free = max(0, actor.capacity - num_outstanding)
        if free != actor.offered:
            actor.offered = free
            if free:
                heapq.heappush(self._heap, (-free, name))

    def take(self) -> str | None:
        """The actor with most free credits, or None; it is offered again by `offer`."""
        while self._heap:
            free, name = heapq.heappop(self._heap)
            actor = self.get(name)
            if actor is not None and actor.offered == -free:
                actor.offered = 0
                return name
        return None
