"""The actors and engines of a simulation: they behave as actor/runner.py, engines/pool.py and weights/agent.py do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from protocol.codec import encode_group
from protocol.framing import Buffer, Message
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, Lease, RunStatus, SubmitReply
from protocol.types import Context, Question, Status, Trajectory, TrajectoryGroup, VersionSpan
from protocol.weight_messages import EngineReport

if TYPE_CHECKING:
    from tests.leases.simulation import World

GROUP_SIZE = 2
HEARTBEAT_S = 2.0
REPORT_S = 2.0
RESEND_S = 3.0
ENGINE_WAIT_S = 30.0
_TOKENS = np.array([1, 2, 3, 4], dtype=np.int32)
_MASK = np.array([0, 0, 1, 1], dtype=np.bool_)
_LOGPROBS = np.array([0, 0, -0.25, -1.5], dtype=np.float32)


class SimulatedEngine:
    """Commits the newest publication after a random delay, and reports its version regularly."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.version = self.publication = -1
        self._stuck_until_s = 0.0

    def start(self) -> None:
        self._report()

    def restart(self) -> None:
        """The engine is killed and restarted; it has no weights."""
        self.world.seen["engine killed"] += 1
        self.version = self.publication = -1

    def get_stuck(self, duration_s: float) -> None:
        """The engine continues to serve, but commits no new version for `duration_s`."""
        self.world.seen["engine stuck"] += 1
        self._stuck_until_s = self.world.now_s + duration_s

    def _report(self) -> None:
        learner = self.world.learner
        newest = learner.newest
        if learner.scheduler is not None and newest > (self.version, self.publication):
            self.world.after(self.world.random.uniform(0.05, 1.0), lambda: self._commit(*newest))
        fields = EngineFields(
            name=self.name, url="http://127.0.0.1:1", version=self.version, publication=self.publication
        )
        report = EngineReport(request_id=0, engine=fields, state="serving" if self.version >= 0 else "joining")
        self.world.deliver(lambda: learner.receive(self.name.encode(), report))
        self.world.after(REPORT_S, self._report)

    def _commit(self, version: int, publication: int) -> None:
        if self.world.now_s > self._stuck_until_s and version >= self.version:
            self.version, self.publication = version, publication


@dataclass
class _Job:
    """A lease in progress.

    num_running  its trajectories that have not ended; each uses a slot
    spans        (version, publication) of each context sampled
    frames       the finished group
    """

    lease: Lease
    num_contexts: int
    slowness: float
    num_running: int = GROUP_SIZE
    spans: list[tuple[int, int]] = field(default_factory=list)
    waits_since_s: float | None = None
    frames: list[Buffer] = field(default_factory=list)
    sent_s: float = -np.inf


