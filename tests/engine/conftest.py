"""A small model folder, an engine that serves it, an HTTP client, and reference log-probs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actor.engine.server import EngineServer

VOCAB_SIZE = 50
CONTEXT_LENGTH = 512


def build_model(*, seed: int, architecture: str = "qwen2", tied: bool = True) -> PreTrainedModel:
    """Two layers, four heads, two key-value heads. `initializer_range` is large, so that log-probs differ clearly."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    match architecture:
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)).eval()
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    raise AssertionError(architecture)


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that saves a random model with its tokenizer and returns the folder."""

    def make(*, seed: int = 0, architecture: str = "qwen2", tied: bool = True) -> Path:
        folder = tmp_path_factory.mktemp(f"{architecture}-{seed}")
        build_model(seed=seed, architecture=architecture, tied=tied).save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def folder(make_folder: Callable[..., Path]) -> Path:
    return make_folder(seed=0)


@pytest.fixture(scope="session")
def new_weights(make_folder: Callable[..., Path]) -> Path:
    return make_folder(seed=1)


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: dict


@dataclass(frozen=True, slots=True)
class Client:
    url: str
    http: aiohttp.ClientSession

    async def post(self, path: str, body: object = None) -> Reply:
        async with self.http.post(self.url + path, json={} if body is None else body) as response:
            is_json = response.content_type == "application/json"
            return Reply(response.status, await response.json() if is_json else {"text": await response.text()})

    async def get(self, path: str) -> Reply:
        async with self.http.get(self.url + path) as response:
            is_json = response.content_type == "application/json"
            return Reply(response.status, await response.json() if is_json else {"text": await response.text()})

    async def generate(self, prompt: list[int], *, rid: str | None = None, **sampling: object) -> dict:
        """Returns the response to one request, which must succeed."""
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "rid": rid}
        reply = await self.post("/generate", body)
        assert reply.status == 200, reply.body
        return reply.body

    async def num_running(self) -> int:
        return (await self.get("/server_info")).body["internal_states"][0]["num_running_reqs"]

    async def until_running(self, num: int) -> None:
        """Polls until `num` requests run. The engine shares the event loop, so each poll takes a few steps of it."""
        async with asyncio.timeout(20):
            while await self.num_running() < num:
                pass


@pytest.fixture
async def serve() -> AsyncIterator[Callable]:
    """Returns a function that starts a server on a free port and returns a client. The servers stop after the test."""
    servers: list[EngineServer] = []
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))

    async def start(model_path: Path, **options: object) -> Client:
        server = EngineServer(model_path=model_path, **options)  # pyright: ignore[reportArgumentType]
        await server.start()
        servers.append(server)
        return Client(server.url, session)

    yield start
    await session.close()
    for server in servers:
        await server.stop()


@pytest.fixture
async def client(serve: Callable, folder: Path) -> Client:
    return await serve(folder)


def reference_logprobs(
    model_path: Path, prompt: list[int], output: list[int], *, temperature: float = 1.0
) -> torch.Tensor:
    """Computes log-probs of `output` after `prompt` by one fp32 forward pass without cache: float32 [len(output)]."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + output]), use_cache=False).logits[0]
    logprobs = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(output)[:, None])[:, 0]


def sampled_logprobs(answer: dict) -> torch.Tensor:
    """Returns the log-probs of a response, after checking that they belong to its tokens."""
    entries = answer["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in entries] == answer["output_ids"]
    return torch.tensor([logprob for logprob, _, _ in entries])
