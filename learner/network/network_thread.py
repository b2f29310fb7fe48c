"""The learner's network thread: one asyncio event loop that runs the coordinator and the publisher.

    main thread                        network thread
    training loop ── run(coroutine) ─► coordinator.serve ◄──── ROUTER (control) ────► actors
                  ◄─ its result ────── publisher.serve   ◄──── ROUTER (weights) ────► weight agents
                                                         ────► PUB (announcements) ─► weight agents

The main thread waits for the result of `run`; the two threads share nothing else. The store is used by the network
thread only. If a task of the network thread fails, `on_death` is called in that thread, and the next `run` and the
exit of the context manager raise the error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import TypeVar

from learner.leases.admission import Rules
from learner.leases.engines import Engines
from learner.leases.group_outcomes import GroupOutcomes
from learner.leases.lease_table import LeaseTable
from learner.leases.lease_timeouts import LeaseTimeouts
from learner.network.coordinator import Coordinator
from learner.network.publisher import MAX_REQUEST_BYTES, Publisher
from learner.network.weight_deltas import Series
from learner.store.store import Store
from protocol.config import NetworkConfig
from protocol.connection_guard import ConnectionLimits
from protocol.errors import PalimpsestError
from protocol.rate_limit import PeerRate
from protocol.transport import Transport
from protocol.weight_messages import CanaryFields

log = logging.getLogger(__name__)

T = TypeVar("T")

THREAD_NAME = "network"
# An honest actor sends two heartbeats per second, and a group with a heartbeat for each lease.
ACTOR_RATE = PeerRate(per_s=1_000.0, burst=4_000.0)
# Pause before a write to a full disk is retried.
FULL_RETRY_S = 2.0


class NetworkThread:
    """A context manager that starts and stops the thread.

    on_death  called in the network thread if one of its tasks fails, so that the main thread can be interrupted
    outcomes  counts failed and skipped groups; its limits end the run
    identity  the run's, which actors must agree with; empty: every actor is accepted

    Raises (on entry): UnreachableError, SecurityError, DataError.
    """

    def __init__(
        self,
        *,
        network: NetworkConfig,
        store: Store,
        lease_table: LeaseTable,
        rules: Rules,
        timeouts: LeaseTimeouts,
        on_death: Callable[[], None],
        full_retry_s: float = FULL_RETRY_S,
        identity: Mapping[str, str] = MappingProxyType({}),
        outcomes: GroupOutcomes | None = None,
    ) -> None:
        self._network = network
        self._store = store
        self._lease_table = lease_table
        self._rules = rules
        self._timeouts = timeouts
        self._full_retry_s = full_retry_s
        self._identity = identity
        self._outcomes = outcomes
        self._on_death = on_death
        self._thread = threading.Thread(target=self._main, name=THREAD_NAME, daemon=True)
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self._series = Series(rules.run_id)
        self.engines = Engines(max_engines=network.max_engines)
        self.coordinator: Coordinator
        self.publisher: Publisher

    def __enter__(self) -> NetworkThread:
        self._thread.start()
        try:
            self._loop = self._ready.result()
        except BaseException:
            self._thread.join()  # it may still use the store, which the caller may close
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # the thread has failed, and its event loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._error is not None:
            raise PalimpsestError(f"the network thread failed: {self._error!r}") from self._error

    def run(self, coroutine: Coroutine[object, object, T], *, timeout_s: float | None = None) -> T:
        """Runs the coroutine in the network thread and returns its result.

        Raises: PalimpsestError if the network thread failed; TimeoutError.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:  # its event loop is closed
            coroutine.close()
            raise PalimpsestError(f"the network thread failed: {self._error!r}") from (self._error or error)
        return future.result(timeout_s)

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> int:
        """Publishes weights (the bytes of a safetensors file) and returns their publication id.

        The id is durable before the weights are offered. The delta is encoded in the calling thread, because that takes
        seconds for a large model and the network thread must answer messages meanwhile.
        """
        publication = self.run(self.coordinator.new_publication(version))
        offer = self._series.make_offer(data, publication=publication, version=version, canary=canary)
        self.run(self.publisher.announce(offer))
        return publication

    @property
    def control_address(self) -> str:
        return self.coordinator.address

    @property
    def weights_address(self) -> str:
        return self.publisher.weights_address

    @property
    def announce_address(self) -> str:
        return self.publisher.announce_address

    async def wait_committed(self, version: int, *, timeout_s: float) -> bool:
        """Waits until every serving engine has committed `version`. Returns False after `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while (lowest := self.engines.lowest_version(now_s=loop.time())) is None or lowest < version:
            if loop.time() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    def _main(self) -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(self._store.wal_checkpointing())
                asyncio.run(self._serve())
            except BaseException as error:
                if self._ready.done():
                    self._error = error
                    log.critical("the network thread failed", exc_info=error)
                    self._on_death()
                else:
                    self._ready.set_exception(error)

    async def _serve(self) -> None:
        transport = Transport(keys=self._network.keys)
        limits = ConnectionLimits(
            max_connections=self._network.max_peers, max_total_unread_bytes=self._network.max_unread_mb << 20
        )
        try:
            self.coordinator = Coordinator(
                router=transport.router(self._network.control_address, limits=limits, rate=ACTOR_RATE),
                store=self._store,
                lease_table=self._lease_table,
                engines=self.engines,
                rules=self._rules,
                timeouts=self._timeouts,
                full_retry_s=self._full_retry_s,
                identity=self._identity,
                outcomes=self._outcomes,
                max_actors=self._network.max_peers,
            )
            self.publisher = Publisher(
                router=transport.router(
                    self._network.weights_address, max_frame_bytes=MAX_REQUEST_BYTES, limits=limits
                ),
                announcements=transport.publisher(self._network.announce_address),
                engines=self.engines,
                run_id=self._rules.run_id,
                on_engines_changed=self.coordinator.engines_changed,
            )
            self._ready.set_result(asyncio.get_running_loop())
            serving = [
                asyncio.create_task(self.coordinator.serve(), name="coordinator"),
                asyncio.create_task(self.publisher.serve(), name="publisher"),
            ]
            stopping = asyncio.create_task(self._stop.wait())
            done, _ = await asyncio.wait([*serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
            for task in done:
                task.result()
        finally:
            transport.close()
