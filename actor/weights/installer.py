"""Installs fetched weights in one engine and checks them with the canary.

    pause ─► update, flush the prefix cache ─► continue, while the canary's requests are queued ─► judge the canary

The last engine that serves may serve with a canary that is out of tolerance, and every engine with a canary that got no
response in time; the installation then returns a warning.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from actor.engines.sglang_client import SGLangClient, UpdateMode
from actor.weights.canary import CanaryTimeout, measure_canary_error
from actor.weights.fetch import PreparedWeights
from protocol.errors import EngineError, WeightsError
from protocol.fault_injection import fault_point

log = logging.getLogger(__name__)


class WeightInstaller:
    """Installs weights in the engine `name`.

    pause_mode         what an update does to requests in flight: see `WeightAgent`
    num_other_serving  returns the number of other engines that serve

    `paused_s`: total time that the engine was paused for updates. `canary_error`: that of the last canary, in nats.
    """

    def __init__(
        self,
        *,
        name: str,
        engine: SGLangClient,
        pause_mode: UpdateMode,
        canary_tolerance: float,
        canary_timeout_s: float,
        num_other_serving: Callable[[], int],
    ) -> None:
        self._name = name
        self._engine = engine
        self._pause_mode: UpdateMode = pause_mode
        self._canary_tolerance = canary_tolerance
        self._canary_timeout_s = canary_timeout_s
        self._num_other_serving = num_other_serving
        self.paused_s = 0.0
        self.canary_error = 0.0

    async def install(self, prepared: PreparedWeights, *, is_committed: bool) -> str:
        """Pauses the engine, updates it, continues it and checks the canary. Returns a warning, empty if there is none.

        `is_committed`: the engine serves a committed publication. If not, requests in flight are aborted: no client may
        get tokens before the canary is checked. Otherwise they continue with the new weights; if the canary then fails,
        those that ended in the milliseconds before its response have been returned to their clients.

        Raises: EngineError, WeightsError.
        """
        started_s = time.perf_counter()
        await self._engine.pause(self._pause_mode if is_committed else "abort")
        await self._engine.update_weights_from_disk(
            str(prepared.folder), weight_version=str(prepared.tag), flush_cache=True
        )
        fault_point("agent.updated")
        canary = asyncio.ensure_future(measure_canary_error(self._engine, prepared, timeout_s=self._canary_timeout_s))
        try:
            await asyncio.sleep(0)  # the canary sends its requests before the engine continues
            await self._engine.continue_()
            self.paused_s += time.perf_counter() - started_s
            return await self._judge_canary(canary, prepared)
        finally:
            canary.cancel()
            await asyncio.gather(canary, return_exceptions=True)

    async def _judge_canary(self, canary: asyncio.Future[float], prepared: PreparedWeights) -> str:
        """Waits for the canary. Returns a warning if the engine may serve in spite of it; empty if it is as expected.

        A canary without response says nothing about the weights: the engine is busy. Wrong log-probs are tolerated on
        the last engine, because without it the run would stop.

        Raises: EngineError, WeightsError.
        """
        try:
            self.canary_error = await canary
        except CanaryTimeout as error:
            log.warning("engine %s serves %s unchecked: %s", self._name, prepared.tag, error)
            return f"serves {prepared.tag} unchecked: {error}"
        if self.canary_error <= self._canary_tolerance:
            return ""
        problem = (
            f"the canary's log-probs must be within {self._canary_tolerance:g} nats of the learner's, got "
            f"{self.canary_error:.4g}: the engine does not compute with the weights of {prepared.tag}"
        )
        if self._num_other_serving():
            raise WeightsError(problem)
        log.warning("engine %s serves nevertheless, because no other engine serves: %s", self._name, problem)
        return f"serves nevertheless, because no other engine serves: {problem}"

    async def pause_and_abort(self) -> None:
        """Pauses the engine, whose weights are now unknown, and aborts its requests: pools retry them elsewhere."""
        try:
            await self._engine.pause("abort")
        except EngineError as error:
            log.warning("engine %s cannot be paused: %s", self._name, error)
