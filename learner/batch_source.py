"""Batch sources and publish sinks of the training loop.

LiveSource      rank 0 of a run: coordinator, store, publisher
FollowerSource  the other ranks: batches that rank 0 broadcasts
ReplaySource    recorded batches of a run, without any server
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from learner.model.parallel import World
from learner.network.network_thread import NetworkThread
from learner.store.store import Store
from protocol.codec import pack_groups, unpack_groups
from protocol.learner_config import RetentionConfig
from protocol.messages import CanaryFields
from protocol.types import TrajectoryGroup

# At the end of a run, the learner waits this long for the engines to commit the last version.
_LAST_COMMIT_TIMEOUT_S = 60.0
# After that it answers heartbeats for this long, so that actors receive their `Drain`.
_DRAIN_S = 1.0


class BatchSource(Protocol):
    """`num_recorded`: steps that are in the log already; they are trained again, but neither logged nor published.

    publishes: whether `publish` offers versions to engines (or, on ranks other than 0, takes part in making them).
    """

    num_recorded: int
    publishes: bool

    def wait_for_batch(self, step: int) -> list[TrajectoryGroup]:
        """The batch of a step: from the log if it is recorded, else waits until its last group arrives."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Queue lengths and the peers' counters by tag."""
        ...

    def commit_batch(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Logs the current step as trained on these groups, durably. Call it before the step's version is published."""
        ...

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> None:
        """Offers a version to the engines. They check with `canary` that they compute with it."""
        ...

    def drop_old_tokens(self, *, checkpoint_step: int) -> None:
        """Drops recorded tokens by `learner.retention`. `checkpoint_step`: step of a checkpoint that is durable, so
        that older batches are not needed to resume."""
        ...

    def finish(self, *, version: int) -> bool:
        """The run is over: tells the actors to leave. Returns whether all engines have committed the last version."""
        ...


class LiveSource:
    """Implements `BatchSource` on rank 0 with the network thread; broadcasts every batch to the other ranks."""

    publishes = True

    def __init__(
        self, network_thread: NetworkThread, *, num_recorded: int, world: World, retention: RetentionConfig
    ) -> None:
        self._network = network_thread
        self._retention = retention
        self._world = world
        self.num_recorded = num_recorded

    def wait_for_batch(self, step: int) -> list[TrajectoryGroup]:
        coordinator = self._network.coordinator
        recorded = step < self.num_recorded
        groups = self._network.run(coordinator.recorded_batch(step) if recorded else coordinator.next_batch())
        if self._world.size > 1:
            self._world.broadcast(pack_groups(groups))
        return groups

    def gauges(self) -> Mapping[str, float]:
        return self._network.run(self._network.coordinator.gauges())

    def commit_batch(self, groups: Sequence[TrajectoryGroup]) -> None:
        self._network.run(self._network.coordinator.commit_batch([group.cursor for group in groups]))

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> None:
        self._network.publish(data, version=version, canary=canary)

    def drop_old_tokens(self, *, checkpoint_step: int) -> None:
        keep = self._retention
        self._network.run(
            self._network.coordinator.drop_old_tokens(
                checkpoint_step=checkpoint_step, keep_steps=keep.keep_steps, keep_bytes=keep.keep_bytes
            )
        )

    def finish(self, *, version: int) -> bool:
        """Sends `Drain` to the actors and waits for the engines to commit the last version."""
        self._network.run(self._network.coordinator.drain("the run has reached its last step"))
        committed = self._network.run(self._network.wait_committed(version, timeout_s=_LAST_COMMIT_TIMEOUT_S))
        time.sleep(_DRAIN_S)
        return committed


class _NullSink:
    """The parts of `BatchSource` that do nothing without a network thread."""

    def gauges(self) -> Mapping[str, float]:
        return {}

    def commit_batch(self, groups: Sequence[TrajectoryGroup]) -> None:
        pass

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> None:
        pass

    def drop_old_tokens(self, *, checkpoint_step: int) -> None:
        pass

    def finish(self, *, version: int) -> bool:
        return True


class FollowerSource(_NullSink):
    """Implements `BatchSource` on a rank other than 0."""

    publishes = True

    def __init__(self, world: World, *, num_recorded: int) -> None:
        self._world = world
        self.num_recorded = num_recorded

    def wait_for_batch(self, step: int) -> list[TrajectoryGroup]:
        return unpack_groups(self._world.broadcast(None))


class ReplaySource(_NullSink):
    """Implements `BatchSource` on the store of a recorded run; every rank reads the store."""

    publishes = False
    num_recorded = 0

    def __init__(self, store: Store) -> None:
        self._store = store

    def wait_for_batch(self, step: int) -> list[TrajectoryGroup]:
        return [self._store.group(cursor) for cursor in self._store.batch(step)]
