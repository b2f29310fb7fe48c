"""A run in simulated time: scheduler, codec, store and audit are real; only sockets and the clock are simulated.

Messages are delayed, lost, duplicated and reordered. Actors are killed, drained, disconnected and slow; engines lag,
get stuck and restart without weights; the learner is killed before, in and after commits and between replies, and
resumes from its newest checkpoint and the log; the disk fills up. All random draws come from one seed. Some invariants
are checked at each event, the others by `World.check`. Raises: Violation if an invariant does not hold.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from learner.store.audit import audit_run
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from tests.leases.simulated_learner import Crash, SimulatedLearner
from tests.leases.simulated_peers import SimulatedActor, SimulatedEngine

STALLED_S = 1_500.0
"""Longer than every fault: a run without a step for this long is deadlocked."""


@dataclass(frozen=True)
class Shape:
    """`chaos` scales the probability of faults (0: no faults). `flat`: the fraction of zero-variance groups."""

    groups_per_batch: int = 8
    staleness_bound: int = 2
    num_steps: int = 1_000_000
    chaos: float = 1.0
    flat: float = 0.1
    straggler_timeout_s: float | None = None


class Violation(AssertionError):
    """An invariant does not hold."""


class World:
    """Time, the network and the faults. `seen` counts what happened, so that a test can check that it occurred."""

    def __init__(self, folder: Path, *, seed: int, shape: Shape) -> None:
        self.random = random.Random(seed)
        self.shape = shape
        self.folder = folder
        self.now_s = 0.0
        self.num_events = 0
        self.seen: Counter[str] = Counter()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_queued = 0
        self.learner = SimulatedLearner(self)
        self.engines = [SimulatedEngine(self, f"engine-{i}") for i in range(3)]
        self.actors = {f"actor-{i}": SimulatedActor(self, f"actor-{i}") for i in range(5)}
        self.learner.start()
        for peer in (*self.engines, *self.actors.values()):
            peer.start()
        self.after(5.0, self._inject_fault)

    def run(self, num_events: int) -> None:
        """Runs `num_events` events, or until the last step."""
        while self.num_events < num_events and self.learner.step < self.shape.num_steps:
            self.num_events += 1
            self.now_s, _, event = heapq.heappop(self._queue)
            try:
                event()
            except Crash:
                self.learner.kill()
            if self.now_s - self.learner.stepped_s > STALLED_S:
                raise Violation(f"no step for {STALLED_S} s at {self.now_s:.0f} s: {self.learner.describe()}")

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        self._num_queued += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._num_queued, event))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability * self.shape.chaos

    def deliver(self, receive: Callable[[], None]) -> None:
        """Delivers a message with a delay; with small probabilities never, or twice."""
        if self.chance(0.01):
            self.seen["message lost"] += 1
            return
        self.after(self.random.expovariate(1 / 0.05), receive)
        if self.chance(0.01):
            self.seen["message duplicated"] += 1
            self.after(self.random.uniform(0.0, 20.0), receive)

    def check(self) -> None:
        """Checks the store at the end of the run."""
        self.learner.stop()
        audit = audit_run(self.folder)
        store = Store(RunFolder(self.folder).store, read_only=True)
        states = dict(store.query("SELECT cursor, state FROM entries"))
        log = [cursor for step in range(store.num_batches()) for cursor in store.batch(step)]
        store.close()
        lost = {c for c in self.learner.acknowledged if states[c] not in ("trained", "buffered", "skipped")}
        if audit.problems:
            raise Violation(f"the audit found {audit.problems}")
        if lost:
            raise Violation(f"acknowledged groups were lost: {sorted(lost)[:5]}")
        if len(set(log)) != len(log):
            raise Violation("the log trains a group twice")
        if self.learner.weights != log[: len(self.learner.weights)]:
            raise Violation("the weights were not trained on the batches of the log")
        self.seen["tokens masked"] = audit.num_tokens_masked
        self.seen["tokens trained"] = audit.num_tokens_trained
        self.seen["steps"] = audit.num_steps

    def _inject_fault(self) -> None:
        if self.chance(0.5):
            self.random.choice(
                [
                    lambda: self.random.choice(list(self.actors.values())).kill(),
                    lambda: self.random.choice(list(self.actors.values())).drain(),
                    lambda: self.random.choice(list(self.actors.values())).cut_off(self.random.uniform(1.0, 30.0)),
                    lambda: self.random.choice(self.engines).restart(),
                    lambda: self.random.choice(self.engines).get_stuck(self.random.uniform(5.0, 100.0)),
                    self.learner.kill,
                    self.learner.fill_disk,
                ]
            )()
        self.after(self.random.expovariate(1 / 5.0), self._inject_fault)
