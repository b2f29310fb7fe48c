"""The actor's main loop: takes leases, rolls out one group for each, and sends each group until it is acknowledged.

    Lease ──► rollout (G episodes) ──► SubmitGroup ──► unacknowledged ──► SubmitReply: dropped
                  │                        ▲                  │
                  ▼                        └──────────────────┘ sent again while not acknowledged
              free slots ──► Heartbeat: the ids of all leases that it holds, and the free trajectory slots

    task         consumes                       produces                         waits for             unblocked by
    receive      messages of the coordinator    rollout tasks; drops groups      the next message      the coordinator
    roll out     one lease (a task each)        an unacknowledged group, sent    engines, retriever    their responses
    heartbeats   free slots, the clock          heartbeats; sends groups again   heartbeat_s           a free slot
    drain        the drain event (SIGTERM)      the end of `run`                 acknowledgements      replies, drain_s

A lease claims `group_size` slots at once; each trajectory that ends gives one back. The number of leases is limited by
the learner: by free slots, and by its staleness bound. So that bound also limits the groups that are kept here.

Heartbeats are sent every heartbeat_s, and without delay if slots are free and the learner does not know of any. It
knows of free slots from the last heartbeat, less `group_size` for each lease since. So there is at most one additional
heartbeat for each lease, and none earlier than min_heartbeat_s after the last.

No task waits for the learner to read a message: while it is absent, heartbeats are dropped and groups are kept. If it
is slow, a group is sent again only after a RunStatus has arrived since the group was last sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from protocol.codec import encode_group
from protocol.errors import ConfigError, ProtocolError
from protocol.fault_injection import fault_point
from protocol.framing import Buffer, decode, encode
from protocol.messages import Drain, EngineFields, Goodbye, Heartbeat, Lease, RunStatus, SubmitReply
from protocol.transport import Dealer
from protocol.types import TrajectoryGroup

log = logging.getLogger(__name__)

Rollout = Callable[[Lease, Callable[[], None]], Awaitable[TrajectoryGroup]]
"""Rolls out the group of a lease. Calls its second argument at the end of each trajectory: its slot is free."""

DRAINED = "stopped by a signal; its leases were given back"


@dataclass(slots=True)
class _FinishedGroup:
    """A group that is not acknowledged. `sent_s`: event-loop time at which it was last sent; None: not yet sent."""

    frames: list[Buffer]
    sent_s: float | None = None


class Runner:
    """Exchanges messages with the coordinator for one actor.

    `run` returns when the learner ends the run (Drain), or after `drain` is set and all groups are acknowledged.

    capacity     trajectory slots; `rollout` runs no more trajectories at once
    on_engines   called with the engines of each RunStatus
    counters     returns the counters of each heartbeat
    failures     returns FAILED trajectories by reason since the start, at most MAX_SENT_REASONS reasons
    resend_s     a group is sent again if it is not acknowledged after this time and a RunStatus arrived since: the
                 learner was restarted, or the message was lost. Without the second condition, a learner that does not
                 read would later find many copies of each group.
    drain        when it is set, the actor takes no new lease
    drain_s      `run` returns at the latest this long after `drain` was set; unfinished groups are lost, their leases
                 are given back
    identity     of the run that the actor works for (`protocol.run_identity`); sent in each heartbeat

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
        failures: Callable[[], Mapping[str, int]] = dict,
        heartbeat_s: float,
        min_heartbeat_s: float = 0.05,
        resend_s: float = 5.0,
        drain: asyncio.Event | None = None,
        drain_s: float = 0.0,
        identity: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._name = name
        self._incarnation = secrets.token_hex(8)
        self._capacity = capacity
        self._dealer = dealer
        self._rollout = rollout
        self._on_engines = on_engines
        self._counters = counters
        self._failures = failures
        self._heartbeat_s = heartbeat_s
        self._min_heartbeat_s = min(min_heartbeat_s, heartbeat_s)
        self._resend_s = resend_s
        self._drain = drain or asyncio.Event()
        self._drain_s = drain_s
        self._identity = dict(identity)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._claims: dict[int, int] = {}
        """Lease → its trajectories that have not ended: they run or wait for a slot."""
        self._unacknowledged: dict[int, _FinishedGroup] = {}
        self._group_left = asyncio.Event()
        self._heartbeat_due = asyncio.Event()
        self._known_free = 0
        self._last_status_s = -math.inf
        self.num_sent = 0
        self.num_refused = 0

    async def run(self) -> str:
        """Returns the reason of the end. On exit, also if cancelled, frees all leases.

        Raises: ConfigError if the learner refuses this actor.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                receiving = tasks.create_task(self._receive(tasks))
                draining = tasks.create_task(self._wait_until_drained())
                heartbeats = tasks.create_task(self._send_heartbeats())
                ended, _ = await asyncio.wait([receiving, draining], return_when=asyncio.FIRST_COMPLETED)
                reason = ended.pop().result()
                for task in (receiving, draining, heartbeats, *self._running.values()):
                    task.cancel()
            return reason
        finally:
            await self._send_goodbye()

    @property
    def free_slots(self) -> int:
        """Slots that no trajectory uses or waits for."""
        return 0 if self._drain.is_set() else max(0, self._capacity - sum(self._claims.values()))

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
                case Lease() if self._drain.is_set():
                    pass  # no heartbeat will list it, so the learner issues it again
                case Lease() if message.lease_id not in self._held_leases():
                    self._claims[message.lease_id] = message.group_size
                    self._known_free -= message.group_size
                    task = tasks.create_task(self._roll_out(message), name=f"group {message.cursor}")
                    self._running[message.lease_id] = task
                case SubmitReply():
                    self._handle_reply(message)
                case Drain(refused=True):
                    raise ConfigError(f"this actor may not join the run: {message.reason}")
                case Drain():
                    return message.reason
                case _:
                    log.warning("ignored an unexpected message: %s", message.kind)

    async def _wait_until_drained(self) -> str:
        """Returns when `drain` is set and all groups are acknowledged, or drain_s later."""
        await self._drain.wait()
        log.info("draining: no new lease; %d groups finish in at most %g s", len(self._held_leases()), self._drain_s)
        self._heartbeat_due.set()
        try:
            async with asyncio.timeout(self._drain_s):
                while self._held_leases():
                    self._group_left.clear()
                    await self._group_left.wait()
        except TimeoutError:
            log.warning(
                "not drained in %g s: %d groups are not finished, %d finished ones not acknowledged; "
                "their leases are given back",
                self._drain_s,
                len(self._running),
                len(self._unacknowledged),
            )
        return DRAINED

    def _held_leases(self) -> set[int]:
        """Leases whose group is being rolled out or is not acknowledged."""
        return {*self._running, *self._unacknowledged}

    async def _roll_out(self, lease: Lease) -> None:
        """Rolls out the group of one lease and sends it."""
        try:
            group = await self._rollout(lease, lambda: self._release_slot(lease.lease_id))
            # Raises if the coordinator could not decode the group: it would not reply, and the group would never be
            # acknowledged.
            frames = encode_group(group, lease_id=lease.lease_id)
            finished = self._unacknowledged[lease.lease_id] = _FinishedGroup(frames)
            fault_point("actor.finished")
            self._try_send(finished)
            fault_point("actor.sent")
        finally:
            del self._running[lease.lease_id]
            del self._claims[lease.lease_id]
            self._report_free_slots()
            self._group_left.set()

    def _release_slot(self, lease_id: int) -> None:
        """Call it at the end of each trajectory of a lease."""
        if self._claims.get(lease_id, 0) > 0:
            self._claims[lease_id] -= 1
            self._report_free_slots()

    def _report_free_slots(self) -> None:
        """Makes a heartbeat due if slots are free and the learner does not know of any."""
        if self.free_slots > 0 and self._known_free <= 0:
            self._heartbeat_due.set()

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
        self._group_left.set()

    async def _send_heartbeats(self) -> None:
        """Sends a heartbeat, and the groups that are due, every `heartbeat_s` and when a heartbeat is due earlier."""
        while True:
            self._heartbeat_due.clear()
            self._send_heartbeat()
            for group in list(self._unacknowledged.values()):
                if self._must_send(group):
                    self._try_send(group)
            await asyncio.sleep(self._min_heartbeat_s)
            try:
                async with asyncio.timeout(self._heartbeat_s - self._min_heartbeat_s):
                    await self._heartbeat_due.wait()
            except TimeoutError:
                pass

    def _send_heartbeat(self) -> None:
        """Sends the actor's state if the socket can take it now."""
        free_slots = self.free_slots
        heartbeat = Heartbeat(
            actor=self._name,
            incarnation=self._incarnation,
            capacity=self._capacity,
            free_slots=free_slots,
            held=sorted(self._held_leases()),
            draining=self._drain.is_set(),
            counters=self._counters(),
            failures=dict(self._failures()),
            identity=self._identity,
        )
        if self._dealer.try_send([encode(heartbeat)]):
            self._known_free = free_slots

    async def _send_goodbye(self) -> None:
        """Sends Goodbye, so that the coordinator frees this actor's leases. Waits at most 1 s."""
        try:
            await self._dealer.send([encode(Goodbye(actor=self._name, incarnation=self._incarnation))], timeout_s=1.0)
        except TimeoutError:
            log.warning("Goodbye could not be sent in 1 s: the leases will expire")
