"""A runner whose coordinator and rollouts are controlled by a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from actor.runner import Runner
from protocol.codec import decode_group
from protocol.framing import Message, decode, encode
from protocol.messages import EngineFields, Heartbeat, Lease, RunStatus, SubmitGroup
from protocol.transport import Transport
from protocol.types import Context, Question, Trajectory, TrajectoryGroup, VersionSpan

WAIT_S = 20.0
STATUS = RunStatus(run_id="run", step=0, num_steps=1, engines=[])


@dataclass
class RunnerUnderTest:
    """A runner of three slots, the coordinator's socket, and a rollout that ends when the test calls `finish`.

    If `rollout_error` is set, the rollout raises it. `num_heartbeats` includes heartbeats that could not be sent.
    """

    resend_s: float
    heartbeat_s: float
    drain_s: float
    drain: asyncio.Event = field(default_factory=asyncio.Event)
    trajectory_ends: dict[int, Callable[[], None]] = field(default_factory=dict)
    transport: Transport = field(default_factory=Transport)
    engines: list[Sequence[EngineFields]] = field(default_factory=list)
    gates: dict[int, asyncio.Event] = field(default_factory=dict)
    question_id: str = "q"
    rollout_error: Exception | None = None
    peer: bytes = b""
    num_heartbeats: int = 0
    num_received: int = 0

    def __post_init__(self) -> None:
        self._started = asyncio.Event()
        self.router = self.transport.router("tcp://127.0.0.1:0")
        self.dealer = self.transport.dealer(self.router.address)
        self.runner = Runner(
            name="actor-0",
            capacity=3,
            dealer=self.dealer,
            rollout=self._rollout,
            on_engines=self.engines.append,
            counters=self._counters,
            heartbeat_s=self.heartbeat_s,
            resend_s=self.resend_s,
            drain=self.drain,
            drain_s=self.drain_s,
        )

    async def start(self) -> None:
        """Starts the runner when its socket is connected, so that its first heartbeat is not dropped."""
        await self.dealer.send([b"connected"], timeout_s=WAIT_S)
        await self.router.recv()
        self.running = asyncio.create_task(self.runner.run())

    def _counters(self) -> dict[str, float]:
        """Called by the runner once per heartbeat, also if the heartbeat cannot be sent."""
        self.num_heartbeats += 1
        return {"busy": 1.0}

    async def _rollout(self, lease: Lease, on_trajectory_end: Callable[[], None]) -> TrajectoryGroup:
        self.trajectory_ends[lease.lease_id] = on_trajectory_end
        self._started.set()
        if self.rollout_error is not None:
            raise self.rollout_error
        await self.gates.setdefault(lease.lease_id, asyncio.Event()).wait()
        context = Context(
            token_ids=np.array([1, 2], dtype=np.int32),
            loss_mask=np.array([False, True]),
            behavior_logprobs=np.array([0.0, -1.0], dtype=np.float32),
            policy_versions=(VersionSpan(1, 2, 0, 1),),
        )
        question = Question(self.question_id, "who?", ("a",))
        return TrajectoryGroup("run", lease.cursor, lease.attempt, question, (Trajectory((context,), 1.0),))

    async def started(self, *lease_ids: int) -> None:
        """Waits until the rollouts of these leases have started."""
        async with asyncio.timeout(WAIT_S):
            while not self.trajectory_ends.keys() >= set(lease_ids):
                self._started.clear()
                await self._started.wait()

    def finish(self, lease_id: int) -> None:
        self.gates.setdefault(lease_id, asyncio.Event()).set()

    async def receive(self, kind: type[Message], *, held: list[int] | None = None) -> Message:
        """Receives the next message of `kind`; if `held` is given, the next heartbeat with these leases."""
        async with asyncio.timeout(WAIT_S):
            while True:
                self.peer, frames = await self.router.recv()
                self.num_received += 1
                message, payload = decode(frames)
                if isinstance(message, SubmitGroup):
                    decode_group(message, payload)
                if not isinstance(message, kind):
                    continue
                if held is None or (isinstance(message, Heartbeat) and message.held == held):
                    return message

    async def send(self, message: Message) -> None:
        assert self.router.send(self.peer, [encode(message)])

    async def heartbeat(self, *, held: list[int] | None = None) -> Heartbeat:
        message = await self.receive(Heartbeat, held=held)
        assert isinstance(message, Heartbeat)
        return message

    async def lease(self, lease_id: int, *, group_size: int = 1) -> None:
        lease = Lease(
            lease_id=lease_id, run_id="run", cursor=lease_id + 100, attempt=0, group_size=group_size, min_version=0
        )
        await self.send(lease)


@asynccontextmanager
async def open_stage(
    *, resend_s: float = 5.0, heartbeat_s: float = 0.02, drain_s: float = WAIT_S
) -> AsyncIterator[RunnerUnderTest]:
    stage = RunnerUnderTest(resend_s, heartbeat_s, drain_s)
    await stage.start()
    try:
        yield stage
    finally:
        stage.running.cancel()
        await asyncio.wait([stage.running])
        stage.transport.close()
