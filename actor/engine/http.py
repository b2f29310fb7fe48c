"""SGLang's native HTTP routes over an Engine."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from actor.engine.admission import is_batch
from actor.engine.answer import Answer, answer
from actor.engine.api import AbortBody, ContinueBody, GenerateBody, PauseBody, UpdateBody, parse
from actor.engine.core import Engine
from protocol.errors import EngineRefused, EngineUnavailable

# A body holds at most as much as a batch of so many full contexts, ten digits and commas a token, and some parameters:
# it is parsed in the loop that makes the engine's steps.
_MAX_CONTEXTS_A_BODY = 16
_BYTES_A_TOKEN = 10
_MAX_OTHER_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What /model_info and /server_info state beside the engine's own state."""

    tokenizer_path: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    context_length: int
    max_running_requests: int
    max_total_tokens: int


def build_app(*, engine: Engine, facts: ServerFacts, api_key: str | None) -> web.Application:
    """Every route but /health needs `Authorization: Bearer <api_key>` where a key is set."""
    max_body_bytes = _MAX_CONTEXTS_A_BODY * facts.context_length * _BYTES_A_TOKEN + _MAX_OTHER_BYTES
    app = web.Application(client_max_size=max_body_bytes, middlewares=[_guard(api_key)])
    routes = _Routes(engine=engine, facts=facts)
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
    def __init__(self, *, engine: Engine, facts: ServerFacts) -> None:
        self._engine = engine
        self._facts = facts

    async def health(self, _: web.Request) -> web.Response:
        self._engine.check_alive()
        return web.Response()

    async def model_info(self, _: web.Request) -> web.Response:
        return _json(
            {
                "model_path": self._engine.model_path,
                "tokenizer_path": self._facts.tokenizer_path,
                "is_generation": True,
                "weight_version": self._engine.weight_version,
                "model_type": self._facts.model_type,
                "architectures": self._facts.architectures,
            }
        )

    async def server_info(self, _: web.Request) -> web.Response:
        scheduler, facts = self._engine.scheduler, self._facts
        return _json(
            {
                "status": "ready",
                "version": "palimpsest-embedded",
                "model_path": self._engine.model_path,
                "tokenizer_path": facts.tokenizer_path,
                "weight_version": self._engine.weight_version,
                "vocab_size": facts.vocab_size,
                "context_length": facts.context_length,
                "max_running_requests": facts.max_running_requests,
                "max_total_num_tokens": facts.max_total_tokens,
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
        body = parse(GenerateBody, await request.read())
        sequences = await self._engine.generate(body)
        version = self._engine.weight_version
        answers = [answer(s, text=self._engine.text(s), weight_version=version) for s in sequences]
        return _json(answers if is_batch(body) else answers[0])

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        try:
            num_paused = await self._engine.update_weights(parse(UpdateBody, await request.read()))
        except EngineRefused as error:
            return _update_answer(success=False, message=str(error), num_paused_requests=0, status=400)
        return _update_answer(
            success=True, message="Succeeded to update model weights.", num_paused_requests=num_paused
        )

    async def pause_generation(self, request: web.Request) -> web.Response:
        body = parse(PauseBody, await request.read())
        self._engine.pause(body.mode)
        return _json({"status": "ok", "message": f"Generation paused ({body.mode})."})

    async def continue_generation(self, request: web.Request) -> web.Response:
        parse(ContinueBody, await request.read())
        self._engine.resume()
        return _json({"status": "ok", "message": "Generation continued."})

    async def abort_request(self, request: web.Request) -> web.Response:
        body = parse(AbortBody, await request.read())
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


def _guard(api_key: str | None) -> Middleware:
    """Checks the bearer token, and turns refusals into JSON errors."""
    expected = f"Bearer {api_key}".encode() if api_key is not None else None

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected is not None and request.path != "/health":
            given = request.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, expected):
                return _error("Authorization must be `Bearer` and the engine's api key", status=401)
        try:
            return await handler(request)
        except EngineRefused as error:
            return _error(str(error), status=400)
        except EngineUnavailable as error:
            return _error(str(error), status=503)
        except web.HTTPException as error:
            return _error(f"{request.method} {request.path}: {error.reason}", status=error.status)

    return guard


def _error(message: str, *, status: int) -> web.Response:
    return _json({"error": {"message": message, "code": status}}, status=status)


def _update_answer(*, success: bool, message: str, num_paused_requests: int, status: int = 200) -> web.Response:
    return _json({"success": success, "message": message, "num_paused_requests": num_paused_requests}, status=status)


def _json(value: Answer | list[Answer] | dict[str, object], *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
