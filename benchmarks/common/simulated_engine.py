"""An engine without a model, for benchmarks/asynchrony.py: it sleeps a fixed time for each token."""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from aiohttp import web

from protocol.framing import decode, encode, expect
from protocol.messages import EngineFields
from protocol.transport import Transport
from protocol.types import PolicyTag
from protocol.weight_messages import Announcement, EngineReply, EngineReport

NUM_SLOTS, VOCABULARY = 64, 100


@dataclass(frozen=True, slots=True)
class Addresses:
    control: str
    weights: str
    announcements: str


class Engine:
    """Implements the part of SGLang's API that an actor uses. FIFO, `NUM_SLOTS` requests at once."""

    def __init__(self, *, token_s: float, commit_s: float) -> None:
        self.lengths: list[int] = []
        self._token_s = token_s
        self._commit_s = commit_s
        self._slots = asyncio.Semaphore(NUM_SLOTS)
        self._commits_s: list[float] = []
        self._tags: list[str] = []

    async def serve(self) -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/model_info", self._model_info)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        return runner, f"http://{host}:{port}"

    async def follow(self, transport: Transport, addresses: Addresses, url: str) -> None:
        """Acts as the weight agent: commits each announced version and reports it."""
        subscriber = transport.subscriber(addresses.announcements)
        dealer = transport.dealer(addresses.weights)
        fields = EngineFields(name="engine", url=url, version=-1, publication=-1)
        while True:
            await dealer.send([encode(EngineReport(request_id=1, engine=fields, state="serving"))])
            reply = expect(decode(await dealer.recv())[0], EngineReply)
            if reply.version == fields.version:
                try:
                    async with asyncio.timeout(1.0):
                        expect(decode(await subscriber.recv())[0], Announcement)
                except TimeoutError:
                    pass
                continue
            await asyncio.sleep(self._commit_s)
            self._commits_s.append(time.perf_counter())
            self._tags.append(str(PolicyTag(reply.run_id, reply.publication, reply.version)))
            fields = EngineFields(name="engine", url=url, version=reply.version, publication=reply.publication)

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": "none", "weight_version": self._tags[-1] if self._tags else "default"})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        num_tokens = body["sampling_params"]["max_new_tokens"]
        self.lengths.append(num_tokens)
        async with self._slots:
            start_s = time.perf_counter()
            await asyncio.sleep(num_tokens * self._token_s)
            spans = self._spans(start_s, time.perf_counter(), num_tokens)
        ids = np.arange(num_tokens) % VOCABULARY
        meta = {
            "finish_reason": {"type": "length"},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": num_tokens,
            "weight_version": spans[-1]["version"],
            "weight_versions": spans,
            "output_token_logprobs": [[-1.0, token, None] for token in ids.tolist()],
        }
        return web.json_response({"output_ids": ids.tolist(), "meta_info": meta})

    def _spans(self, start_s: float, end_s: float, num_tokens: int) -> list[dict[str, str | int]]:
        """Returns the version spans of a generation that lasted from `start_s` to `end_s`."""
        first = bisect_right(self._commits_s, start_s) - 1
        token_s = (end_s - start_s) / num_tokens
        cuts = [math.ceil((commit_s - start_s) / token_s) for commit_s in self._commits_s[first + 1 :]]
        bounds = [0, *(min(cut, num_tokens) for cut in cuts), num_tokens]
        return [
            {"version": tag, "start": start, "end": end}
            for tag, start, end in zip(self._tags[first:], bounds[:-1], bounds[1:], strict=True)
            if start < end
        ]
