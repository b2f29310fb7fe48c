"""The engines of an evaluation: what they serve at its start, and whether they still respond after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actor.engines.sglang_client import SGLangClient
from protocol.errors import EngineError, EngineUnavailable, UnknownVersion, UnreachableError
from protocol.types import PolicyTag

_POLL_S = 0.1


class EvaluatedEngines:
    """The engines at `urls`. `wait_s`, `lost_after_s`: see `EvaluationPlan`."""

    def __init__(self, urls: Sequence[str], *, api_key: str | None, wait_s: float, lost_after_s: float) -> None:
        self._urls = urls
        self._api_key = api_key
        self._wait_s = wait_s
        self._lost_after_s = lost_after_s
        self._checking = asyncio.Lock()

    async def served_versions(self, *, wanted: int | None) -> frozenset[str]:
        """The weight versions that the engines serve. With `wanted`, waits until every engine serves this version.

        Raises: UnreachableError.
        """
        return frozenset([await self._served_by(url, wanted) for url in self._urls])

    async def check_any_responds(self) -> None:
        """Returns as soon as an engine responds. Raises: UnreachableError if none does in time."""
        async with self._checking:
            deadline = asyncio.get_running_loop().time() + self._lost_after_s
            while not any(await asyncio.gather(*map(self._responds, self._urls))):
                if asyncio.get_running_loop().time() > deadline:
                    raise UnreachableError(
                        f"no engine responds any more ({', '.join(self._urls)}): it was stopped, or its run has ended; "
                        "the samples so far are kept, and the same command continues with the missing ones"
                    )
                await asyncio.sleep(_POLL_S)

    async def _served_by(self, url: str, wanted: int | None) -> str:
        async with SGLangClient(url, api_key=self._api_key) as client:
            deadline = asyncio.get_running_loop().time() + self._wait_s
            while True:
                problem = ""
                try:
                    text = (await client.model_info()).weight_version or "default"
                    if wanted is None or PolicyTag.parse(text).version == wanted:
                        return text
                    problem = f"it serves {text}"
                except (EngineUnavailable, UnknownVersion) as error:
                    problem = str(error)
                except EngineError as error:
                    raise UnreachableError(f"engine {url} cannot be used: {error}; correct --engine") from error
                if asyncio.get_running_loop().time() >= deadline:
                    what = "respond" if wanted is None else f"serve version {wanted}"
                    within = f" within {self._wait_s:g} s" if self._wait_s else ""
                    raise UnreachableError(
                        f"engine {url} does not {what}{within}: {problem}; start it, or correct --engine"
                    )
                await asyncio.sleep(_POLL_S)

    async def _responds(self, url: str) -> bool:
        try:
            async with SGLangClient(url, api_key=self._api_key) as client:
                await client.model_info()
        except EngineError:
            return False
        return True
