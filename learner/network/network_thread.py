"""The learner's network side: one thread, one asyncio loop, in which the coordinator and the publisher live.

The training loop, in the main thread, calls `run(coroutine)` and waits; nothing else is shared. Should a task of the
plane die, `on_death` is called at once, and the next call and leaving the plane raise its error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import TypeVar

from learner.leases.admission import Rules
from learner.leases.engines import Engines
from learner.leases.lease_table import LeaseTable
from learner.leases.scheduler import Limits
from learner.network.coordinator import Coordinator
from learner.network.publisher import MAX_REQUEST_BYTES, Publisher
from learner.network.weight_deltas import Series
from learner.store.store import Store
from protocol.config import NetworkConfig
from protocol.errors import PalimpsestError
from protocol.messages import CanaryFields
from protocol.transport import Transport

log = logging.getLogger(__name__)

T = TypeVar("T")


class NetworkThread:
    """Use as a context manager. Raises (on entry): UnreachableError, SecurityError, DataError."""

    def __init__(
        self,
        *,
        network: NetworkConfig,
        store: Store,
        lease_table: LeaseTable,
        rules: Rules,
        lease_timeout_s: float,
        on_death: Callable[[], None],
        straggler_timeout_s: float | None = None,
    ) -> None:
        self._network = network
        self._store = store
        self._lease_table = lease_table
        self._rules = rules
        self._limits = Limits(lease_timeout_s, straggler_timeout_s)
        self._on_death = on_death
        self._thread = threading.Thread(target=self._main, name="plane", daemon=True)
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self._series = Series(rules.run_id)
        self.engines = Engines()
        self.coordinator: Coordinator
        self.publisher: Publisher

    def __enter__(self) -> NetworkThread:
        self._thread.start()
        try:
            self._loop = self._ready.result()
        except BaseException:
            self._thread.join()  # it still uses the store, which the caller may close
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # it has died, and its loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._error is not None:
            raise PalimpsestError(f"the learner's network side has died: {self._error!r}") from self._error

    def run(self, coroutine: Coroutine[object, object, T], *, timeout_s: float | None = None) -> T:
        """The coroutine's result, computed in the plane. Raises: PalimpsestError where the plane has died."""
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:  # its loop is closed
            coroutine.close()
            raise PalimpsestError(f"the plane has died: {self._error}") from (self._error or error)
        return future.result(timeout_s)

    def publish(self, data: bytes, *, version: int, canary: CanaryFields | None = None) -> int:
        """Publishes weights (the bytes of a safetensors file) under an id that is durable first.

        Called outside the plane: the delta of a large model takes seconds, in which actors must be heard.
        """
        publication = self.run(self.coordinator.new_publication(version))
        offer = self._series.offer(data, publication=publication, version=version, canary=canary)
        self.run(self.publisher.offer(offer))
        return publication

    async def wait_committed(self, version: int, *, timeout_s: float) -> bool:
        """Until every serving engine has committed `version`; False after `timeout_s`."""
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
                    log.critical("the plane has died", exc_info=error)
                    self._on_death()
                else:
                    self._ready.set_exception(error)

    async def _serve(self) -> None:
        transport = Transport(keys=self._network.keys)
        try:
            self.coordinator = Coordinator(
                router=transport.router(self._network.control_address),
                store=self._store,
                lease_table=self._lease_table,
                engines=self.engines,
                rules=self._rules,
                limits=self._limits,
            )
            self.publisher = Publisher(
                router=transport.router(self._network.weights_address, max_frame_bytes=MAX_REQUEST_BYTES),
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
