"""A network thread with a store; an actor and reports of weight agents that reach it over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from learner.leases.admission import Rules
from learner.leases.group_outcomes import GroupOutcomes
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.no_progress import ProgressLimits
from learner.network.network_thread import NetworkThread
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.codec import encode_group
from protocol.config import NetworkConfig
from protocol.framing import Message, decode, encode
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, Lease, RunStatus, SubmitReply
from protocol.transport import Transport
from protocol.types import TrajectoryGroup
from protocol.weight_messages import EngineReply, EngineReport
from tests.leases.groups import GROUP_SIZE, RUN, VOCABULARY, make_group

WAIT_S = 20.0
NO_LIMITS = ProgressLimits()
DEFAULT_TIMEOUTS = LeaseTimeouts(lease_timeout_s=60.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """The settings of a learner in `folder`; the defaults are B = 2, eta = 1 and three steps."""

    folder: Path
    groups_per_batch: int = 2
    staleness_bound: int = 1
    num_steps: int = 3
    timeouts: LeaseTimeouts = DEFAULT_TIMEOUTS
    skip_zero_variance: bool = False
    full_retry_s: float = 2.0
    limits: ProgressLimits = NO_LIMITS
    num_first_samples: int = 0
    identity: Mapping[str, str] = field(default_factory=dict)

    @property
    def resume_key(self) -> dict[str, str]:
        return {
            "run_id": RUN,
            "groups_per_batch": str(self.groups_per_batch),
            "group_size": str(GROUP_SIZE),
            "staleness_bound": str(self.staleness_bound),
        }


@contextmanager
def open_network(
    setting: Setting, *, store: Store | None = None, on_death: Callable[[], None] | None = None
) -> Iterator[NetworkThread]:
    """A network thread as `run_learner` makes it, resumed from the store of the folder if there is one.

    Without `on_death`, the test fails if the thread fails. `store`: used in place of the folder's, and closed.
    """
    with closing(store or Store(RunFolder(setting.folder).store)) as store:
        store.claim(setting.resume_key)
        lease_table = store.restore_lease_table(
            groups_per_batch=setting.groups_per_batch,
            staleness_bound=setting.staleness_bound,
            num_steps=setting.num_steps,
            now_s=time.time(),
        )
        deaths: list[str] = []
        network = NetworkThread(
            network=NetworkConfig(),
            store=store,
            lease_table=lease_table,
            rules=Rules(RUN, GROUP_SIZE, VOCABULARY, setting.skip_zero_variance),
            timeouts=setting.timeouts,
            on_death=on_death or (lambda: deaths.append("died")),
            full_retry_s=setting.full_retry_s,
            identity=setting.identity,
            outcomes=GroupOutcomes(limits=setting.limits, num_first_samples=setting.num_first_samples),
        )
        with network:
            yield network
    assert deaths == []


class Actor:
    """An actor controlled by the test; it stores received messages by kind. Use `async with`.

    It has `capacity` trajectory slots, of which each lease in `held` uses GROUP_SIZE.
    """

    def __init__(self, address: str, *, name: str = "actor-0", incarnation: str = "1", capacity: int = 16) -> None:
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

    async def heartbeat(self, failures: Mapping[str, int] | None = None) -> None:
        held = sorted(self.held)
        await self.send(
            Heartbeat(
                actor=self.name,
                incarnation=self.incarnation,
                capacity=self.capacity,
                free_slots=max(0, self.capacity - GROUP_SIZE * len(held)),
                held=held,
                failures=dict(failures or {}),
            )
        )

    async def goodbye(self) -> None:
        await self.send(Goodbye(actor=self.name, incarnation=self.incarnation))

    async def send(self, message: Message) -> None:
        await self.dealer.send([encode(message)])

    async def submit(self, group: TrajectoryGroup, *, lease_id: int) -> SubmitReply:
        """Sends the group and waits for the reply to it."""
        num_replies = len(self.replies)
        await self.dealer.send(encode_group(group, lease_id=lease_id))
        await self.until(lambda: len(self.replies) > num_replies)
        return self.replies[-1]

    async def answer(self, lease: Lease, **changes: object) -> SubmitReply:
        reply = await self.submit(replace(make_group(lease), **changes), lease_id=lease.lease_id)
        self.held.discard(lease.lease_id)
        return reply

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until received messages make `condition` true."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_leased(self, num: int) -> list[Lease]:
        """Sends a heartbeat (for the free slots), then waits until `num` leases have arrived in total."""
        await self.heartbeat()
        await self.until(lambda: len(self.leases) >= num)
        return self.leases

    async def until_status(self) -> RunStatus:
        """Sends a heartbeat and waits for its reply: everything sent before has been handled."""
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
    network: NetworkThread, *, version: int, publication: int = 1, state: str = "serving"
) -> EngineReply:
    """Sends a weight agent's report over the wire and returns the reply."""
    transport = Transport()
    try:
        dealer = transport.dealer(network.weights_address)
        fields = EngineFields(name="engine-0", url="http://127.0.0.1:1", version=version, publication=publication)
        report = EngineReport.model_validate({"request_id": next(_request_ids), "engine": fields, "state": state})
        await dealer.send([encode(report)])
        async with asyncio.timeout(WAIT_S):
            message, _ = decode(await dealer.recv())
        assert isinstance(message, EngineReply)
        return message
    finally:
        transport.close()


async def serve_version(network: NetworkThread, version: int) -> None:
    """Publishes `version` and reports an engine that has committed it."""
    publication = await asyncio.to_thread(lambda: network.publish(_tiny_safetensors(), version=version))
    await report_engine(network, version=version, publication=publication)


def _tiny_safetensors() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


async def next_batch(network: NetworkThread) -> list[TrajectoryGroup]:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(network.run, network.coordinator.next_batch())


async def commit_batch(network: NetworkThread, batch: list[TrajectoryGroup]) -> None:
    await asyncio.to_thread(network.run, network.coordinator.commit_batch([group.cursor for group in batch]))
