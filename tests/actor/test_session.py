"""The session records exactly the tokens that the policy read and sampled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from actor.chat.tokenizer import Tokenizer
from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import Retry
from actor.session import BudgetExceeded, Session
from actor.tools.tool import Observation, Services, Tool, ToolContext
from protocol.config_base import Options
from protocol.errors import ConfigError, EngineUnavailable, UnknownVersion
from protocol.types import Edge, Question, VersionSpan

END = 1


@pytest.fixture
async def pool(engine) -> AsyncIterator[EnginePool]:
    async with EnginePool(run_id=None, retry=Retry(num_attempts=2, base_s=0.001)) as p:
        p.set_engines([EngineInfo(engine.url, 0)])
        yield p


def session(pool: EnginePool, tokenizer: Tokenizer, **options) -> Session:
    options = {"run_id": "run", "max_context_tokens": 32, "sampling": SamplingParams(), **options}
    return Session(pool=pool, tokenizer=tokenizer, **options)


async def test_a_context_has_exactly_the_tokens_read_and_sampled(engine, pool, toy_tokenizer) -> None:
    sampled = toy_tokenizer.encode("zuka founder <end>")
    engine.reply(sampled, cached_tokens=3)
    engine.reply([40, 40, END], spans=[("run:1:0", 0, 1), ("run:2:1", 1, 2), ("run:2:1", 2, 3)])
    s = session(pool, toy_tokenizer)
    s.open_context("<question> what is zuka founder ?", turn=2, edge=Edge.MEMORY_RESET, role="r", policy="p")
    generation = await s.generate(8, [END])
    assert (generation.text, generation.finish) == ("zuka founder", "stop")
    s.append("<memory>")
    await s.generate(8, [END])
    context = s.close_context()

    prompt = toy_tokenizer.encode("<question> what is zuka founder ?")
    glue = toy_tokenizer.encode("<memory>")
    assert context.token_ids.tolist() == [*prompt, *sampled, *glue, 40, 40, END]
    n, m = len(prompt), len(prompt) + len(sampled)
    assert context.loss_mask.tolist() == [False] * n + [True] * len(sampled) + [False] + [True] * 3
    np.testing.assert_array_equal(context.behavior_logprobs[n:m], [-k / 8 for k in range(m - n)])
    assert not context.behavior_logprobs[~context.loss_mask].any()
    assert context.policy_versions == (
        VersionSpan(n, m, 0, 1),
        VersionSpan(m + 1, m + 2, 0, 1),
        VersionSpan(m + 2, m + 4, 1, 2),
    )
    assert (context.turn, context.edge, context.role, context.policy) == (2, Edge.MEMORY_RESET, "r", "p")
    assert engine.requests[1]["input_ids"] == [*prompt, *sampled, *glue]
    assert (s.num_generations, s.num_generated_tokens) == (2, len(sampled) + 3)
    assert (s.num_prompt_tokens, s.num_cached_tokens) == (n + 1, 3)
    assert s.transcripts() == (toy_tokenizer.decode(context.token_ids.tolist()),)


async def test_sampled_ids_are_not_encoded_again(engine, pool, chat_tokenizer) -> None:
    odd = [chat_tokenizer.encode("é")[0], *chat_tokenizer.encode("mem"), *chat_tokenizer.encode("ory")]
    assert chat_tokenizer.encode(chat_tokenizer.decode(odd)) != odd
    engine.reply(odd, finish={"type": "length"})
    s = session(pool, chat_tokenizer)
    s.open_context([7])
    assert (await s.generate(len(odd), [2])).finish == "length"
    assert s.close_context().token_ids.tolist() == [7, *odd]


async def test_an_aborted_attempt_is_not_recorded_or_counted(engine, pool, toy_tokenizer) -> None:
    engine.reply([40, 41, 42], finish={"type": "abort", "message": "update"})
    engine.reply([43, END])
    s = session(pool, toy_tokenizer)
    s.open_context([7])
    await s.generate(8, [END])
    assert s.close_context().token_ids.tolist() == [7, 43, END]
    assert (s.num_generations, s.num_generated_tokens) == (1, 2)


async def test_a_failed_generation_records_nothing(engine, pool, toy_tokenizer) -> None:
    engine.fail(500, "boom")
    engine.fail(500, "boom")
    engine.reply([END])
    s = session(pool, toy_tokenizer)
    s.open_context([7])
    with pytest.raises(EngineUnavailable):
        await s.generate(8, [END])
    await s.generate(8, [END])
    assert s.close_context().token_ids.tolist() == [7, END]


@pytest.mark.parametrize("version", ["default", "other:1:0"])
async def test_a_version_of_another_run_is_refused(engine, pool, toy_tokenizer, version: str) -> None:
    engine.weight_version = version
    engine.reply([END])
    s = session(pool, toy_tokenizer)
    s.open_context([7])
    with pytest.raises(UnknownVersion):
        await s.generate(8, [END])
    assert s.close_context().num_trained_tokens == 0


async def test_evaluation_accepts_any_version(engine, pool, toy_tokenizer) -> None:
    engine.weight_version = "default"
    engine.reply([END])
    greedy = SamplingParams(temperature=0, allow_truncation=True)
    s = session(pool, toy_tokenizer, run_id=None, sampling=greedy)
    s.open_context([7])
    await s.generate(8, [END])
    assert s.close_context().policy_versions == (VersionSpan(1, 2, 0, 0),)
    with pytest.raises(ConfigError, match="truncate"):
        session(pool, toy_tokenizer, sampling=greedy)


async def test_a_generation_is_limited_to_the_room_and_refused_without_room(engine, pool, toy_tokenizer) -> None:
    engine.reply([40, 41], finish={"type": "length"})
    s = session(pool, toy_tokenizer, max_context_tokens=5)
    s.open_context([7, 7, 7])
    await s.generate(8, [END])
    assert engine.requests[0]["sampling_params"]["max_new_tokens"] == 2
    with pytest.raises(BudgetExceeded, match=r"workflow\.context_tokens = 5 tokens, this one of turn 0 has 5"):
        await s.generate(8, [END])
    assert len(engine.requests) == 1


async def test_a_stop_token_as_the_last_permitted_token_is_a_stop(engine, pool, toy_tokenizer) -> None:
    engine.reply([40, END], finish={"type": "length"})
    s = session(pool, toy_tokenizer)
    s.open_context([7])
    generation = await s.generate(2, [END])
    assert (generation.finish, generation.text) == ("stop", toy_tokenizer.decode([40]))


async def test_a_stop_at_another_token_is_an_illegal_stop(engine, pool, toy_tokenizer) -> None:
    engine.reply([40, 0])
    s = session(pool, toy_tokenizer)
    s.open_context([7])
    assert (await s.generate(8, [END])).finish == "illegal_stop"


async def test_each_generation_has_its_own_seed(engine, pool, toy_tokenizer) -> None:
    seeds = []
    for _ in range(2):
        engine.reply([END])
        engine.reply([END])
        s = session(pool, toy_tokenizer, sampling=SamplingParams(seed=5))
        s.open_context([7])
        await s.generate(8, [END])
        await s.generate(8, [END])
        seeds.append([r["sampling_params"]["sampling_seed"] for r in engine.requests[-2:]])
    assert seeds[0] == seeds[1]
    assert seeds[0][0] != seeds[0][1]


async def test_defaults_stop_at_the_end_of_sequence_and_number_the_contexts(engine, pool, toy_tokenizer) -> None:
    s = session(pool, toy_tokenizer)
    for _ in range(2):
        engine.reply([40, toy_tokenizer.eos_token_id])
        s.open_context([7])
        assert (await s.generate(8)).finish == "stop"
        s.close_context()
    stops = [request["sampling_params"]["stop_token_ids"] for request in engine.requests]
    assert stops == [[toy_tokenizer.eos_token_id]] * 2
    assert [(c.turn, c.edge) for c in s.contexts] == [(0, Edge.START), (1, Edge.MEMORY_RESET)]


async def test_contexts_are_opened_and_closed_in_turn(pool, toy_tokenizer) -> None:
    s = session(pool, toy_tokenizer)
    with pytest.raises(RuntimeError, match="no context is open"):
        s.append([7])
    s.open_context([7])
    with pytest.raises(RuntimeError, match="a context is open"):
        s.open_context([7])
    assert s.room == 31
    s.close_context()
    assert not s.is_open
    with pytest.raises(RuntimeError, match="no context is open"):
        s.close_context()


class Echo(Tool):
    """Returns its arguments and the episode's id as text."""

    schema = MappingProxyType({"name": "echo", "description": "", "parameters": {}})

    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> Observation:
        return Observation(text=f"{arguments} {context.question.id} {context.episode_id}")


async def test_a_tool_call_gets_the_episode_is_counted_and_is_not_appended(pool, toy_tokenizer) -> None:
    s = session(pool, toy_tokenizer, question=Question("q3", "who?", ()), rid="4.0.1")
    s.open_context([7])
    observation = await s.call(Echo(Options(), services=Services()), {"a": 1})
    assert observation == Observation(text="{'a': 1} q3 4.0.1")
    assert s.close_context().token_ids.tolist() == [7]
    assert s.stats() == {
        "num_turns": 1.0,
        "num_generations": 0.0,
        "num_tool_calls": 1.0,
        "num_prompt_tokens": 1.0,
        "num_cached_tokens": 0.0,
        "num_generated_tokens": 0.0,
        "peak_context_tokens": 1.0,
    }
