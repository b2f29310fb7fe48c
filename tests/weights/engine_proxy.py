"""An HTTP proxy between a weight agent and its engine, which can lose requests and change completions."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web


class EngineProxy:
    """Forwards every request to `engine_url`, except for the faults that a test sets.

    lost_path       requests to this path get HTTP 502 and do not reach the engine; `num_lost` counts them
    generate_hangs  requests to /generate get no response
    hides_pauses    /server_info does not state whether the engine is paused, as in SGLang
    meta_info       replaces these fields of `meta_info` in responses of /generate
    """

    def __init__(self, engine_url: str) -> None:
        self._engine_url = engine_url
        self._http = aiohttp.ClientSession()
        self._app_runner: web.AppRunner | None = None
        self.url = ""
        self.lost_path = ""
        self.num_lost = 0
        self.generate_hangs = False
        self.hides_pauses = False
        self.meta_info: dict[str, object] = {}

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._app_runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._app_runner.setup()
        await web.TCPSite(self._app_runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._app_runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._app_runner is not None:
            await self._app_runner.cleanup()
        await self._http.close()

    async def _forward(self, request: web.Request) -> web.Response:
        if request.path == self.lost_path:
            self.num_lost += 1
            return web.Response(status=502, text="the connection broke")
        is_generate = request.path == "/generate"
        if is_generate and self.generate_hangs:
            await asyncio.Event().wait()
        url = self._engine_url + request.path
        headers = {name: request.headers[name] for name in ("Content-Type", "Authorization") if name in request.headers}
        try:
            async with self._http.request(request.method, url, data=await request.read(), headers=headers) as response:
                if is_generate and response.status == 200 and self.meta_info:
                    completion = await response.json()
                    completion["meta_info"] |= self.meta_info
                    return web.json_response(completion)
                if request.path == "/server_info" and self.hides_pauses:
                    info = await response.json()
                    return web.json_response({name: info[name] for name in info if name != "internal_states"})
                body, content_type = await response.read(), response.content_type
                return web.Response(body=body, status=response.status, content_type=content_type)
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=str(error))
