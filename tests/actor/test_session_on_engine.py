"""The session on the embedded engine: a forward pass over a recorded context gives the recorded log-probs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from actor.chat.tokenizer import Tokenizer
from actor.engine.server import EngineServer
from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import SGLangClient
from actor.session import Session
from actor.tasks.toy.tokenizer import write_tokenizer
from actor.workflows.memsearcher import MemSearcher, MemSearcherOptions
from protocol.types import Context, Question, Status
from tests.actor.search_tool import search_tool

END = 1


def save_model(folder: Path, seed: int) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=98,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=END,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_model(tmp_path_factory.mktemp("a"), 0), save_model(tmp_path_factory.mktemp("b"), 1)


@pytest.fixture
async def server(models: tuple[Path, Path]) -> AsyncIterator[EngineServer]:
    server = EngineServer(model_path=models[0], seed=3)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(server: EngineServer) -> AsyncIterator[SGLangClient]:
    async with SGLangClient(server.url) as c:
        yield c


@pytest.fixture
async def pool(server: EngineServer) -> AsyncIterator[EnginePool]:
    async with EnginePool(run_id=None) as p:
        p.set_engines([EngineInfo(server.url, 0)])
        yield p


def session(pool: EnginePool, folder: Path, **options) -> Session:
    options = {"run_id": "run", "max_context_tokens": 200, "sampling": SamplingParams(temperature=0.7), **options}
    return Session(pool=pool, tokenizer=Tokenizer.load(folder), **options)


async def record(s: Session) -> Context:
    s.open_context("<question> what is zuka founder ? <memory> none <think>")
    await s.generate(24, [END])
    s.append("<information> zuka founder kami . <memory>")
    await s.generate(24, [END])
    return s.close_context()


def forward(folder: Path, context: Context, temperature: float) -> torch.Tensor:
    """float32 [L-1, V]: log-probabilities of each next token, from one pass over the whole sequence."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(context.token_ids[None].astype(np.int64))).logits[0, :-1]
    return torch.log_softmax(logits / temperature, dim=-1)


def mismatch(folder: Path, context: Context, positions: np.ndarray) -> float:
    logprobs = forward(folder, context, 0.7).numpy()
    again = logprobs[positions - 1, context.token_ids[positions]]
    return float(np.abs(again - context.behavior_logprobs[positions]).max())


async def test_recorded_logprobs_are_reproduced_before_and_after_an_update(models, client, pool) -> None:
    for publication, folder in enumerate(models):
        await client.update_weights_from_disk(str(folder), weight_version=f"run:{publication}:{publication}")
        context = await record(session(pool, folder))
        positions = np.flatnonzero(context.loss_mask)
        assert len(positions) > 2
        assert {span.publication for span in context.policy_versions} == {publication}
        assert mismatch(folder, context, positions) < 1e-4


async def test_greedy_tokens_are_reproduced(models, pool) -> None:
    greedy = SamplingParams(temperature=0, allow_truncation=True)
    context = await record(session(pool, models[0], run_id=None, sampling=greedy))
    positions = np.flatnonzero(context.loss_mask)
    best = forward(models[0], context, 1.0).argmax(dim=-1).numpy()
    np.testing.assert_array_equal(best[positions - 1], context.token_ids[positions])


def save_chain(folder: Path, chain: str) -> Path:
    """Saves a model that predicts the next word of `chain` from the last token only, and `<end>` after other tokens."""
    config = Qwen2Config.from_pretrained(save_model(folder, 0), hidden_size=128, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config)
    ids = Tokenizer.load(folder).encode(chain)
    following = torch.full((98,), END)
    following[torch.tensor(ids[:-1])] = torch.tensor(ids[1:])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(98, 128))
        model.lm_head.weight.zero_()
        model.lm_head.weight[following, torch.arange(98)] = 100.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("missing", "reason"),
    [((0, 0), "no answer"), ((1, 0), "an action was cut off at 3"), ((0, 1), "a memory was cut off")],
)
async def test_a_piece_as_long_as_its_token_limit_is_complete(
    tmp_path: Path, missing: tuple[int, int], reason: str
) -> None:
    folder = save_chain(tmp_path, "<think> <search> zu ka <end> <memory> pe lu")
    options = MemSearcherOptions(
        rendering="toy",
        max_turns=2,
        action_tokens=4 - missing[0],
        memory_tokens=2 - missing[1],
        memory_overflow="fail",
    )
    server = EngineServer(model_path=folder, seed=3)
    await server.start()
    async with EnginePool(run_id=None) as pool:
        pool.set_engines([EngineInfo(server.url, 0)])
        workflow = MemSearcher(options, tools={"search": search_tool()}, context_tokens=200)
        episode = await workflow.run(
            Question("q", "what is zuka founder ?", ("x",)),
            session(pool, folder, run_id=None, sampling=SamplingParams(temperature=0, allow_truncation=True)),
        )
    await server.stop()
    assert (episode.status, episode.memories) == (Status.OVER_BUDGET, () if any(missing) else ("pelu",))
    assert reason in episode.reason


async def until_running(url: str) -> None:
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/server_info") as response:
                if (await response.json())["internal_states"][0]["num_running_reqs"]:
                    return


async def test_a_weight_update_during_generation_splits_the_version_span(models, server, client, pool) -> None:
    await client.update_weights_from_disk(str(models[0]), weight_version="run:0:0")
    s = session(pool, models[0], max_context_tokens=500)
    s.open_context([7, 8, 9])
    generating = asyncio.create_task(s.generate(480, []))
    await until_running(server.url)
    await client.pause("retract")
    await client.update_weights_from_disk(str(models[1]), weight_version="run:1:1")
    await client.continue_()
    await generating
    context = s.close_context()
    assert [span.publication for span in context.policy_versions] == [0, 1]
    for span in context.policy_versions:
        # With retract, tokens after the boundary match the new version exactly: it computed their KV cache.
        assert mismatch(models[span.publication], context, np.arange(span.start, span.end)) < 1e-4
