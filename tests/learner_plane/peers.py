"""A plane over a store in a folder, and an actor and an engine's agent that speak to it over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np

from learner.leases.admission import Rules
from learner.leases.decisions import Arrived
from learner.network.network_thread import NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import decode_frames, encode_group
from protocol.config import NetworkConfig
from protocol.framing import Message, decode, encode
from protocol.messages import (
    Drain,
    EngineFields,
    EngineReply,
    EngineReport,
    Goodbye,
    Heartbeat,
    Lease,
    RunStatus,
    SubmitReply,
)
from protocol.transport import Transport
from protocol.types import Context, Question, Trajectory, TrajectoryGroup, VersionSpan

RUN = "test"
GROUP_SIZE = 2
VOCABULARY = 50
WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What a learner would say; B = 2, eta = 1 and three steps unless told otherwise."""

    folder: Path
    groups_per_batch: int = 2
    staleness_bound: int = 1
    num_steps: int = 3
    lease_timeout_s: float = 60.0
    straggler_timeout_s: float | None = None
    skip_zero_variance: bool = False


@contextmanager
def open_plane(setting: Setting, *, on_death: Callable[[], None] | None = None) -> Iterator[NetworkThread]:
    """A plane as `run_learner` makes it, resumed from the store where there is one. It must not die, or say so."""
    store = Store(RunFolder(setting.folder).store)
    lease_table = store.restore_lease_table(
        groups_per_batch=setting.groups_per_batch,
        staleness_bound=setting.staleness_bound,
        num_steps=setting.num_steps,
    )
    deaths: list[str] = []
    rules = Rules(RUN, GROUP_SIZE, VOCABULARY, setting.skip_zero_variance)
    plane = NetworkThread(
        network=NetworkConfig(),
        store=store,
        lease_table=lease_table,
        rules=rules,
        lease_timeout_s=setting.lease_timeout_s,
        straggler_timeout_s=setting.straggler_timeout_s,
        on_death=on_death or (lambda: deaths.append("died")),
    )
    try:
        with plane:
            yield plane
    finally:
        store.close()
    assert deaths == []


def control_address(plane: NetworkThread) -> str:
    return plane.coordinator._router.address


def weights_address(plane: NetworkThread) -> str:
    return plane.publisher._router.address


def announce_address(plane: NetworkThread) -> str:
    return plane.publisher._announcements.address


def make_group(
    lease: Lease, *, version: int = 0, publication: int = 1, rewards: tuple[float, ...] = (1.0, 0.0), token: int = 3
) -> TrajectoryGroup:
    """A valid answer to `lease`: one context of four tokens a trajectory, two of them sampled."""
    context = Context(
        token_ids=np.array([1, 2, token, 4], dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 1], dtype=np.bool_),
        behavior_logprobs=np.array([0, 0, -0.25, -1.5], dtype=np.float32),
        policy_versions=(VersionSpan(2, 4, version, publication),),
    )
    question = Question(id=f"q{lease.cursor}", text="who?", answers=("w1",))
    trajectories = tuple(Trajectory((context,), reward, reward_parts={"em": reward}) for reward in rewards)
    return TrajectoryGroup(lease.run_id, lease.cursor, lease.attempt, question, trajectories)


def arrived(group: TrajectoryGroup, *, lease_id: int) -> Arrived:
    """The record of `group`, as the coordinator would keep it."""
    frames = encode_group(group, lease_id=lease_id)
    return Arrived(lease_id, decode_frames(frames), frames)


class Actor:
    """Speaks to the coordinator by hand; what it has received is kept by kind. Use `async with`."""

    def __init__(self, address: str, *, name: str = "actor-0", incarnation: str = "1", capacity: int = 8) -> None:
        self.name, self.incarnation, self.capacity = name, incarnation, capacity
        self.leases: list[Lease] = []
        self.replies: list[SubmitReply] = []
        self.statuses: list[RunStatus] = []
        self.drains: list[Drain] = []
        self.held: set[int] = set()
        self._address = address
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Actor:
        self._transport = Transport()
        self.dealer = self._transport.dealer(self._address)
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        await asyncio.wait([self._reader])
        self._transport.close()

    async def heartbeat(self) -> None:
        held = sorted(self.held)
        await self.send(
            Heartbeat(actor=self.name, incarnation=self.incarnation, capacity=self.capacity, held=held, counters={})
        )

    async def goodbye(self) -> None:
        await self.send(Goodbye(actor=self.name, incarnation=self.incarnation))

    async def send(self, message: Message) -> None:
        await self.dealer.send([encode(message)])

    async def submit(self, group: TrajectoryGroup, *, lease_id: int) -> SubmitReply:
        """Sends the group and waits for the answer to it."""
        num_replies = len(self.replies)
        await self.dealer.send(encode_group(group, lease_id=lease_id))
        await self.until(lambda: len(self.replies) > num_replies)
        return self.replies[-1]

    async def answer(self, lease: Lease, **changes: object) -> SubmitReply:
        reply = await self.submit(replace(make_group(lease), **changes), lease_id=lease.lease_id)
        self.held.discard(lease.lease_id)
        return reply

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until something that was received makes `condition` true."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_leased(self, num: int) -> list[Lease]:
        """Until `num` leases have come in all; a heartbeat first, for the credits."""
        await self.heartbeat()
        await self.until(lambda: len(self.leases) >= num)
        return self.leases

    async def until_status(self) -> RunStatus:
        """A heartbeat and the answer to it: whatever was sent before has been dealt with."""
        num = len(self.statuses)
        await self.heartbeat()
        await self.until(lambda: len(self.statuses) > num)
        return self.statuses[-1]

    async def _read(self) -> None:
        while True:
            message, _ = decode(await self.dealer.recv())
            match message:
                case Lease():
                    self.leases.append(message)
                    self.held.add(message.lease_id)
                case SubmitReply():
                    self.replies.append(message)
                case RunStatus():
                    self.statuses.append(message)
                case Drain():
                    self.drains.append(message)
            self._changed.set()


_request_ids = count(1)


async def report_engine(
    plane: NetworkThread, *, version: int, publication: int = 1, state: str = "serving"
) -> EngineReply:
    """What an engine's agent says, over the wire."""
    transport = Transport()
    try:
        dealer = transport.dealer(weights_address(plane))
        fields = EngineFields(name="engine-0", url="http://127.0.0.1:1", version=version, publication=publication)
        report = EngineReport.model_validate({"request_id": next(_request_ids), "engine": fields, "state": state})
        await dealer.send([encode(report)])
        async with asyncio.timeout(WAIT_S):
            message, _ = decode(await dealer.recv())
        assert isinstance(message, EngineReply)
        return message
    finally:
        transport.close()
