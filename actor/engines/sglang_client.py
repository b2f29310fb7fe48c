"""A client of SGLang's native HTTP API, with token ids as input and output. The embedded engine has the same API.

Every call has a time-out, and this client never retries. No connection, no response in time, HTTP 5xx and an abort
raise `EngineUnavailable`; the pool then retries, if possible on another engine. Tokens sampled before the failure are
dropped, so no token is counted twice. HTTP 4xx raises `EngineRefused` with the server's message.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from actor.engines.completion import Completion, parse_completion
from actor.engines.sampling import SamplingParams
from protocol.addresses import is_loopback
from protocol.errors import ConfigError, EngineError, EngineRefused, EngineUnavailable, SecurityError, UnknownVersion
from protocol.framing import describe

PauseMode = Literal["abort", "retract", "in_place"]
UpdateMode = Literal["abort", "retract"]
"""What an update may do to requests in flight. `in_place` is excluded: it would keep the KV cache of old weights."""
_FLUSHES_WITH_RETRACTED = (0, 5, 23)
# A completion of 10^5 tokens with log-probs is about 5 MB of JSON.
_MAX_RESPONSE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How a pool retries: `num_attempts` in all, with a wait of min(max_s, base_s · 2^k) after attempt k = 0, 1, …"""

    num_attempts: int = 4
    base_s: float = 0.25
    max_s: float = 5.0

    def delay_s(self, attempt: int) -> float:
        return min(self.max_s, self.base_s * 2**attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Time-outs by kind of call. `generate_s` includes pauses for weight updates, during which requests wait."""

    connect_s: float = 5.0
    control_s: float = 10.0
    generate_s: float = 300.0
    update_s: float = 600.0


class _Response(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class ModelInfo(_Response):
    """GET /model_info."""

    model_path: str
    weight_version: str | None = None


class ServerInfo(_Response):
    """GET /server_info. `version`: the server's release."""

    version: str = ""
    internal_states: object = None

    @property
    def is_paused(self) -> bool | None:
        """Whether the engine is paused; None if it does not state it (SGLang)."""
        states = self.internal_states if isinstance(self.internal_states, list) else []
        stated = [state["is_paused"] for state in states if isinstance(state, dict) and "is_paused" in state]
        return any(stated) if stated else None


class UpdateResult(_Response):
    """POST /update_weights_from_disk."""

    success: bool
    message: str = ""
    num_paused_requests: int | None = None


A = TypeVar("A", bound=_Response)


class SGLangClient:
    """Client of the engine at `base_url`. Use it as an async context manager, or pass `http`, a session that you close.

    Raises: ConfigError, SecurityError (see `check_url`).
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        check_url(base_url, api_key=api_key)
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeouts = timeouts or Timeouts()
        self._http = http
        self._owns_http = http is None
        self._seen_version: str | None = None
        self._rid_suffix = f"{secrets.token_hex(8)}."
        self._num_requests = count()

    async def __aenter__(self) -> SGLangClient:
        if self._http is None:
            self._http = open_http()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._owns_http and self._http is not None:
            await self._http.close()
            self._http = None

    async def generate(self, input_ids: Sequence[int], sampling: SamplingParams, *, rid: str = "") -> Completion:
        """Samples a completion of `input_ids` (>= 1 token). `rid` is a prefix; a unique suffix is added to it.

        Raises: EngineRefused, EngineUnavailable, UnknownVersion, EngineError.
        """
        rid = f"{rid or 'r'}-{self._rid_suffix}{next(self._num_requests)}"
        if self._seen_version is None:
            await self.model_info()
        seen_version = self._seen_version
        request = {
            "input_ids": [int(token) for token in input_ids],
            "sampling_params": sampling.to_wire(),
            "return_logprob": True,
            "stream": False,
            "rid": rid,
        }
        try:
            body = await self._call("POST", "/generate", request, timeout_s=self._timeouts.generate_s)
        except _ResponseTimeout:
            with suppress(EngineError):
                await self.abort(rid)
            raise
        try:
            completion, self._seen_version = parse_completion(body, seen_version=seen_version, engine=self.base_url)
        except UnknownVersion:
            self._seen_version = None
            raise
        return completion

    async def model_info(self) -> ModelInfo:
        body = await self._call("GET", "/model_info", timeout_s=self._timeouts.control_s)
        info = self._read(ModelInfo, "/model_info", body)
        self._seen_version = info.weight_version or self._seen_version
        return info

    async def server_info(self) -> ServerInfo:
        body = await self._call("GET", "/server_info", timeout_s=self._timeouts.control_s)
        return self._read(ServerInfo, "/server_info", body)

    async def pause(self, mode: PauseMode) -> None:
        """Stops sampling. Idempotent. Requests in flight are aborted, retracted (KV dropped) or kept in place."""
        await self._call("POST", "/pause_generation", {"mode": mode}, timeout_s=self._timeouts.control_s)

    async def continue_(self) -> None:
        await self._call("POST", "/continue_generation", {}, timeout_s=self._timeouts.control_s)

    async def update_weights_from_disk(
        self, model_path: str, *, weight_version: str, flush_cache: bool = True
    ) -> UpdateResult:
        """Loads a folder on the engine's machine. Raises: EngineRefused (a bad path), EngineError (success false)."""
        request = {"model_path": model_path, "weight_version": weight_version, "flush_cache": flush_cache}
        path = "/update_weights_from_disk"
        body = await self._call("POST", path, request, timeout_s=self._timeouts.update_s)
        result = self._read(UpdateResult, path, body)
        if not result.success:
            raise EngineError(f"{self.base_url}{path}: {result.message}")
        self._seen_version = weight_version
        return result

    async def abort(self, rid: str | None = None) -> None:
        """Aborts the request `rid`, or all requests if it is None."""
        request = {"abort_all": True} if rid is None else {"rid": rid}
        await self._call("POST", "/abort_request", request, timeout_s=self._timeouts.control_s)

    async def _call(self, method: str, path: str, request: object = None, *, timeout_s: float) -> bytes:
        if self._http is None:
            raise RuntimeError("SGLangClient must be used inside `async with`, or with an http session")
        url = self.base_url + path
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._timeouts.connect_s)
        data = None if request is None else orjson.dumps(request)
        headers = self._headers if data is None else {**self._headers, "Content-Type": "application/json"}
        try:
            async with self._http.request(method, url, data=data, headers=headers, timeout=timeout) as response:
                body, status = await _read_body(response), response.status
        except TimeoutError as error:
            raise _ResponseTimeout(f"{url}: no response in {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineUnavailable(f"{url}: {error or type(error).__name__}") from error
        if 400 <= status < 500:
            raise EngineRefused(f"{url}: HTTP {status}: {_error_message(body)}")
        if status != 200:
            raise EngineUnavailable(f"{url}: HTTP {status}: {_error_message(body)}")
        return body

    def _read(self, cls: type[A], path: str, body: bytes) -> A:
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise EngineError(f"{self.base_url}{path}: invalid response: {describe(error)}") from error


def update_mode(release: str) -> UpdateMode:
    """Returns the pause mode for an update, which flushes the cache, of a server of this release.

    `retract` keeps all sampled tokens and takes milliseconds. But SGLang 0.5.20 crashes if the cache is flushed while
    requests are retracted; 0.5.23 does not. `abort` takes 1 s in SGLang, and is used for all releases not known to be
    safe.
    """
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", release)
    is_safe = match is not None and tuple(map(int, match.groups())) >= _FLUSHES_WITH_RETRACTED
    return "retract" if is_safe else "abort"


def check_url(url: str, *, api_key: str | None) -> None:
    """Checks an engine's URL. An address beyond loopback needs a bearer token.

    Raises: ConfigError (not http://HOST:PORT), SecurityError (beyond loopback without `api_key`).
    """
    try:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_http = False
    if not is_http:
        raise ConfigError(f"an engine's URL must be http://HOST:PORT, got {url!r}")
    if not api_key and not is_loopback(url):
        raise SecurityError(f"engine {url} is beyond loopback and needs a bearer token: set network.api_key_file")


class _ResponseTimeout(EngineUnavailable):
    """The request may still run on the engine."""


def open_http() -> aiohttp.ClientSession:
    """Opens a session without a limit on connections: the actor bounds the requests in flight."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False)


async def _read_body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_RESPONSE_BYTES:
            raise EngineError(f"{response.url}: a response must have <= {_MAX_RESPONSE_BYTES} bytes, got more")
    return bytes(body)


def _error_message(body: bytes, max_chars: int = 500) -> str:
    """Extracts the server's message: SGLang's {"error": {"message"}} or {"message"}, else the start of the body."""
    text = body[: 4 * max_chars].decode("utf-8", "replace")
    with suppress(orjson.JSONDecodeError):
        parsed = orjson.loads(body)
        inner = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
        message = inner.get("message") if isinstance(inner, dict) else inner
        text = message if isinstance(message, str) else text
    return text[:max_chars] or "no message"
