"""The learner of a simulation: a simulated coordinator and training loop around the real scheduler and store."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from learner.leases.admission import Rules
from learner.leases.decisions import Decision
from learner.leases.engines import Engines
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.leases.scheduler import Scheduler
from learner.store.retention import drop_tokens, expired_steps
from learner.store.run_folder import RunFolder
from learner.store.store import Store
from protocol.errors import StoreFullError
from protocol.framing import Buffer, Message, decode
from protocol.messages import Goodbye, Heartbeat, Lease, SubmitGroup, SubmitReply
from protocol.weight_messages import EngineReport
from tests.store.full_disk import fill_up, make_room

if TYPE_CHECKING:
    from tests.leases.simulation import World

T = TypeVar("T")

RUN = "simulated"
GROUP_SIZE = 2
VOCABULARY = 50
TICK_S = 0.5
LEASE_TIMEOUT_S = 6.0
KEEP_BYTES = 20_000


class Crash(Exception):
    """Raised at the point at which the learner is killed."""


class SimulatedLearner:
    """`scheduler` is None while the learner is down. `weights`: the cursors that were trained, in order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.scheduler: Scheduler | None = None
        self.weights: list[int] = []
        self.acknowledged: set[int] = set()
        self.newest = (-1, -1)
        """(version, publication) that engines can fetch."""
        self.stepped_s = 0.0
        self._checkpoint: list[int] = []
        self._num_starts = 0
        self._is_training = False

    @property
    def step(self) -> int:
        return len(self.weights) // self.world.shape.groups_per_batch

    def describe(self) -> str:
        if self.scheduler is None:
            return "the learner is down"
        lease_table = self.scheduler.lease_table
        return f"{lease_table.counts()}, serving {self.scheduler.serving}, actors {dict(self.scheduler.actors)}"

    # --- start and kill ---

    def start(self) -> None:
        """Loads the newest checkpoint, trains the later batches of the log again, publishes."""
        if self.scheduler is not None:
            return
        shape = self.world.shape
        self._num_starts += 1
        self._is_training = False
        self.store = Store(RunFolder(self.world.folder).store, fault_point=self.fault_point)
        self.store.query("PRAGMA synchronous = OFF")
        self.store.claim(
            {
                "run_id": RUN,
                "groups_per_batch": str(shape.groups_per_batch),
                "staleness_bound": str(shape.staleness_bound),
            }
        )
        self.weights = list(self._checkpoint)
        for step in range(self.step, self.store.num_batches()):
            self.weights += [self.store.group(cursor).cursor for cursor in self.store.batch(step)]
        self.engines = Engines()
        self.scheduler = Scheduler(
            self._stored_lease_table(),
            rules=Rules(RUN, GROUP_SIZE, VOCABULARY, skip_zero_variance=True),
            timeouts=LeaseTimeouts(LEASE_TIMEOUT_S, shape.straggler_timeout_s),
            publications=self.store.publications(),
            num_failures=self.store.num_failures(),
            started_s=self.world.now_s,
        )
        self._schedule(0.0, self._publish)
        self._schedule(TICK_S, self._tick)

    def kill(self) -> None:
        if self.scheduler is not None:
            self.world.seen["learner killed"] += 1
            self.stop()
            self.world.after(self.world.random.uniform(0.1, 10.0), self.start)

    def stop(self) -> None:
        if self.scheduler is not None:
            self.scheduler = None
            self.store.close()

    def fault_point(self, name: str) -> None:
        """Called by the store before and after every commit."""
        if self.scheduler is not None and self.world.chance(0.0005):
            self.world.seen["learner killed at a commit"] += 1
            raise Crash(name)

    def fill_disk(self) -> None:
        """Prevents the store's file from growing for 1 to 20 s."""
        if self.scheduler is not None:
            fill_up(self.store)
            self._schedule(self.world.random.uniform(1.0, 20.0), self._free_disk)

    def _free_disk(self) -> None:
        make_room(self.store)

    def _schedule(self, delay_s: float, event: Callable[[], None]) -> None:
        """Runs `event` after `delay_s` unless the learner is killed before."""
        num_starts = self._num_starts
        self.world.after(
            delay_s, lambda: event() if num_starts == self._num_starts and self.scheduler is not None else None
        )

    def _maybe_crash(self, probability: float, where: str) -> None:
        if self.world.chance(probability):
            self.world.seen[f"learner killed {where}"] += 1
            raise Crash(where)

    # --- messages ---

    def receive(self, peer: bytes, message: Message | list[Buffer]) -> None:
        """`message`: the frames of a group, or another message, decoded."""
        if self.scheduler is None:
            return
        now_s = self.world.now_s
        match message:
            case Heartbeat():
                decision = self.scheduler.on_heartbeat(peer, message, now_s=now_s)
            case Goodbye():
                decision = self.scheduler.on_goodbye(message, now_s=now_s)
            case EngineReport():
                self.engines.report(message, now_s=now_s)
                decision = self.scheduler.on_engines(self.engines.serving(now_s=now_s), now_s=now_s)
            case list():
                decision = self._on_group(peer, message)
            case _:
                raise AssertionError(message)
        self._carry_out(decision)

    def _on_group(self, peer: bytes, frames: list[Buffer]) -> Decision:
        assert self.scheduler is not None
        message, _ = decode(frames)
        assert isinstance(message, SubmitGroup)
        decision = self.scheduler.on_group(peer, message, frames, now_s=self.world.now_s)
        for send in decision.sends:
            if isinstance(send.message, SubmitReply):
                self.world.seen[send.message.outcome] += 1
                self.world.seen["zero variance"] += send.message.reason == "zero variance"
                self._answered = message.cursor
        return decision

    def _carry_out(self, decision: Decision) -> bool:
        """Mirrors `Coordinator._carry_out`."""
        assert self.scheduler is not None
        if self._durably(lambda: self.store.commit(decision.records) or True) is None:
            return False
        undelivered = []
        for send in decision.sends:
            self._maybe_crash(0.0005, "between answers")
            if isinstance(send.message, SubmitReply) and send.message.outcome == "accepted":
                self.acknowledged.add(self._answered)
            actor = self.world.actors[send.peer.decode().partition("/")[0]]
            if isinstance(send.message, Lease) and not actor.is_connected(send.peer):
                undelivered.append(send.message.lease_id)
            self.world.deliver(lambda actor=actor, send=send: actor.receive(send.peer, send.message))
        if undelivered:
            self.world.seen["lease undelivered"] += len(undelivered)
            self._carry_out(self.scheduler.on_undelivered(undelivered, now_s=self.world.now_s))
        shape = self.world.shape
        in_flight = len(self.scheduler.lease_table.entries)
        assert in_flight <= (shape.staleness_bound + 1) * shape.groups_per_batch, f"{in_flight} groups are in flight"
        return True

    def _durably(self, write: Callable[[], T]) -> T | None:
        assert self.scheduler is not None
        try:
            return write()
        except StoreFullError:
            self.world.seen["disk full"] += 1
            self.scheduler.pause(self._stored_lease_table(), num_failures=self.store.num_failures())
            self._schedule(2.0, self.scheduler.resume)
            return None

    def _stored_lease_table(self) -> LeaseTable:
        shape = self.world.shape
        return self.store.restore_lease_table(
            groups_per_batch=shape.groups_per_batch,
            staleness_bound=shape.staleness_bound,
            num_steps=shape.num_steps,
            now_s=self.world.now_s,
        )

    # --- the loop ---

    def _tick(self) -> None:
        assert self.scheduler is not None
        now_s = self.world.now_s
        self._carry_out(self.scheduler.on_tick(self.engines.serving(now_s=now_s), now_s=now_s))
        if not self._is_training and self.scheduler.lease_table.ready_batch() is not None:
            self._is_training = True
            self._schedule(self.world.random.uniform(0.1, 1.0), self._train)
        self._schedule(TICK_S, self._tick)

    def _train(self) -> None:
        """One step: logs the batch, sometimes makes a checkpoint, publishes."""
        assert self.scheduler is not None
        lease_table = self.scheduler.lease_table
        cursors, step = lease_table.ready_batch(), lease_table.step
        assert cursors is not None
        assert step == self.step
        for cursor in cursors:
            self._check_age(cursor, step)
        if not self._carry_out(self.scheduler.on_batch_trained(cursors)):
            self._schedule(2.0, self._train)
            return
        self.weights += cursors
        self.stepped_s = self.world.now_s
        self._is_training = False
        self._maybe_crash(0.02, "between log and checkpoint")
        if self.world.random.random() < 0.3:
            self._checkpoint = list(self.weights)
            self._maybe_crash(0.05, "between checkpoint and retention")
            for old in list(
                expired_steps(self.store, checkpoint_step=self.step, keep_steps=None, keep_bytes=KEEP_BYTES)
            ):
                self._durably(lambda old=old: drop_tokens(self.store, old))
        self._publish()

    def _check_age(self, cursor: int, step: int) -> None:
        """Only an overtaken straggler may have tokens beyond the bound; they are masked."""
        (oldest,) = self.store.query("SELECT oldest_version FROM groups WHERE cursor = ?", cursor)[0]
        if oldest is not None and oldest < step - self.world.shape.staleness_bound:
            overtaken = self.store.query("SELECT 1 FROM moves WHERE cursor = ? AND to_slot > from_slot", cursor)
            assert overtaken, f"group {cursor} of version {oldest} is trained at step {step}"
            self.world.seen["group over age"] += 1

    def _publish(self) -> None:
        assert self.scheduler is not None
        version = self.step
        publication = self._durably(lambda: self.store.new_publication(version))
        if publication is None:
            self._schedule(2.0, self._publish)
            return
        self.scheduler.on_publication(publication, version=version)
        self.newest = (version, publication)