class SimulatedActor:
    """Works on all its leases concurrently; keeps a finished group until it is acknowledged.

    One trajectory of a group ends at a random time, the others with the group. While it drains, it takes no lease.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.capacity = world.random.randint(1, 6 * GROUP_SIZE)
        self._incarnation = 0
        self._jobs: dict[int, _Job] = {}
        self._is_up = True
        self._is_draining = False
        self._cut_until_s = 0.0
        self._status_s = 0.0

    @property
    def peer(self) -> bytes:
        return f"{self.name}/{self._incarnation}".encode()

    def is_connected(self, peer: bytes) -> bool:
        return self._is_up and peer == self.peer and self.world.now_s >= self._cut_until_s

    def start(self) -> None:
        self._incarnation += 1
        self._is_up = True
        self._is_draining = False
        self._heartbeat(self._incarnation)

    def kill(self) -> None:
        """Drops all jobs and restarts later. With probability 0.3, sends a goodbye first."""
        if not self._is_up:
            return
        self.world.seen["actor killed"] += 1
        self._stop(with_goodbye=self.world.random.random() < 0.3)

    def drain(self) -> None:
        """SIGTERM: finishes its groups for at most 10 s, then leaves and restarts later."""
        if not self._is_up or self._is_draining:
            return
        self.world.seen["actor drained"] += 1
        self._is_draining = True
        incarnation = self._incarnation
        self.world.after(
            10.0, lambda: self._stop(with_goodbye=True) if incarnation == self._incarnation and self._is_up else None
        )
        self._leave_if_drained()

    def _leave_if_drained(self) -> None:
        if self._is_up and self._is_draining and not self._jobs:
            self._stop(with_goodbye=True)

    def _stop(self, *, with_goodbye: bool) -> None:
        if with_goodbye:
            self._send(Goodbye(actor=self.name, incarnation=str(self._incarnation)))
        self._is_up = False
        self._jobs.clear()
        self.world.after(self.world.random.uniform(0.5, 20.0), self.start)

    def cut_off(self, duration_s: float) -> None:
        self.world.seen["actor cut off"] += 1
        self._cut_until_s = self.world.now_s + duration_s

    def receive(self, peer: bytes, message: Message) -> None:
        if not self.is_connected(peer):
            return
        match message:
            case RunStatus():
                self._status_s = self.world.now_s
            case Lease() if message.lease_id not in self._jobs and not self._is_draining:
                slowness = 40.0 if self.world.chance(0.02) else 1.0
                job = _Job(message, num_contexts=self.world.random.randint(1, 3), slowness=slowness)
                self._jobs[message.lease_id] = job
                self._schedule(job)
                self.world.after(self.world.random.uniform(0.0, 2.0), lambda: self._end_trajectory(job))
            case SubmitReply():
                job = self._jobs.get(message.lease_id)
                if job is not None and job.frames:
                    del self._jobs[message.lease_id]
                    self._leave_if_drained()
            case Drain():
                self.world.seen["drained"] += 1
                self.kill()

    def _heartbeat(self, incarnation: int) -> None:
        if not self._is_up or incarnation != self._incarnation:
            return
        self._report()
        for job in self._jobs.values():
            if job.frames and self.world.now_s - job.sent_s > RESEND_S and self._status_s > job.sent_s:
                self._submit(job)
        self.world.after(HEARTBEAT_S, lambda: self._heartbeat(incarnation))

    def _report(self) -> None:
        free_slots = max(0, self.capacity - sum(job.num_running for job in self._jobs.values()))
        self._send(
            Heartbeat(
                actor=self.name,
                incarnation=str(self._incarnation),
                capacity=self.capacity,
                free_slots=free_slots,
                held=list(self._jobs),
                draining=self._is_draining,
            )
        )

    def _end_trajectory(self, job: _Job) -> None:
        """One trajectory of the group ends; its slot is free, and a heartbeat says so at once."""
        if self._is_up and job.num_running == GROUP_SIZE and self._jobs.get(job.lease.lease_id) is job:
            job.num_running -= 1
            self._report()

    def _schedule(self, job: _Job) -> None:
        incarnation = self._incarnation
        delay_s = self.world.random.lognormvariate(-0.5, 0.8) * job.slowness
        self.world.after(delay_s, lambda: self._work(job) if incarnation == self._incarnation and self._is_up else None)

    def _work(self, job: _Job) -> None:
        """Samples the next context on any engine whose version the lease allows."""
        able = [engine for engine in self.world.engines if engine.version >= job.lease.min_version]
        if not able:
            job.waits_since_s = self.world.now_s if job.waits_since_s is None else job.waits_since_s
            if self.world.now_s - job.waits_since_s < ENGINE_WAIT_S:
                self._schedule(job)
                return
            self._finish(job, failed=True)
            return
        engine = self.world.random.choice(able)
        job.spans.append((engine.version, engine.publication))
        if len(job.spans) < job.num_contexts:
            self._schedule(job)
        else:
            self._finish(job, failed=self.world.chance(0.02))

    def _finish(self, job: _Job, *, failed: bool) -> None:
        lease, world = job.lease, self.world
        spans = [(0, 10**6)] if world.chance(0.01) else job.spans  # an unknown publication: must be refused
        contexts = tuple(
            Context(_TOKENS, _MASK, _LOGPROBS, (VersionSpan(2, 4, version, publication),))
            for version, publication in spans
        )
        status = Status.FAILED if failed else Status.COMPLETED
        last = 1.0 if world.random.random() < world.shape.flat else 0.0
        trajectories = tuple(
            Trajectory(() if failed else contexts, reward, status, reward_parts={"em": reward})
            for reward in (1.0, last)
        )
        question = Question(id=f"q{lease.cursor}", text="who?", answers=("w1",))
        group = TrajectoryGroup(lease.run_id, lease.cursor, lease.attempt, question, trajectories)
        job.frames = encode_group(group, lease_id=lease.lease_id)
        job.num_running = 0
        self._submit(job)

    def _submit(self, job: _Job) -> None:
        job.sent_s = self.world.now_s
        self._send(job.frames)

    def _send(self, message: Message | list[Buffer]) -> None:
        if self.world.now_s >= self._cut_until_s:
            peer = self.peer
            self.world.deliver(lambda: self.world.learner.receive(peer, message))
