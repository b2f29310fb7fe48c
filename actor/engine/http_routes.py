"""SGLang's native HTTP routes, served by an Engine."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from actor.engine.engine import Engine
from actor.engine.request_bodies import AbortBody, ContinueBody, GenerateBody, PauseBody, UpdateBody, parse_body
from actor.engine.request_origin import OriginCheck
from actor.engine.request_validation import is_batch
from actor.engine.response_body import GenerateResponse, generate_response
from actor.engine.update_source import UpdateSource
from protocol.errors import EngineRefused, EngineUnavailable

# Largest body: a batch of this number of full contexts, ten bytes for each token, and some parameters. The bound is low
# because bodies are parsed in the event loop that runs the engine's steps.
_MAX_CONTEXTS_PER_BODY = 16
_BYTES_PER_TOKEN = 10
_MAX_OTHER_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class ServerProperties:
    """The constant fields of /model_info and /server_info."""

    tokenizer_path: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    context_length: int
    max_running_requests: int
    max_total_tokens: int


def build_app(
    *,
    engine: Engine,
    properties: ServerProperties,
    api_key: str | None,
    origin: OriginCheck,
    update_source: UpdateSource | None,
) -> web.Application:
    """Builds the app. If `api_key` is set, every route except /health needs `Authorization: Bearer <api_key>`.

    `update_source` None: weights of any folder and version may be installed.
    """
    max_body_bytes = _MAX_CONTEXTS_PER_BODY * properties.context_length * _BYTES_PER_TOKEN + _MAX_OTHER_BYTES
    app = web.Application(client_max_size=max_body_bytes, middlewares=[_auth_and_errors(api_key, origin)])
    routes = _Routes(engine=engine, properties=properties, update_source=update_source)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/model_info", routes.model_info)
    app.router.add_get("/server_info", routes.server_info)
    app.router.add_post("/generate", routes.generate)
    app.router.add_post("/update_weights_from_disk", routes.update_weights_from_disk)
    app.router.add_post("/pause_generation", routes.pause_generation)
    app.router.add_post("/continue_generation", routes.continue_generation)
    app.router.add_post("/abort_request", routes.abort_request)
    app.router.add_route("GET", "/flush_cache", routes.flush_cache)
    app.router.add_route("POST", "/flush_cache", routes.flush_cache)
    return app


class _Routes:
    def __init__(self, *, engine: Engine, properties: ServerProperties, update_source: UpdateSource | None) -> None:
        self._update_source = update_source
        self._engine = engine
        self._properties = properties

    async def health(self, _: web.Request) -> web.Response:
        self._engine.check_alive()
        return web.Response()

    async def model_info(self, _: web.Request) -> web.Response:
        return _json(
            {
                "model_path": self._engine.model_path,
                "tokenizer_path": self._properties.tokenizer_path,
                "is_generation": True,
                "weight_version": self._engine.weight_version,
                "model_type": self._properties.model_type,
                "architectures": self._properties.architectures,
            }
        )

    async def server_info(self, _: web.Request) -> web.Response:
        scheduler, properties = self._engine.scheduler, self._properties
        return _json(
            {
                "status": "ready",
                "version": "palimpsest-embedded",
                "model_path": self._engine.model_path,
                "tokenizer_path": properties.tokenizer_path,
                "weight_version": self._engine.weight_version,
                "vocab_size": properties.vocab_size,
                "context_length": properties.context_length,
                "max_running_requests": properties.max_running_requests,
                "max_total_num_tokens": properties.max_total_tokens,
                "internal_states": [
                    {
                        "num_running_reqs": scheduler.num_running,
                        "num_waiting_reqs": len(scheduler.waiting) + len(scheduler.held),
                        "is_paused": scheduler.paused,
                    }
                ],
            }
        )

    async def generate(self, request: web.Request) -> web.Response:
        body = parse_body(GenerateBody, await request.read())
        sequences = await self._engine.generate(body)
        version = self._engine.weight_version
        responses = [
            generate_response(s, text=self._engine.decode_output(s), weight_version=version) for s in sequences
        ]
        return _json(responses if is_batch(body) else responses[0])

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        try:
            body = parse_body(UpdateBody, await request.read())
            if self._update_source is not None:
                await asyncio.to_thread(self._update_source.check, body)
            num_paused = await self._engine.update_weights(body)
        except EngineRefused as error:
            return _update_response(success=False, message=str(error), num_paused_requests=0, status=400)
        return _update_response(
            success=True, message="Succeeded to update model weights.", num_paused_requests=num_paused
        )

    async def pause_generation(self, request: web.Request) -> web.Response:
        body = parse_body(PauseBody, await request.read())
        self._engine.pause(body.mode)
        return _json({"status": "ok", "message": f"Generation paused ({body.mode})."})

    async def continue_generation(self, request: web.Request) -> web.Response:
        parse_body(ContinueBody, await request.read())
        self._engine.resume()
        return _json({"status": "ok", "message": "Generation continued."})

    async def abort_request(self, request: web.Request) -> web.Response:
        body = parse_body(AbortBody, await request.read())
        if body.abort_all:
            self._engine.abort_all()
        elif body.rid:
            self._engine.abort(rid=body.rid)
        else:
            raise EngineRefused("rid is required unless abort_all is true")
        return web.Response()

    async def flush_cache(self, _: web.Request) -> web.Response:
        self._engine.flush_cache()
        return web.Response(text="Cache flushed.\n")


def _auth_and_errors(api_key: str | None, origin: OriginCheck) -> Middleware:
    """Returns a middleware that checks origin and bearer token, and turns exceptions into JSON errors."""
    expected = f"Bearer {api_key}".encode() if api_key is not None else None

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (refusal := origin.refusal(request)) is not None:
            return _error(refusal[1], status=refusal[0])
        if expected is not None and request.path != "/health":
            given = request.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, expected):
                return _error("the Authorization header must be `Bearer` followed by the engine's API key", status=401)
        try:
            return await handler(request)
        except EngineRefused as error:
            return _error(str(error), status=400)
        except EngineUnavailable as error:
            return _error(str(error), status=503)
        except web.HTTPException as error:
            return _error(f"{request.method} {request.path}: {error.reason}", status=error.status)

    return middleware


def _error(message: str, *, status: int) -> web.Response:
    return _json({"error": {"message": message, "code": status}}, status=status)


def _update_response(*, success: bool, message: str, num_paused_requests: int, status: int = 200) -> web.Response:
    return _json({"success": success, "message": message, "num_paused_requests": num_paused_requests}, status=status)


def _json(value: GenerateResponse | list[GenerateResponse] | dict[str, object], *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
