"""In simulated time, with the real scheduler: trajectory slots stay busy although episode lengths differ 30-fold."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence

import pytest

from learner.leases.admission import Rules
from learner.leases.decisions import Decision
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.scheduler import Scheduler
from protocol.codec import encode_group
from protocol.framing import decode
from protocol.messages import EngineFields, Heartbeat, Lease, SubmitGroup, SubmitReply
from tests.leases.groups import RUN, VOCABULARY, make_group

SHORTEST_S, SPREAD = 3.0, 30.0
HEARTBEAT_S, MIN_HEARTBEAT_S, LATENCY_S = 0.5, 0.05, 0.02
WARM_S, END_S = 120.0, 360.0


class World:
    """The scheduler and its actors. `busy_s`: seconds of busy slots after WARM_S."""

    def __init__(self, *, seed: int, group_size: int, by_slots: bool, slots: Sequence[int]) -> None:
        self.random = random.Random(seed)
        self.group_size = group_size
        self.by_slots = by_slots
        self.now_s = self.busy_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_queued = 0
        self.scheduler = Scheduler(
            LeaseTable(groups_per_batch=16, staleness_bound=10_000, num_steps=1 << 20),
            rules=Rules(RUN, group_size, VOCABULARY, skip_zero_variance=False),
            timeouts=LeaseTimeouts(60.0),
            publications={1: 0},
            num_failures={},
            started_s=0.0,
        )
        self.scheduler.on_engines(
            [EngineFields(name="e", url="http://127.0.0.1:1", version=0, publication=1)], now_s=0.0
        )
        self.actors = {f"actor-{i}".encode(): Actor(self, f"actor-{i}", num) for i, num in enumerate(slots)}

    def occupancy(self) -> float:
        for actor in self.actors.values():
            actor.beat()
        while self.now_s < END_S:
            self.now_s, _, event = heapq.heappop(self._queue)
            event()
        return self.busy_s / (END_S - WARM_S) / sum(actor.slots for actor in self.actors.values())

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        self._num_queued += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._num_queued, event))

    def send(self, decision: Decision) -> None:
        for send in decision.sends:
            self.after(LATENCY_S, lambda send=send: self.actors[send.peer].receive(send.message))


class Actor:
    """Behaves as actor/runner.py does. Without `World.by_slots`, a group keeps its slots until its last episode ends:
    the rule before slots, when an actor held slots // group_size leases."""

    def __init__(self, world: World, name: str, slots: int) -> None:
        self.world, self.name, self.slots = world, name, slots
        self.max_claimed = 0
        self._claims: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._held: dict[int, Lease] = {}
        self._waiting: deque[int] = deque()
        self._num_busy = 0
        self._known_free = 0
        self._beat_s = -1.0
        self._is_due = False

    def beat(self) -> None:
        """The clock's heartbeat."""
        self._send_heartbeat()
        self.world.after(HEARTBEAT_S, self.beat)

    def receive(self, message: object) -> None:
        match message:
            case Lease():
                self._held[message.lease_id] = message
                self._claims[message.lease_id] = self._left[message.lease_id] = message.group_size
                self._known_free -= message.group_size
                self.max_claimed = max(self.max_claimed, sum(self._claims.values()))
                self._waiting.extend([message.lease_id] * message.group_size)
                self._fill()
            case SubmitReply():
                assert message.outcome == "accepted"
                del self._held[message.lease_id]

    def _free(self) -> int:
        return max(0, self.slots - sum(self._claims.values()))

    def _fill(self) -> None:
        world = self.world
        while self._waiting and self._num_busy < self.slots:
            self._num_busy += 1
            lease_id, duration_s = self._waiting.popleft(), SHORTEST_S * SPREAD ** world.random.random()
            start_s, end_s = max(WARM_S, world.now_s), min(END_S, world.now_s + duration_s)
            world.busy_s += max(0.0, end_s - start_s)
            world.after(duration_s, lambda lease_id=lease_id: self._end(lease_id))

    def _end(self, lease_id: int) -> None:
        self._num_busy -= 1
        self._left[lease_id] -= 1
        if self.world.by_slots:
            self._claims[lease_id] -= 1
        if not self._left[lease_id]:
            del self._claims[lease_id]
            self._submit(self._held[lease_id])
        self._fill()
        if self._free() and self._known_free <= 0 and not self._is_due:
            self._is_due = True
            self.world.after(max(0.0, self._beat_s + MIN_HEARTBEAT_S - self.world.now_s), self._send_heartbeat)

    def _send_heartbeat(self) -> None:
        world = self.world
        self._known_free, self._beat_s, self._is_due = self._free(), world.now_s, False
        message = Heartbeat(
            actor=self.name, incarnation="1", capacity=self.slots, free_slots=self._free(), held=list(self._held)
        )
        world.after(
            LATENCY_S,
            lambda: world.send(world.scheduler.on_heartbeat(self.name.encode(), message, now_s=world.now_s)),
        )

    def _submit(self, lease: Lease) -> None:
        world = self.world
        group = make_group(lease, rewards=tuple(float(i % 2) for i in range(lease.group_size)))
        frames = encode_group(group, lease_id=lease.lease_id)
        message, _ = decode(frames)
        assert isinstance(message, SubmitGroup)
        peer = self.name.encode()
        world.after(LATENCY_S, lambda: world.send(world.scheduler.on_group(peer, message, frames, now_s=world.now_s)))


@pytest.mark.parametrize("seed", range(4))
def test_slots_are_busy_although_episode_lengths_differ(seed: int) -> None:
    """While the slots of a group stayed claimed until its last episode ended, 40 % were busy."""
    slots = World(seed=seed, group_size=8, by_slots=True, slots=(32, 16, 24)).occupancy()
    groups = World(seed=seed, group_size=8, by_slots=False, slots=(32, 16, 24)).occupancy()
    assert slots >= 0.95
    assert groups <= 0.55


@pytest.mark.parametrize(("group_size", "slots"), [(16, 10), (8, 8), (4, 13), (1, 7)])
def test_every_ratio_of_group_size_to_slots_keeps_them_busy(group_size: int, slots: int) -> None:
    """Also if a group is larger than the actor, or no multiple fits. At most G - 1 trajectories wait for a slot."""
    world = World(seed=5, group_size=group_size, by_slots=True, slots=(slots, slots))
    assert world.occupancy() >= 0.95
    assert max(actor.max_claimed for actor in world.actors.values()) <= slots + group_size - 1
