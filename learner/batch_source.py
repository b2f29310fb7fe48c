"""Batch sources and publish sinks of the training loop.

LiveSource      rank 0 of a run; uses the coordinator, the store and the publisher
FollowerSource  the other ranks of a run; receives the batches that rank 0 broadcasts
ReplaySource    all ranks of a replay; reads the recorded batches of a run, without any server
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
from protocol.types import TrajectoryGroup
from protocol.weight_messages import CanaryFields

# At the end of a run, the learner waits this long for the engines to commit the last version.
_LAST_COMMIT_TIMEOUT_S = 60.0
# Then the network thread answers heartbeats for this long, so that every actor receives `Drain`.
_DRAIN_S = 1.0


class BatchSource(Protocol):
    """Where the loop gets its batches and publishes its versions.

    num_recorded  number of steps in the log at the start; they may be trained again, but are not logged or published
    publishes     whether rank 0 publishes versions; then every rank takes part in gathering the weights
    """

    num_recorded: int
    publishes: bool

    def wait_for_batch(self, step: int) -> list[TrajectoryGroup]:
        """Returns the batch of a step: a recorded one from the log, else waits for its last group."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Metric tag → value: queue lengths, and the counters that actors and engines report."""
        ...

    def commit_batch(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Writes the current step's batch to the log, durably. Call it before the step's version is published."""
        ...

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> None:
        """Offers a version to the engines. `data`: a safetensors file. `canary`: lets engines verify the weights."""
        ...

    def drop_old_tokens(self, *, checkpoint_step: int) -> None:
        """Applies `learner.retention` to the steps before `checkpoint_step`, the step of a durable checkpoint."""
        ...

    def finish(self, *, version: int) -> bool:
        """Ends the run: stops the actors. Returns whether all serving engines have committed `version`."""
        ...


class LiveSource:
    """`BatchSource` on rank 0, on top of the network thread. Broadcasts every batch to the other ranks."""

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
        """Sends `Drain` to the actors and waits at most _LAST_COMMIT_TIMEOUT_S for the engines to commit `version`."""
        self._network.run(self._network.coordinator.drain("the run has reached its last step"))
        committed = self._network.run(self._network.wait_committed(version, timeout_s=_LAST_COMMIT_TIMEOUT_S))
        time.sleep(_DRAIN_S)
        return committed


class _NullSink:
    """The methods of `BatchSource` that need the network thread, as no-ops."""

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
    """`BatchSource` on a rank other than 0."""

    publishes = True

    def __init__(self, world: World, *, num_recorded: int) -> None:
        self._world = world
        self.num_recorded = num_recorded

    def wait_for_batch(self, step: int) -> list[TrajectoryGroup]:
        return unpack_groups(self._world.broadcast(None))


class ReplaySource(_NullSink):
    """`BatchSource` of a replay. Every rank reads the store of the recorded run."""

    publishes = False
    num_recorded = 0

    def __init__(self, store: Store) -> None:
        self._store = store

    def wait_for_batch(self, step: int) -> list[TrajectoryGroup]:
        return [self._store.group(cursor) for cursor in self._store.batch(step)]
