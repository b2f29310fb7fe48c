"""Several engines as one: each request goes to an engine that has committed a version new enough for its lease.

generate ──► eligible? ──► the trajectory's engine, else the one with the least in flight ──► POST /generate
               │ none: wait for set_engines, at most wait_s          │ unavailable, or version unknown or too old
               └──────────◄────── the next attempt, elsewhere if there is an elsewhere ◄───────┘
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

# The one place where completions are retried. With Retry's delays about 38 s: an engine that was killed is started
# again, and joins anew, in less.
_NUM_ATTEMPTS = 12


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine as the coordinator knows it. `version`: the step that it has committed, -1 for none yet."""

    url: str
    version: int


class Generator(Protocol):
    """What a session samples from: an `EnginePool`."""

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, min_version: int, prefer: str = "", rid: str = ""
    ) -> Completion: ...


class EnginePool:
    """Used as an async context manager. `run_id`: tokens that are not of this run are refused; None accepts any
    (evaluation of an endpoint), and then `min_version` is held against the engines' committed versions only.
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
        """The engines from now on. Requests in flight on one that is left out run to their end.

        One whose url may not be used (see `check_url`) is left out with a warning: it is news from elsewhere, and
        others may serve.
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
                    log.warning("an engine is left out: %s", error)
        self._engines, self._refused = usable, refused
        self._clients = {url: self._clients.get(url) or self._open(url) for url in self._engines}
        self._changed.set()
        self._changed = asyncio.Event()

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, min_version: int, prefer: str = "", rid: str = ""
    ) -> Completion:
        """Samples on an engine that has committed `min_version`, on `prefer` (a url: its prefix cache) if that can.

        Tokens of a failed attempt are thrown away, also those whose version is unknown or below `min_version` (an
        engine that was restarted and is still trusted here).

        Raises: EngineRefused, EngineError, EngineUnavailable or UnknownVersion (after the last attempt).
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
            raise RuntimeError("EnginePool is used inside `async with`")
        return SGLangClient(url, api_key=self._api_key, timeouts=self._timeouts, http=self._http)

    def _eligible(self, min_version: int) -> set[str]:
        return {url for url, e in self._engines.items() if e.version >= min_version}

    async def _choose(self, min_version: int, prefer: str, failed: set[str]) -> str:
        try:
            async with asyncio.timeout(self._wait_s):
                while not (eligible := self._eligible(min_version)):
                    await self._changed.wait()
        except TimeoutError:
            known = ", ".join(f"{e.url} at {e.version}" for e in self._engines.values())
            raise EngineUnavailable(
                f"no engine committed version {min_version} in {self._wait_s:g} s; known: {known or 'none'}"
            ) from None
        candidates = (eligible - failed) or eligible
        if prefer in candidates:
            return prefer
        return min(candidates, key=lambda url: (self._in_flight[url], url))

    def _check_versions(self, completion: Completion, min_version: int) -> None:
        if self._run_id is None:
            return
        for span in completion.spans:
            tag = PolicyTag.parse(span.weight_version)
            if tag.run_id != self._run_id:
                raise UnknownVersion(f"{completion.engine} serves {tag}, which is not of run {self._run_id!r}")
            if tag.version < min_version:
                raise UnknownVersion(f"{completion.engine} serves {tag}, but the lease needs version >= {min_version}")
