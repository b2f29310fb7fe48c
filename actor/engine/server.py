"""The embedded engine as an HTTP server: loads a model folder, listens on an address, runs the engine's loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from pathlib import Path

from aiohttp import web

from actor.engine.engine import Engine
from actor.engine.http_routes import ServerProperties, build_app
from actor.engine.request_origin import OriginCheck
from actor.engine.request_validation import RequestLimits
from actor.engine.scheduler import MIN_QUEUE_CAPACITY, Scheduler
from actor.engine.update_source import UpdateSource
from protocol.addresses import is_loopback_host
from protocol.errors import ConfigError, SecurityError, UnreachableError

_MAX_PREFILL_TOKENS = 16_384
_BACKLOG = 1024
# Cache rows for prefixes. A context's next request comes after its tool call: about that number of other requests may
# end before it. The operating system commits the memory of a row when it is first used.
_SAVED_ROWS_PER_REQUEST = 2


class EngineServer:
    """Serves a transformers model on the CPU over SGLang's HTTP API.

    port                0 chooses a free port
    max_total_tokens    bound on the sum of the final lengths of running requests; beyond it, requests queue.
                        Default: `max_running_requests` full contexts
    context_length      upper limit of the model's context length; the KV cache has room for `max_running_requests`
                        contexts of this length
    seed                seeds the requests without `sampling_seed`
    weight_version      stated for the weights of `model_path`; SGLang's default is "default"
    min_queue_capacity  lower bound of the queue's capacity in requests; further requests are refused (HTTP 503)
    advertised          the server's URL for actors, if it is not its own address
    update_source       which weights may be installed; None: any
    """

    def __init__(
        self,
        *,
        model_path: str | Path,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        max_running_requests: int = 128,
        max_total_tokens: int | None = None,
        context_length: int | None = None,
        torch_threads: int = 1,
        seed: int = 0,
        weight_version: str = "default",
        min_queue_capacity: int = MIN_QUEUE_CAPACITY,
        advertised: str | None = None,
        update_source: UpdateSource | None = None,
    ) -> None:
        for name, value in {
            "max_running_requests": max_running_requests,
            "max_total_tokens": max_total_tokens,
            "context_length": context_length,
            "torch_threads": torch_threads,
        }.items():
            if value is not None and value < 1:
                raise ConfigError(f"the engine's {name} must be >= 1, got {value}")
        if not api_key and not is_loopback_host(host):
            raise SecurityError(f"network.api_key_file must be set to listen beyond loopback, got none for host {host}")
        self._model_path = Path(model_path)
        self._host = host
        self._port = port
        self._api_key = api_key
        self._max_running_requests = max_running_requests
        self._max_total_tokens = max_total_tokens
        self._context_length = context_length
        self._torch_threads = torch_threads
        self._seed = seed
        self._weight_version = weight_version
        self._min_queue_capacity = min_queue_capacity
        self._advertised = advertised
        self._update_source = update_source
        self._app_runner: web.AppRunner | None = None
        self._engine: Engine | None = None
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The server's address. With `port` 0, the port is known only after `start`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def start(self) -> None:
        """Binds the address, loads the model (seconds), and starts to serve.

        Raises: UnreachableError (the address cannot be bound), DataError (the model folder cannot be served).
        """
        listener = self._listen()
        try:
            engine, properties = self._load()
            app = build_app(
                engine=engine,
                properties=properties,
                api_key=self._api_key,
                origin=OriginCheck(self._host, self._port, self._advertised),
                update_source=self._update_source,
            )
            self._app_runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
            await self._app_runner.setup()
            await web.SockSite(self._app_runner, listener, backlog=_BACKLOG).start()
        except BaseException:
            listener.close()
            await self.stop()
            raise
        self._engine = engine
        self._loop_task = asyncio.create_task(engine.run(), name="engine")

    async def wait(self) -> None:
        """Returns when the server is stopped. If a step failed, raises its error."""
        task = self._loop_task
        if task is not None:
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def stop(self) -> None:
        """Stops serving. Requests in flight get the finish reason `abort`. Idempotent."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._loop_task
            self._loop_task = None
        if self._engine is not None:
            self._engine.close()
        if self._app_runner is not None:
            await self._app_runner.cleanup()
            self._app_runner = None

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self._port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound ({error.strerror or error})"
            raise UnreachableError(
                f"engine address {self._host}:{self._port} {reason}: choose another port, or 0 for a free port"
            ) from error
        listener.setblocking(False)
        self._port = listener.getsockname()[1]
        return listener

    def _load(self) -> tuple[Engine, ServerProperties]:
        import torch

        from actor.engine.model_runner import ModelRunner

        torch.set_num_threads(self._torch_threads)
        num_saved_rows = _SAVED_ROWS_PER_REQUEST * self._max_running_requests
        runner = ModelRunner.load(
            self._model_path,
            num_rows=self._max_running_requests + num_saved_rows,
            context_length=self._context_length,
        )
        model = runner.properties
        max_total_tokens = self._max_total_tokens or self._max_running_requests * runner.context_length
        engine = Engine(
            runner=runner,
            scheduler=Scheduler(
                max_running_requests=self._max_running_requests,
                max_total_tokens=max_total_tokens,
                max_prefill_tokens=_MAX_PREFILL_TOKENS,
                min_queue_capacity=self._min_queue_capacity,
                num_saved_rows=num_saved_rows,
            ),
            limits=RequestLimits(
                vocab_size=model.vocab_size,
                context_length=runner.context_length,
                max_total_tokens=max_total_tokens,
                eos_token_ids=model.eos_token_ids,
            ),
            seed=self._seed,
            model_path=str(self._model_path),
            weight_version=self._weight_version,
        )
        properties = ServerProperties(
            tokenizer_path=str(self._model_path),
            model_type=model.model_type,
            architectures=model.architectures,
            vocab_size=model.vocab_size,
            context_length=runner.context_length,
            max_running_requests=self._max_running_requests,
            max_total_tokens=max_total_tokens,
        )
        return engine, properties
