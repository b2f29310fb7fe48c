"""An engine's one weight agent: brings it to the newest publication, all or nothing, and says what it serves.

    Announcement or 1 s ─► report, learn the newest              (a task of its own: never silent while weights move)
                                  │
                                  ▼
    fetch, verify: a folder ─► pause ─► update, flush ─► continue ─► canary ─► committed, report
                                  └────────── anything fails ──────────┘
                                                    ▼
                       quarantined: paused, what is in flight aborted; brought again 2 s later

Until the engine has committed a first publication it serves no lease (`joining`). It goes on serving what it has while
the next one is fetched (`serving`) and put in place (`updating`: requests wait in the engine). The canary, prompts of
which the learner has published log-probs, leaves before the engine continues, to be answered among the first: it shows
that the engine computes with the published weights and has no prefix of old ones in its cache. An engine that fails is
`quarantined` and reported, and gives no tokens until it has been brought again from the start. One that was restarted
states another version than was committed, and joins anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import SGLangClient, UpdateMode
from actor.weights.fetch import Prepared, WeightFetcher
from protocol.errors import EngineError, ProtocolError, RemoteError, WeightsError
from protocol.fault_injection import fault_point
from protocol.messages import EngineFields, EngineReply, EngineReport
from protocol.request_client import RequestClient
from protocol.transport import Subscriber
from protocol.types import PolicyTag

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
_REQUEST_TIMEOUT_S = 10.0
_RETRY_S = 2.0
_CANARY_TIMEOUT_S = 60.0
_CANARY_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=1, allow_truncation=True)


class WeightAgent:
    """Runs until cancelled. `folder` is its own, for the weight files that the engine reads; `url` is where actors
    find the engine.

    `pause_mode` says what an update does to requests in flight. `retract` queues them up without their KV, and they go
    on under the new weights: nothing sampled is lost. Where that is not safe (`update_mode` knows), they are aborted,
    and the actors' pools sample them again. The canary waits its turn behind what is queued in the engine.
    """

    def __init__(
        self,
        *,
        name: str,
        engine: SGLangClient,
        requests: RequestClient,
        announcements: Subscriber,
        base_model: Path,
        folder: Path,
        url: str,
        pause_mode: UpdateMode,
        canary_tolerance: float,
    ) -> None:
        self._name = name
        self._url = url
        self._pause_mode: UpdateMode = pause_mode
        self._engine = engine
        self._requests = requests
        self._announcements = announcements
        self._fetcher = WeightFetcher(requests=requests, base_model=base_model, folder=folder)
        self._canary_tolerance = canary_tolerance
        self._committed: PolicyTag | None = None
        self._newest: PolicyTag | None = None
        self._updating = False
        self._error = ""
        self._news = asyncio.Event()
        self._learned = asyncio.Event()
        self.num_updates = 0
        self.num_failures = 0
        self.paused_s = 0.0
        self.canary_error = 0.0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._reports())
            tasks.create_task(self._updates())

    async def _listen(self) -> None:
        while True:
            await self._announcements.recv()
            self._news.set()

    async def _reports(self) -> None:
        """A report each second and on each change; what it learns wakes `_updates`."""
        while True:
            self._news.clear()
            try:
                self._newest = await self._report()
                self._learned.set()
            except (RemoteError, ProtocolError, TimeoutError) as error:
                self.num_failures += 1
                log.warning("engine %s: %s", self._name, error)
            try:
                async with asyncio.timeout(_REPORT_EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _updates(self) -> None:
        """After each report: look at the engine, and bring it to the newest publication if there is a newer one."""
        while True:
            await self._learned.wait()
            self._learned.clear()
            before = self._committed, self._error
            try:
                await self._check_engine()
                if self._newest is not None and self._newest != self._committed:
                    await self._bring(self._newest)
                    self.num_updates += 1
                self._error = ""
            except (EngineError, RemoteError, WeightsError, ProtocolError, TimeoutError) as error:
                self.num_failures += 1
                if str(error) != self._error:
                    log.warning("engine %s: %s", self._name, error)
                self._error = str(error) or type(error).__name__
                self._news.set()
                await asyncio.sleep(_RETRY_S)
            if before != (self._committed, self._error):
                self._news.set()

    async def _check_engine(self) -> None:
        """An engine that states another version than was committed has been restarted: it joins anew."""
        info = await self._engine.model_info()
        if self._committed is not None and info.weight_version != str(self._committed):
            log.warning("engine %s serves %s, not %s: it joins anew", self._name, info.weight_version, self._committed)
            self._committed = None

    def _state(self) -> str:
        if self._error:
            return "quarantined"
        if self._committed is None:
            return "joining"
        return "updating" if self._updating else "serving"

    async def _report(self) -> PolicyTag | None:
        """The newest publication, None while there is none."""
        tag = self._committed
        fields = EngineFields(
            name=self._name,
            url=self._url,
            version=tag.version if tag else -1,
            publication=tag.publication if tag else -1,
        )
        report = EngineReport.model_validate(
            {
                "request_id": self._requests.next_id(),
                "engine": fields,
                "state": self._state(),
                "error": self._error[:1000],
                "counters": {
                    "updates": float(self.num_updates),
                    "failures": float(self.num_failures),
                    "paused_s": self.paused_s,
                    "fetched_bytes": float(self._fetcher.num_bytes),
                    "repeated_chunks": float(self._fetcher.num_repeated_chunks),
                },
            }
        )
        reply, _ = await self._requests.request(report, EngineReply, timeout_s=_REQUEST_TIMEOUT_S)
        if reply.publication < 0:
            return None
        return PolicyTag(reply.run_id, reply.publication, reply.version)

    async def _bring(self, tag: PolicyTag) -> None:
        """The engine serves `tag` when this returns. Where fetching fails it serves what it did; where anything after
        that fails, nothing is committed and the engine stands still."""
        prepared = await self._fetcher.fetch(tag)
        fault_point("agent.prepared")
        previous = self._committed
        self._updating = True
        self._news.set()
        try:
            await self._update(prepared)
            self._committed = tag
            fault_point("agent.committed")
        except BaseException as error:
            self._committed = None
            if isinstance(error, Exception):
                await self._stop_engine()
            raise
        finally:
            self._updating = False
        await asyncio.to_thread(self._fetcher.forget_others)
        log.info("engine %s: %s -> %s, canary %.2g nats off", self._name, previous or "nothing", tag, self.canary_error)

    async def _update(self, prepared: Prepared) -> None:
        """Pause, update, continue, canary. Raises: EngineError, WeightsError.

        An engine that has nothing committed gives back what it was asked: nobody may get tokens of it before the
        canary's answer. One that has goes on with its requests: should the canary fail, those that end in the
        milliseconds before its answer have been given.
        """
        started_s = time.perf_counter()
        await self._engine.pause("abort" if self._committed is None else self._pause_mode)
        await self._engine.update_weights_from_disk(
            str(prepared.folder), weight_version=str(prepared.tag), flush_cache=True
        )
        fault_point("agent.updated")
        canary = asyncio.ensure_future(self._canary_error(prepared))
        try:
            await asyncio.sleep(0)  # its requests leave first
            await self._engine.continue_()
            self.paused_s += time.perf_counter() - started_s
            self.canary_error = await canary
        finally:
            canary.cancel()
            await asyncio.gather(canary, return_exceptions=True)
        if self.canary_error > self._canary_tolerance:
            raise WeightsError(
                f"the canary's log-probs must be within {self._canary_tolerance:g} nats of the learner's, got "
                f"{self.canary_error:.4g}: the engine does not compute with the weights of {prepared.tag}"
            )

    async def _canary_error(self, prepared: Prepared) -> float:
        """Mean distance in nats between the engine's log-probs and the learner's; 0 without a canary.

        Raises: EngineError (no answer), WeightsError (of other weights, or found in the cache).
        """
        canary = prepared.canary
        if canary is None or not canary.prompts:
            return 0.0
        try:
            async with asyncio.timeout(_CANARY_TIMEOUT_S):
                asked = (self._engine.generate(prompt, _CANARY_SAMPLING, rid="canary") for prompt in canary.prompts)
                completions = await asyncio.gather(*asked)
        except TimeoutError:
            raise WeightsError(f"no answer to the canary in {_CANARY_TIMEOUT_S:g} s") from None
        for prompt, completion in zip(canary.prompts, completions, strict=True):
            if completion.spans[0].weight_version != str(prepared.tag):
                raise WeightsError(f"the canary must be of {prepared.tag}, got {completion.spans[0].weight_version}")
            # What goes on may begin as a canary does, by a token or two; only the last canary has most of this one.
            if 2 * completion.cached_tokens >= len(prompt):
                raise WeightsError(f"the canary found {completion.cached_tokens} tokens of old weights in the cache")
        gaps = [abs(float(c.logprobs[0]) - wanted) for c, wanted in zip(completions, canary.logprobs, strict=True)]
        return sum(gaps) / len(gaps)

    async def _stop_engine(self) -> None:
        """Whatever it holds now, it shall not sample from it: what is in flight is sampled again elsewhere."""
        try:
            await self._engine.pause("abort")
        except EngineError as error:
            log.warning("engine %s cannot be paused: %s", self._name, error)
