"""Sends each request to an engine that has committed a version new enough for the lease.

generate ──► eligible? ──► the trajectory's engine, else the one with the fewest in flight ──► POST /generate
               │ none: wait for set_engines, at most wait_s         │ unavailable, or version unknown or too old
               └────────◄──────── next attempt, on another engine if one is eligible ◄────────┘
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from actor.engines.completion import Completion
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import Retry, SGLangClient, Timeouts, check_url, open_http
from protocol.errors import ConfigError, EngineUnavailable, SecurityError, UnknownVersion
from protocol.types import PolicyTag

log = logging.getLogger(__name__)

# Completions are retried only here. With Retry's delays 12 attempts take about 38 s: longer than an engine that was
# killed needs to restart and to get its weights.
_NUM_ATTEMPTS = 12


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine, as the coordinator reports it. `version`: the version that it has committed, -1 if none."""

    url: str
    version: int


class Generator(Protocol):
    """Source of completions for a session: an `EnginePool`."""

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, min_version: int, prefer: str = "", rid: str = ""
    ) -> Completion: ...


class EnginePool:
    """Sends requests to engines and retries them on failure. Use it as an async context manager.

    `run_id`: completions sampled by weights of another run are refused. None accepts any weights (to evaluate an
    endpoint); `min_version` is then compared with the engines' committed versions only. `wait_s`: longest wait for an
    eligible engine.
    """

    def __init__(
        self,
        *,
        run_id: str | None,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
        retry: Retry | None = None,
        wait_s: float = 120.0,
    ) -> None:
        self.num_retries = 0
        self._run_id = run_id
        self._api_key = api_key
        self._timeouts = timeouts or Timeouts()
        self._retry = retry or Retry(num_attempts=_NUM_ATTEMPTS)
        self._wait_s = wait_s
        self._engines: dict[str, EngineInfo] = {}
        self._clients: dict[str, SGLangClient] = {}
        self._refused: set[str] = set()
        self._in_flight: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EnginePool:
        self._http = open_http()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    @property
    def num_in_flight(self) -> int:
        return self._in_flight.total()

    def set_engines(self, engines: Sequence[EngineInfo]) -> None:
        """Replaces the engines. Requests in flight on an engine that is no longer listed are not cancelled.

        An engine whose URL is refused by `check_url` is ignored, with one warning: the list comes from the coordinator,
        and the other engines can serve.
        """
        usable: dict[str, EngineInfo] = {}
        refused: set[str] = set()
        for engine in engines:
            try:
                check_url(engine.url, api_key=self._api_key)
                usable[engine.url] = engine
            except (ConfigError, SecurityError) as error:
                refused.add(engine.url)
                if engine.url not in self._refused:
                    log.warning("ignored an engine: %s", error)
        self._engines, self._refused = usable, refused
        self._clients = {url: self._clients.get(url) or self._open(url) for url in self._engines}
        self._changed.set()
        self._changed = asyncio.Event()

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, min_version: int, prefer: str = "", rid: str = ""
    ) -> Completion:
        """Samples on an engine that has committed `min_version`: on the URL `prefer` if it has (for its prefix cache).

        The tokens of a failed attempt are dropped. An attempt also fails if the version of its tokens is unknown or
        below `min_version`: the engine was restarted, and the coordinator has not reported it yet.

        Raises: EngineRefused, EngineError; EngineUnavailable or UnknownVersion after the last attempt.
        """
        failed: set[str] = set()
        for attempt in range(self._retry.num_attempts):
            url = await self._choose(min_version, prefer, failed)
            self._in_flight[url] += 1
            try:
                completion = await self._clients[url].generate(input_ids, sampling, rid=rid)
                self._check_versions(completion, min_version)
                return completion
            except (EngineUnavailable, UnknownVersion):
                if attempt + 1 == self._retry.num_attempts:
                    raise
                self.num_retries += 1
                failed.add(url)
            finally:
                self._in_flight[url] -= 1
            if failed >= self._eligible(min_version):
                failed.clear()
                await asyncio.sleep(self._retry.delay_s(attempt))
        raise AssertionError("Retry.num_attempts must be >= 1")

    def _open(self, url: str) -> SGLangClient:
        if self._http is None:
            raise RuntimeError("EnginePool must be used inside `async with`")
        return SGLangClient(url, api_key=self._api_key, timeouts=self._timeouts, http=self._http)

    def _eligible(self, min_version: int) -> set[str]:
        return {url for url, e in self._engines.items() if e.version >= min_version}

    async def _choose(self, min_version: int, prefer: str, failed: set[str]) -> str:
        eligible = self._eligible(min_version) or await self._wait_for_eligible(min_version)
        candidates = (eligible - failed) or eligible
        if prefer in candidates:
            return prefer
        return min(candidates, key=lambda url: (self._in_flight[url], url))

    async def _wait_for_eligible(self, min_version: int) -> set[str]:
        """Waits until an engine has committed `min_version`. Raises: EngineUnavailable after `wait_s`."""
        try:
            async with asyncio.timeout(self._wait_s):
                while not (eligible := self._eligible(min_version)):
                    await self._changed.wait()
                return eligible
        except TimeoutError:
            known = ", ".join(f"{e.url} at {e.version}" for e in self._engines.values())
            raise EngineUnavailable(
                f"no engine committed version {min_version} in {self._wait_s:g} s; known: {known or 'none'}"
            ) from None

    def _check_versions(self, completion: Completion, min_version: int) -> None:
        if self._run_id is None:
            return
        for span in completion.spans:
            tag = PolicyTag.parse(span.weight_version)
            if tag.run_id != self._run_id:
                raise UnknownVersion(f"{completion.engine} serves {tag}, which is not of run {self._run_id!r}")
            if tag.version < min_version:
                raise UnknownVersion(f"{completion.engine} serves {tag}, but the lease needs version >= {min_version}")
