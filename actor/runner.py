"""The actor's main loop: takes leases, rolls out one group for each, and sends each group until it is acknowledged.

    Lease ──► rollout (G episodes, bounded) ──► SubmitGroup ──► unacknowledged ──► SubmitReply: dropped
                                                   ▲                  │
                                                   └──────────────────┘ sent again while not acknowledged
    Heartbeat every heartbeat_s and after each acknowledgement: the capacity and the ids of all leases that it holds

    task         consumes                       produces                         waits for             unblocked by
    receive      messages of the coordinator    rollout tasks; drops groups      the next message      the coordinator
    roll out     one lease (a task each)        an unacknowledged group, sent    engines, retriever    their responses
    heartbeats   acknowledgements, the clock    heartbeats; sends groups again   heartbeat_s           a SubmitReply

The number of leases is limited by `capacity` and by the learner's staleness bound. No task waits for the learner to
read a message: while it is absent, heartbeats are dropped and groups are kept. If it is slow, a group is sent again
only after a RunStatus has arrived since the group was last sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from protocol.codec import encode_group
from protocol.errors import ProtocolError
from protocol.fault_injection import fault_point
from protocol.framing import Buffer, decode, encode
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, Lease, RunStatus, SubmitReply
from protocol.transport import Dealer
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)

Rollout = Callable[[Lease], Awaitable[TrajectoryGroup]]


@dataclass(slots=True)
class _FinishedGroup:
    """A group that is not acknowledged. `sent_s`: event-loop time at which it was last sent; None: not yet sent."""

    frames: list[Buffer]
    sent_s: float | None = None


class Runner:
    """Exchanges messages with the coordinator for one actor. `run` returns when the run is over (Drain).

    capacity     largest number of leases held at once
    on_engines   called with the engines of each RunStatus
    counters     returns the counters of each heartbeat
    resend_s     a group is sent again if it is not acknowledged after this time and a RunStatus arrived since: the
                 learner was restarted, or the message was lost. Without the second condition, a learner that does not
                 read would later find many copies of each group.

    `num_sent`: groups sent, each counted once. `num_refused`: groups that the coordinator refused.
    """

    def __init__(
        self,
        *,
        name: str,
        capacity: int,
        dealer: Dealer,
        rollout: Rollout,
        on_engines: Callable[[Sequence[EngineFields]], None],
        counters: Callable[[], dict[str, float]],
        heartbeat_s: float,
        resend_s: float = 5.0,
    ) -> None:
        self._name = name
        self._incarnation = secrets.token_hex(8)
        self._capacity = capacity
        self._dealer = dealer
        self._rollout = rollout
        self._on_engines = on_engines
        self._counters = counters
        self._heartbeat_s = heartbeat_s
        self._resend_s = resend_s
        self._running: dict[int, asyncio.Task[None]] = {}
        self._unacknowledged: dict[int, _FinishedGroup] = {}
        self._acknowledged = asyncio.Event()
        self._last_status_s = -math.inf
        self.num_sent = 0
        self.num_refused = 0

    async def run(self) -> str:
        """Runs until the coordinator sends Drain; returns its reason. On exit, also if cancelled, frees all leases."""
        try:
            async with asyncio.TaskGroup() as tasks:
                heartbeats = tasks.create_task(self._send_heartbeats())
                reason = await self._receive(tasks)
                heartbeats.cancel()
                for task in self._running.values():
                    task.cancel()
            return reason
        finally:
            await self._send_goodbye()

    async def _receive(self, tasks: asyncio.TaskGroup) -> str:
        """Handles messages until a Drain; returns its reason. Starts one task in `tasks` for each new lease."""
        while True:
            frames = await self._dealer.recv()
            try:
                message, _ = decode(frames)
            except ProtocolError as error:
                log.warning("refused a message: %s", error)
                continue
            match message:
                case RunStatus():
                    self._last_status_s = asyncio.get_running_loop().time()
                    self._on_engines(message.engines)
                case Lease() if message.lease_id not in self._held_leases():
                    task = tasks.create_task(self._roll_out(message), name=f"group {message.cursor}")
                    self._running[message.lease_id] = task
                case SubmitReply():
                    self._handle_reply(message)
                case Drain():
                    return message.reason
                case _:
                    log.warning("ignored an unexpected message: %s", message.kind)

    def _held_leases(self) -> set[int]:
        """Leases whose group is being rolled out or is not acknowledged."""
        return {*self._running, *self._unacknowledged}

    async def _roll_out(self, lease: Lease) -> None:
        """Rolls out the group of one lease and sends it."""
        try:
            group = await self._rollout(lease)
            # Raises if the coordinator could not decode the group: it would not reply, and the group would never be
            # acknowledged.
            frames = encode_group(group, lease_id=lease.lease_id)
            finished = self._unacknowledged[lease.lease_id] = _FinishedGroup(frames)
            fault_point("actor.finished")
            self._try_send(finished)
            fault_point("actor.sent")
        finally:
            del self._running[lease.lease_id]

    def _try_send(self, group: _FinishedGroup) -> None:
        """Sends the group if the socket can take it now; if not, the heartbeat task tries again."""
        if self._dealer.try_send(group.frames):
            self.num_sent += group.sent_s is None
            group.sent_s = asyncio.get_running_loop().time()

    def _must_send(self, group: _FinishedGroup) -> bool:
        """Whether the group was not sent yet, or must be sent again (see `resend_s`)."""
        if group.sent_s is None:
            return True
        now_s = asyncio.get_running_loop().time()
        return now_s - group.sent_s > self._resend_s and self._last_status_s > group.sent_s

    def _handle_reply(self, reply: SubmitReply) -> None:
        if self._unacknowledged.pop(reply.lease_id, None) is None:
            return
        fault_point("actor.acknowledged")
        if reply.outcome == "refused":
            self.num_refused += 1
            log.warning("the coordinator refused a group: %s", reply.reason)
        self._acknowledged.set()

    async def _send_heartbeats(self) -> None:
        """Sends a heartbeat, and the groups that are due, every `heartbeat_s` and after each acknowledgement."""
        while True:
            heartbeat = Heartbeat(
                actor=self._name,
                incarnation=self._incarnation,
                capacity=self._capacity,
                held=sorted(self._held_leases()),
                counters=self._counters(),
            )
            self._acknowledged.clear()
            self._dealer.try_send([encode(heartbeat)])
            for group in list(self._unacknowledged.values()):
                if self._must_send(group):
                    self._try_send(group)
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._acknowledged.wait()
            except TimeoutError:
                pass

    async def _send_goodbye(self) -> None:
        """Sends Goodbye, so that the coordinator frees this actor's leases. Waits at most 1 s."""
        try:
            await self._dealer.send([encode(Goodbye(actor=self._name, incarnation=self._incarnation))], timeout_s=1.0)
        except TimeoutError:
            log.warning("Goodbye could not be sent in 1 s: the leases will expire")
