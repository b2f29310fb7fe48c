"""The weight agent of one engine: installs the newest publication, all or nothing, and reports the engine's state.

    Announcement or 1 s ─► report ─► reply: the newest publication           (a separate task: also during updates)
                                  │
                                  ▼
    fetch, verify: a folder ─► pause ─► update, flush ─► continue ─► canary ─► committed, report
                                  └──────────── any failure ───────────┘
                                                    ▼
                       quarantined: paused, requests in flight aborted; installed again 2 s later

    task       consumes                    produces                        waits for             unblocked by
    listen     announcements               a report now                    an announcement       the publisher
    reports    the engine's state          EngineReport; newest version    the reply, then 1 s   a change of state
    updates    the newest publication      a committed version             a reply to a report   the reports task

The states are those of EngineReport. `joining`: no publication is committed yet, and the engine serves no lease.
`serving`: it serves the committed publication, also while the next one is fetched and if that fails; `error` says so.
`updating`: requests wait in the engine while new weights are installed. `quarantined`: an installation failed, and the
engine returns no tokens until one succeeds as a whole; or the engine cannot be reached. The last engine that serves is
not quarantined for its canary's log-probs, and no engine for a canary that got no response in time.

The canary is a set of prompts with the log-probs that the learner computed. It is sent before the engine continues, so
that it is among the first requests to be answered. It checks that the engine computes with the published weights, and
that its prefix cache holds no KV of old weights. An engine that was restarted serves another version than the committed
one; its state is `joining` again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from actor.engines.sglang_client import SGLangClient, UpdateMode
from actor.weights.fetch import WeightFetcher
from actor.weights.installer import WeightInstaller
from protocol.errors import EngineError, ProtocolError, RemoteError, WeightsError
from protocol.fault_injection import fault_point
from protocol.messages import EngineFields
from protocol.request_client import RequestClient
from protocol.transport import Subscriber
from protocol.types import PolicyTag
from protocol.weight_messages import MAX_ERROR_CHARS, EngineReply, EngineReport

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTimeouts:
    """Time-outs and intervals of a weight agent.

    report_every_s  longest time between two reports
    report_s        time-out of the reply to a report
    retry_s         wait after a failure, before the engine is checked again
    canary_s        time-out of the engine's responses to the canary
    manifest_s      time-out of a manifest
    chunk_s         time-out of a chunk
    """

    report_every_s: float = 1.0
    report_s: float = 10.0
    retry_s: float = 2.0
    canary_s: float = 60.0
    manifest_s: float = 10.0
    chunk_s: float = 30.0


class WeightAgent:
    """Keeps the weights of one engine current. `run` returns only if it is cancelled.

    folder        for the weight files that the engine reads; no other process may use it
    url           the engine's address for actors
    pause_mode    what an update does to requests in flight. `retract` drops their KV and queues them again; they
                  continue with the new weights, and no sampled token is lost. If that is not safe (see `update_mode`),
                  `abort` ends them, and the actors' pools sample them again

    The canary is queued in the engine behind the requests that wait there.
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
        timeouts: AgentTimeouts | None = None,
    ) -> None:
        self._name = name
        self._url = url
        self._engine = engine
        self._requests = requests
        self._announcements = announcements
        self._timeouts = timeouts or AgentTimeouts()
        self._fetcher = WeightFetcher(
            requests=requests,
            base_model=base_model,
            folder=folder,
            manifest_timeout_s=self._timeouts.manifest_s,
            chunk_timeout_s=self._timeouts.chunk_s,
        )
        self._installer = WeightInstaller(
            name=name,
            engine=engine,
            pause_mode=pause_mode,
            canary_tolerance=canary_tolerance,
            canary_timeout_s=self._timeouts.canary_s,
            num_other_serving=lambda: self._num_other_serving,
        )
        self._committed: PolicyTag | None = None
        self._newest: PolicyTag | None = None
        self._updating = False
        self._reachable = True
        self._states_pauses = True
        self._num_other_serving = 0
        self._error = ""
        self._warning = ""
        self._report_now = asyncio.Event()
        self._report_replied = asyncio.Event()
        self.num_updates = 0
        self.num_failures = 0

    @property
    def paused_s(self) -> float:
        """Total time that the engine was paused for updates."""
        return self._installer.paused_s

    @property
    def canary_error(self) -> float:
        """That of the last canary, in nats."""
        return self._installer.canary_error

    @property
    def num_fetched_bytes(self) -> int:
        return self._fetcher.num_fetched_bytes

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._reports())
            tasks.create_task(self._updates())

    async def _listen(self) -> None:
        while True:
            await self._announcements.recv()
            self._report_now.set()

    async def _reports(self) -> None:
        """Reports every `report_every_s` and on each change. Each reply wakes `_updates`."""
        while True:
            self._report_now.clear()
            try:
                self._newest = await self._report()
                self._report_replied.set()
            except (RemoteError, ProtocolError, TimeoutError) as error:
                self.num_failures += 1
                log.warning("engine %s: %s", self._name, error)
            try:
                async with asyncio.timeout(self._timeouts.report_every_s):
                    await self._report_now.wait()
            except TimeoutError:
                pass

    async def _updates(self) -> None:
        """After each reply: checks the engine's version, and installs the newest publication if it is not committed."""
        while True:
            await self._report_replied.wait()
            self._report_replied.clear()
            before = self._committed, self._error
            try:
                await self._check_engine()
                if self._newest is not None and self._newest != self._committed:
                    await self._install(self._newest)
                    self.num_updates += 1
                self._error = ""
                await self._resume_if_paused()
            except (EngineError, RemoteError, WeightsError, ProtocolError, TimeoutError) as error:
                self.num_failures += 1
                if str(error) != self._error:
                    log.warning("engine %s: %s", self._name, error)
                self._error = str(error) or type(error).__name__
                self._report_now.set()
                await asyncio.sleep(self._timeouts.retry_s)
            if before != (self._committed, self._error):
                self._report_now.set()

    async def _check_engine(self) -> None:
        """Clears the committed publication if the engine serves another version, because it was restarted.

        Raises: EngineError (it cannot be reached).
        """
        self._reachable = False
        info = await self._engine.model_info()
        self._reachable = True
        if self._committed is not None and info.weight_version != str(self._committed):
            log.warning(
                "engine %s serves %s instead of %s: it was restarted and its weights are installed again",
                self._name,
                info.weight_version,
                self._committed,
            )
            self._committed = None

    async def _resume_if_paused(self) -> None:
        """Continues an engine that another client has paused. SGLang does not state whether it is paused."""
        if self._committed is None or not self._states_pauses:
            return
        is_paused = (await self._engine.server_info()).is_paused
        self._states_pauses = is_paused is not None
        if is_paused:
            log.warning("engine %s was paused by another client: it continues", self._name)
            await self._engine.continue_()

    def _state(self) -> str:
        if self._error and (self._committed is None or not self._reachable):
            return "quarantined"
        if self._committed is None:
            return "joining"
        return "updating" if self._updating else "serving"

    async def _report(self) -> PolicyTag | None:
        """Sends a report; returns the newest publication, None if there is none. Raises as `RequestClient.request`."""
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
                "error": (self._error or self._warning)[:MAX_ERROR_CHARS],
                "counters": {
                    "updates": float(self.num_updates),
                    "failures": float(self.num_failures),
                    "paused_s": self.paused_s,
                    "fetched_bytes": float(self.num_fetched_bytes),
                    "repeated_chunks": float(self._fetcher.num_repeated_chunks),
                },
            }
        )
        reply, _ = await self._requests.request(report, EngineReply, timeout_s=self._timeouts.report_s)
        self._num_other_serving = reply.num_other_serving
        if reply.publication < 0:
            return None
        return PolicyTag(reply.run_id, reply.publication, reply.version)

    async def _install(self, tag: PolicyTag) -> None:
        """Fetches `tag` and installs it in the engine.

        If fetching fails, the engine serves as before. If a later step fails, no publication is committed and the
        engine is paused.
        """
        prepared = await self._fetcher.fetch(tag)
        fault_point("agent.prepared")
        previous = self._committed
        self._updating = True
        self._report_now.set()
        try:
            self._warning = await self._installer.install(prepared, is_committed=previous is not None)
            self._committed = tag
            fault_point("agent.committed")
        except BaseException as error:
            self._committed = None
            if isinstance(error, Exception):
                await self._installer.pause_and_abort()
            raise
        finally:
            self._updating = False
        await asyncio.to_thread(self._fetcher.delete_other_folders)
        log.info(
            "engine %s: %s -> %s, canary error %.2g nats", self._name, previous or "nothing", tag, self.canary_error
        )
