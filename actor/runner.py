"""The actor's runner: takes leases against its credits, rolls groups out at once, sends each until it is acknowledged.

    Lease ──► rollout (G episodes, bounded) ──► SubmitGroup ──► held ──► SubmitReply: dropped
                                                   ▲               │
                                                   └───────────────┘ again while not acknowledged, over any reconnect
    Heartbeat every heartbeat_s and on each change: capacity and all held leases, absolute

It waits for leases (the staleness bound holds them back), for engines and the retriever (inside a rollout), and for
acknowledgements; never for the learner to read. A learner that is absent costs it nothing: heartbeats are dropped, and
groups are held. One that is slow gets a group again only once it has been heard since the last time.
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
from protocol.messages import (
    Drain,
    EngineFields,
    Goodbye,
    Heartbeat,
    Lease,
    RunStatus,
    SubmitReply,
)
from protocol.transport import Dealer
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)

Rollout = Callable[[Lease], Awaitable[TrajectoryGroup]]

# A group is sent again when it is not acknowledged for so long and a RunStatus came since: the learner was restarted,
# or the message was lost. Without the RunStatus, a learner that does not read would find each group many times over.
RESEND_S = 5.0


@dataclass(slots=True)
class _Held:
    """A finished group until its acknowledgement. `sent_s`: when it was last sent, None for not yet."""

    frames: list[Buffer]
    sent_s: float | None = None


class Runner:
    """One actor's conversation with the coordinator. `run` returns when the run is over (Drain)."""

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
    ) -> None:
        self._name = name
        self._incarnation = secrets.token_hex(8)
        self._capacity = capacity
        self._dealer = dealer
        self._rollout = rollout
        self._on_engines = on_engines
        self._counters = counters
        self._heartbeat_s = heartbeat_s
        self._running: dict[int, asyncio.Task[None]] = {}
        self._held: dict[int, _Held] = {}
        self._changed = asyncio.Event()
        self._status_s = -math.inf
        self.num_sent = 0
        self.num_refused = 0

    async def run(self) -> str:
        """Until the coordinator says Drain; its reason. Cancelled or not, the leases are given back."""
        try:
            async with asyncio.TaskGroup() as tasks:
                heartbeat = tasks.create_task(self._heartbeats())
                reason = await self._receive(tasks)
                heartbeat.cancel()
                for task in self._running.values():
                    task.cancel()
            return reason
        finally:
            await self._goodbye()

    async def _receive(self, tasks: asyncio.TaskGroup) -> str:
        while True:
            frames = await self._dealer.recv()
            try:
                message, _ = decode(frames)
            except ProtocolError as error:
                log.warning("refused a message: %s", error)
                continue
            match message:
                case RunStatus():
                    self._status_s = asyncio.get_running_loop().time()
                    self._on_engines(message.engines)
                case Lease() if message.lease_id not in self._running and message.lease_id not in self._held:
                    task = tasks.create_task(self._work(message), name=f"group {message.cursor}")
                    self._running[message.lease_id] = task
                case SubmitReply():
                    self._acknowledged(message)
                case Drain():
                    return message.reason
                case _:
                    log.warning("ignored a %s", message.kind)

    async def _work(self, lease: Lease) -> None:
        try:
            group = await self._rollout(lease)
            # Raises where the coordinator could not read it: it would have no answer, and be held for ever.
            frames = encode_group(group, lease_id=lease.lease_id)
            held = self._held[lease.lease_id] = _Held(frames)
            fault_point("actor.finished")
            self._send(held)
            fault_point("actor.sent")
        finally:
            del self._running[lease.lease_id]

    def _send(self, held: _Held) -> None:
        """Where the learner cannot take it, the group stays as it is, for a later heartbeat to find."""
        if self._dealer.try_send(held.frames):
            self.num_sent += held.sent_s is None
            held.sent_s = asyncio.get_running_loop().time()

    def _is_due(self, held: _Held) -> bool:
        if held.sent_s is None:
            return True
        now_s = asyncio.get_running_loop().time()
        return now_s - held.sent_s > RESEND_S and self._status_s > held.sent_s

    def _acknowledged(self, reply: SubmitReply) -> None:
        if self._held.pop(reply.lease_id, None) is None:
            return
        fault_point("actor.acknowledged")
        if reply.outcome == "refused":
            self.num_refused += 1
            log.warning("the coordinator refused a group: %s", reply.reason)
        self._changed.set()

    async def _heartbeats(self) -> None:
        while True:
            heartbeat = Heartbeat(
                actor=self._name,
                incarnation=self._incarnation,
                capacity=self._capacity,
                held=sorted({*self._running, *self._held}),
                counters=self._counters(),
            )
            self._changed.clear()
            self._dealer.try_send([encode(heartbeat)])
            for held in list(self._held.values()):
                if self._is_due(held):
                    self._send(held)
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _goodbye(self) -> None:
        try:
            await self._dealer.send([encode(Goodbye(actor=self._name, incarnation=self._incarnation))], timeout_s=1.0)
        except TimeoutError:
            log.warning("could not say goodbye: the leases will expire")
