"""Where batches come from and where versions go: the loop's only sight of the world.

LiveSource      rank 0 of a run: coordinator, store, publisher
FollowerSource  the other ranks: batches as rank 0 sends them
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
from protocol.config import RetentionConfig
from protocol.messages import CanaryFields
from protocol.types import TrajectoryGroup

# At the end, engines get this long to commit the last version before the learner leaves.
_LAST_COMMIT_TIMEOUT_S = 60.0
_DRAIN_S = 1.0


class BatchSource(Protocol):
    """`num_recorded` steps are in the log already: they are trained again, and neither logged nor published."""

    num_recorded: int
    publishes: bool

    def batch(self, step: int) -> list[TrajectoryGroup]:
        """The batch of a step: from the log, or the next one, which is waited for."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Queue lengths and the peers' counters by tag."""
        ...

    def log(self, groups: Sequence[TrajectoryGroup]) -> None:
        """The step on these groups is trained: durable before its version can be seen."""
        ...

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> None:
        """Offers a version to engines, which `canary` shall prove of each."""
        ...

    def checkpointed(self, step: int) -> None:
        """A checkpoint of version `step` is durable: older batches are not needed to resume."""
        ...

    def finish(self, *, version: int) -> bool:
        """The run is over. Whether all engines have the last version."""
        ...


class LiveSource:
    """Implements `BatchSource` on the plane of rank 0, and hands every batch on to the other ranks."""

    publishes = True

    def __init__(self, plane: NetworkThread, *, num_recorded: int, world: World, retention: RetentionConfig) -> None:
        self._plane = plane
        self._retention = retention
        self._world = world
        self.num_recorded = num_recorded

    def batch(self, step: int) -> list[TrajectoryGroup]:
        coordinator = self._plane.coordinator
        recorded = step < self.num_recorded
        groups = self._plane.run(coordinator.recorded_batch(step) if recorded else coordinator.next_batch())
        if self._world.size > 1:
            self._world.broadcast(pack_groups(groups))
        return groups

    def gauges(self) -> Mapping[str, float]:
        return self._plane.run(self._plane.coordinator.gauges())

    def log(self, groups: Sequence[TrajectoryGroup]) -> None:
        self._plane.run(self._plane.coordinator.finish_batch([group.cursor for group in groups]))

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> None:
        self._plane.publish(data, version=version, canary=canary)

    def checkpointed(self, step: int) -> None:
        keep = self._retention
        self._plane.run(
            self._plane.coordinator.retain(checkpoint_step=step, keep_steps=keep.keep_steps, keep_bytes=keep.keep_bytes)
        )

    def finish(self, *, version: int) -> bool:
        """Engines commit the last version, actors are told to leave."""
        self._plane.run(self._plane.coordinator.drain("the run has reached its last step"))
        committed = self._plane.run(self._plane.wait_committed(version, timeout_s=_LAST_COMMIT_TIMEOUT_S))
        time.sleep(_DRAIN_S)
        return committed


class _NullSink:
    """The parts of `BatchSource` that nobody hears."""

    def gauges(self) -> Mapping[str, float]:
        return {}

    def log(self, groups: Sequence[TrajectoryGroup]) -> None:
        pass

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> None:
        pass

    def checkpointed(self, step: int) -> None:
        pass

    def finish(self, *, version: int) -> bool:
        return True


class FollowerSource(_NullSink):
    """Implements `BatchSource` on a rank other than 0."""

    publishes = True

    def __init__(self, world: World, *, num_recorded: int) -> None:
        self._world = world
        self.num_recorded = num_recorded

    def batch(self, step: int) -> list[TrajectoryGroup]:
        return unpack_groups(self._world.broadcast(None))


class ReplaySource(_NullSink):
    """Implements `BatchSource` on the store of a run that was; every rank reads it for itself."""

    publishes = False
    num_recorded = 0

    def __init__(self, store: Store) -> None:
        self._store = store

    def batch(self, step: int) -> list[TrajectoryGroup]:
        return [self._store.group(cursor) for cursor in self._store.batch(step)]
