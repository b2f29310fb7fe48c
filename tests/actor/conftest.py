"""A scripted policy behind a real HTTP server, a scripted retriever behind a real socket, and small tokenizers."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from actor.chat.tokenizer import Tokenizer
from actor.tasks.toy.tokenizer import write_tokenizer
from actor.tools.search_client import SearchClient
from protocol.framing import decode, encode, expect
from protocol.search_messages import ErrorReply, PassageFields, SearchReply, SearchRequest
from protocol.transport import Transport


class ScriptedEngine:
    """Implements SGLang's HTTP API. `reply` queues the tokens of a response; `requests` are all received requests.

    With `has_ended`, it answers as if its process had ended; a hanging request is refused.
    """

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.aborted: list[dict] = []
        self.url = ""
        self.weight_version = "run:1:0"
        self.hang = asyncio.Event()
        self.hanging = asyncio.Event()
        self.has_ended = False
        self._replies: deque[tuple[int, object]] = deque()

    def reply(
        self,
        ids: list[int],
        *,
        finish: dict | None = None,
        spans: list[tuple[str, int, int]] | None = None,
        has_spans: bool = True,
        **meta: object,
    ) -> None:
        """Queues a response; by default it stops at the last id, all of `weight_version`. Token k: log-prob -k/8."""
        spans = [(self.weight_version, 0, len(ids))] if spans is None else spans
        info = {
            "id": "x",
            "finish_reason": finish or {"type": "stop", "matched": ids[-1]},
            "prompt_tokens": 1,
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "weight_version": self.weight_version,
            "weight_versions": [{"version": v, "start": s, "end": e} for v, s, e in spans],
            "output_token_logprobs": [[-k / 8, token, None] for k, token in enumerate(ids)],
            **meta,
        }
        if not has_spans:
            del info["weight_versions"]
        self._replies.append((200, {"text": "", "output_ids": ids, "meta_info": info}))

    def reply_as_queued_and_aborted(self) -> None:
        """Queues the answer of SGLang 0.5.23 to a request that was aborted before any of its tokens was computed."""
        info = {
            "id": "x",
            "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
            "weight_version": self.weight_version,
            "weight_versions": [{"version": self.weight_version, "start": 0, "end": 0}],
            "completion_tokens": 0,
        }
        self._replies.append((200, {"text": "", "output_ids": [], "meta_info": info}))

    def fail(self, status: int, message: str) -> None:
        self._replies.append((status, {"error": {"message": message}}))

    def hang_once(self) -> None:
        """The next queued response is never sent."""
        self._replies.append((0, None))

    async def generate(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        status, body = self._replies.popleft()
        if status == 0:
            self.hanging.set()
            await self.hang.wait()
            return web.Response(status=404 if self.has_ended else 500)
        return web.json_response(body, status=status)

    async def model_info(self, _: web.Request) -> web.Response:
        if self.has_ended:
            return web.Response(status=503)
        return web.json_response({"model_path": "m", "weight_version": self.weight_version})

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append(await request.json())
        return web.Response()


@pytest.fixture
async def start_engine() -> AsyncIterator[object]:
    runners: list[web.AppRunner] = []
    engines: list[ScriptedEngine] = []

    async def start() -> ScriptedEngine:
        engine = ScriptedEngine()
        app = web.Application()
        app.router.add_post("/generate", engine.generate)
        app.router.add_get("/model_info", engine.model_info)
        app.router.add_post("/abort_request", engine.abort)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        engine.url = f"http://{host}:{port}"
        runners.append(runner)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.hang.set()
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def engine(start_engine) -> ScriptedEngine:
    return await start_engine()


class ScriptedRetriever:
    """Returns, for each query, `top_n` passages that contain the query; or returns an error, or does not reply.

    Replies are sent in batches of `batch_size`: a batch waits until it is complete.
    """

    def __init__(self, transport: Transport) -> None:
        self.router = transport.router("tcp://127.0.0.1:0")
        self.requests: list[SearchRequest] = []
        self.error = ""
        self.silent = False
        self.text = "{query} kami ."
        self.batch_size = 1

    async def serve(self) -> None:
        waiting: list[tuple[bytes, SearchRequest]] = []
        while True:
            peer, frames = await self.router.recv()
            request = expect(decode(frames)[0], SearchRequest)
            self.requests.append(request)
            if self.silent:
                continue
            waiting.append((peer, request))
            if len(waiting) < self.batch_size:
                continue
            for sender, received in waiting:
                self.router.send(sender, [encode(self._answer(received))])
            waiting.clear()

    def _answer(self, request: SearchRequest) -> ErrorReply | SearchReply:
        if self.error:
            return ErrorReply(request_id=request.request_id, error=self.error)
        results = [
            [
                PassageFields(id=f"d{k}", title=f"T{k}", text=self.text.format(query=query), score=-float(k))
                for k in range(request.top_n)
            ]
            for query in request.queries
        ]
        return SearchReply(request_id=request.request_id, results=results)


@pytest.fixture
async def retriever() -> AsyncIterator[ScriptedRetriever]:
    transport = Transport()
    scripted = ScriptedRetriever(transport)
    task = asyncio.create_task(scripted.serve())
    yield scripted
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    transport.close()


@pytest.fixture
async def search(retriever: ScriptedRetriever) -> AsyncIterator[SearchClient]:
    transport = Transport()
    async with SearchClient(transport=transport, address=retriever.router.address, timeout_s=0.5) as client:
        yield client
    transport.close()


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def toy_tokenizer(toy_folder: Path) -> Tokenizer:
    return Tokenizer.load(toy_folder)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with Qwen2's chat tokens."""
    folder = tmp_path_factory.mktemp("chat")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in special],
        show_progress=False,
    )
    fast.train_from_iterator(["the memory of the question and the answer <memory> </memory> <think>"] * 4, trainer)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder: Path) -> Tokenizer:
    return Tokenizer.load(chat_folder)
