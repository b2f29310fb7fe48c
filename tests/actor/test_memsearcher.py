"""The workflow MemSearcher with a scripted policy over real HTTP and a scripted retriever over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest

from actor.chat.fit_observation import longest_that_fits
from actor.chat.rendering import Fidelity, Rendering
from actor.chat.tokenizer import Tokenizer
from actor.chat.toy import ToyRendering
from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import Retry
from actor.episode import Episode
from actor.rewards.format import check_chat
from actor.rewards.reward import ExactMatchReward
from actor.rollout import Episodes
from actor.tools.tool import Searcher
from actor.workflows.memsearcher import MAX_CALLS, MemSearcher, MemSearcherOptions, frame_tokens
from protocol.config_base import Options
from protocol.errors import ConfigError
from protocol.types import Context, Edge, Question, Status
from tests.actor.conftest import ScriptedEngine, ScriptedRetriever
from tests.actor.search_tool import FUNCTION, chat_rendering, search_tool

QUESTION = Question("q0", "what is zuka founder birthplace ?", ("peru",))
CONTEXT_TOKENS = 6_000
MAX_TOP_N = 20


@pytest.fixture
async def pool(engine: ScriptedEngine) -> AsyncIterator[EnginePool]:
    async with EnginePool(run_id="run", retry=Retry(num_attempts=2, base_s=0.001)) as p:
        p.set_engines([EngineInfo(engine.url, 0)])
        yield p


class Stage:
    """A rendering, its tokenizer, a workflow that uses them, and an engine that returns queued texts."""

    def __init__(
        self,
        *,
        engine: ScriptedEngine,
        pool: EnginePool,
        search: Searcher,
        kind: Literal["chat", "toy"],
        rendering: Rendering,
        tokenizer: Tokenizer,
    ) -> None:
        self.engine, self.pool, self.search = engine, pool, search
        self.kind, self.rendering, self.tokenizer = kind, rendering, tokenizer
        self.failures: dict[str, int] = {}

    def queue(self, *texts: str) -> None:
        """Queues responses of the policy. A text without the end token has finish reason `length`."""
        for text in texts:
            ids = self.tokenizer.encode(text)
            ended = text.endswith(self.rendering.end_token)
            self.engine.reply(ids, finish=None if ended else {"type": "length"})

    async def play(
        self,
        question: Question = QUESTION,
        *,
        context_tokens: int = CONTEXT_TOKENS,
        top_n: int = 5,
        **options: object,
    ) -> tuple[Episode, tuple[Context, ...]]:
        """Runs one episode. `options`: of the workflow. Sets `failures`: counts of failures by kind."""
        episodes = Episodes(
            workflow=MemSearcher(
                MemSearcherOptions.model_validate({"rendering": self.kind, **options}),
                tools={"search": search_tool(self.search, top_n=top_n)},
                context_tokens=context_tokens,
            ),
            reward=ExactMatchReward(Options()),
            pool=self.pool,
            tokenizer=self.tokenizer,
            sampling=SamplingParams(),
            run_id="run",
            max_context_tokens=context_tokens,
            max_trajectories=1,
        )
        trajectory, episode = await episodes.run(question)
        self.failures = dict(episodes.failures)
        assert trajectory.status == episode.status
        return episode, trajectory.contexts

    def sampled(self, context: Context) -> str:
        return self.tokenizer.decode(context.token_ids[context.loss_mask].tolist())


@pytest.fixture
def toy(engine: ScriptedEngine, pool: EnginePool, search: Searcher, toy_tokenizer: Tokenizer) -> Stage:
    rendering = ToyRendering(tool_name=FUNCTION)
    return Stage(engine=engine, pool=pool, search=search, kind="toy", rendering=rendering, tokenizer=toy_tokenizer)


@pytest.fixture
def chat(engine: ScriptedEngine, pool: EnginePool, search: Searcher, chat_tokenizer: Tokenizer) -> Stage:
    rendering = chat_rendering()
    return Stage(engine=engine, pool=pool, search=search, kind="chat", rendering=rendering, tokenizer=chat_tokenizer)


@pytest.mark.parametrize("kind", ["toy", "chat"])
def test_the_workflow_uses_the_rendering_that_its_options_name(kind: str) -> None:
    workflow = MemSearcher(
        MemSearcherOptions.model_validate({"rendering": kind}),
        tools={"search": search_tool()},
        context_tokens=CONTEXT_TOKENS,
    )
    expected = {"toy": ToyRendering(tool_name=FUNCTION), "chat": chat_rendering()}[kind]
    assert workflow.rendering.end_token == expected.end_token
    assert workflow.rendering.prompt("who?", "") == expected.prompt("who?", "")
    call = expected.write_action_search("t", ["zuka"])
    assert workflow.rendering.parse_action(call) == expected.parse_action(call)


def test_limits_that_do_not_fit_into_a_context_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be < workflow.context_tokens = 1536, got 512 \+ 1024") as caught:
        MemSearcher(MemSearcherOptions(), tools={"search": search_tool()}, context_tokens=1536)
    assert "workflow.action_tokens + workflow.memory_tokens" in str(caught.value)
    MemSearcher(MemSearcherOptions(), tools={"search": search_tool()}, context_tokens=1537)


def test_a_workflow_without_tools_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"workflow\.tools must name at least one tool"):
        MemSearcher(MemSearcherOptions(), tools={}, context_tokens=CONTEXT_TOKENS)


async def test_a_toy_episode_of_three_contexts(toy: Stage, retriever: ScriptedRetriever) -> None:
    toy.queue("zuka founder <search> zuka founder <end>", "zuka founder kami <end>")
    toy.queue("founder birthplace <search> kami birthplace <end>", "kami birthplace pelu <end>")
    toy.queue("birthplace ? <answer> pelu <end>")
    episode, contexts = await toy.play(top_n=3)

    assert (episode.status, episode.answer) == (Status.COMPLETED, "pelu")
    assert episode.memories == ("zuka founder kami", "kami birthplace pelu")
    assert [c.edge for c in contexts] == [Edge.START, Edge.MEMORY_RESET, Edge.MEMORY_RESET]
    assert [c.turn for c in contexts] == [0, 1, 2]
    assert episode.transcripts[0] == (
        "<question> what is zuka founder birthplace ? <memory> none <think> zuka founder <search> zuka founder <end> "
        "<information> zuka founder kami . zuka founder kami . zuka founder kami . <memory> zuka founder kami <end>"
    )
    assert "<memory> kami birthplace pelu <think>" in episode.transcripts[2]
    assert toy.sampled(contexts[1]) == "founder birthplace <search> kami birthplace <end> kami birthplace pelu <end>"
    assert episode.stats["num_turns"] == 3
    assert episode.stats["num_searches"] == 2
    assert episode.stats["num_generations"] == 5
    assert episode.stats["peak_context_tokens"] == max(len(c) for c in contexts)
    assert [list(r.queries) for r in retriever.requests] == [["zuka founder"], ["kami birthplace"]]


async def test_a_chat_episode_is_token_exact(chat: Stage) -> None:
    r = chat.rendering
    chat.queue(r.write_action_search("hm", ["zuka founder"]), r.write_memory("the founder is kami"))
    chat.queue(r.write_answer("sure", "peru"))
    episode, contexts = await chat.play()

    assert (episode.status, episode.answer) == (Status.COMPLETED, "peru")
    assert check_chat(episode.transcripts[-1]).boxed == "peru"
    action, memory, answer = (request["input_ids"] for request in chat.engine.requests)
    said = chat.tokenizer.encode(r.write_action_search("hm", ["zuka founder"]))
    end = chat.tokenizer.eos_token_id
    assert memory[: len(action) + len(said)] == [*action, *said]
    assert said[-1] == end
    glue = chat.tokenizer.decode(memory[len(action) + len(said) :])
    assert glue.startswith("\n<|im_start|>user\n<tool_response>\n[1] T0: zuka founder kami .\n[2] T1:")
    assert glue.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert chat.tokenizer.decode(answer).endswith(
        "<memory>\nthe founder is kami\n</memory><|im_end|>\n<|im_start|>assistant\n<think>"
    )
    assert all(int(c.token_ids[-1]) == end and c.loss_mask[-1] for c in contexts)


async def test_several_calls_of_a_turn_are_sent_concurrently(chat: Stage, retriever: ScriptedRetriever) -> None:
    retriever.batch_size = 3  # no call is answered before all three have arrived
    chat.queue(chat.rendering.write_action_search("hm", ["a", "b", "a"]), chat.rendering.write_memory("m"))
    chat.queue(chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(top_n=2)
    assert sorted(list(r.queries) for r in retriever.requests) == [["a"], ["a"], ["b"]]
    assert episode.transcripts[0].count("<tool_response>") == 3
    assert episode.stats["num_searches"] == 3


def call(arguments: str) -> str:
    return f'<tool_call>{{"name": "wikipedia_search", "arguments": {arguments}}}</tool_call>'


async def test_a_bad_call_is_answered_with_an_error_and_the_trajectory_continues(
    chat: Stage, retriever: ScriptedRetriever
) -> None:
    chat.queue("t</think><tool_call>{</tool_call>" + call('{"query": "ok"}') + "<|im_end|>")
    chat.queue(chat.rendering.write_memory("m"), chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play()
    assert (episode.status, episode.answer) == (Status.FORMAT_ERROR, "x")
    assert "not valid JSON" in episode.reason
    assert "Error: the tool call is not valid JSON" in episode.transcripts[0]
    assert (episode.stats["num_bad_calls"], episode.stats["num_searches"]) == (1, 1)
    assert [list(r.queries) for r in retriever.requests] == [["ok"]]


@pytest.mark.parametrize("fidelity", ["paper", "mended"])
@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("t</think><tool_call>{</tool_call>", r"t</think>\boxed{x}"),
        (None, r"t</think></tool_call> a <tool_call> \boxed{x}"),
    ],
)
async def test_fidelity_mended_checks_rules_that_paper_does_not(
    chat: Stage, fidelity: Fidelity, first: str | None, last: str
) -> None:
    if first:
        chat.queue(f"{first}<|im_end|>", chat.rendering.write_memory("m"))
    chat.queue(f"{last}<|im_end|>")
    episode, _ = await chat.play(fidelity=fidelity)
    expected = Status.COMPLETED if fidelity == "paper" else Status.FORMAT_ERROR
    assert (episode.status, episode.answer, bool(episode.reason)) == (expected, "x", fidelity == "mended")


@pytest.mark.parametrize("fidelity", ["paper", "mended"])
async def test_both_fidelities_refuse_a_thought_that_does_not_end(chat: Stage, fidelity: Fidelity) -> None:
    chat.queue(r"t \boxed{x}<|im_end|>")
    episode, _ = await chat.play(fidelity=fidelity)
    assert (episode.status, episode.answer) == (Status.FORMAT_ERROR, "x")


async def test_a_configured_top_n_above_the_policys_maximum_is_kept(chat: Stage, retriever: ScriptedRetriever) -> None:
    search = call('{"query": "a", "top_n": 999}')
    chat.queue(f"t</think>{search}<|im_end|>", chat.rendering.write_memory("m"))
    chat.queue(chat.rendering.write_answer("t", "x"))
    await chat.play(top_n=30)
    assert retriever.requests[0].top_n == 30


async def test_no_search_is_sent_if_all_calls_are_bad(chat: Stage, retriever: ScriptedRetriever) -> None:
    chat.queue(f"t</think>{call('{}')}<|im_end|>", chat.rendering.write_memory("m"))
    chat.queue(chat.rendering.write_answer("t", "x"))
    assert (await chat.play())[0].status == Status.COMPLETED
    assert not retriever.requests


@pytest.mark.parametrize(("fidelity", "default"), [("mended", 4), ("paper", 10)])
async def test_top_n_has_a_default_and_a_maximum(
    chat: Stage, retriever: ScriptedRetriever, fidelity: str, default: int
) -> None:
    calls = call('{"query": "a"}') + call('{"query": "b", "top_n": 3}') + call('{"query": "c", "top_n": 999}')
    chat.queue(f"t</think>{calls}<|im_end|>", chat.rendering.write_memory("m"), chat.rendering.write_answer("t", "x"))
    await chat.play(top_n=4, fidelity=fidelity)
    assert {tuple(r.queries): r.top_n for r in retriever.requests} == {("a",): default, ("b",): 3, ("c",): MAX_TOP_N}


async def test_calls_above_the_limit_of_a_turn_are_not_sent(chat: Stage, retriever: ScriptedRetriever) -> None:
    chat.queue(chat.rendering.write_action_search("t", [f"q{k}" for k in range(MAX_CALLS + 2)]))
    chat.queue(chat.rendering.write_memory("m"), chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(top_n=1)
    assert sorted(query for r in retriever.requests for query in r.queries) == [f"q{k}" for k in range(MAX_CALLS)]
    assert all(len(r.queries) == 1 for r in retriever.requests)
    assert episode.stats["num_bad_calls"] == 2


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("no tags at all<|im_end|>", Status.FORMAT_ERROR),
        ("t</think><tool_call>{}<|im_end|>", Status.FORMAT_ERROR),
        ("cut off in the mid", Status.OVER_BUDGET),
    ],
)
async def test_actions_that_end_the_trajectory(chat: Stage, text: str, status: Status) -> None:
    chat.queue(text)
    episode, contexts = await chat.play()
    assert (episode.status, episode.answer) == (status, None)
    assert episode.reason
    assert contexts[0].num_trained_tokens == len(chat.tokenizer.encode(text))


async def test_a_stop_at_a_foreign_token_is_a_format_error(toy: Stage) -> None:
    toy.engine.reply(toy.tokenizer.encode("zuka <search> zuka <pad>"))
    assert (await toy.play())[0].status == Status.FORMAT_ERROR


async def test_a_search_in_the_last_turn_is_not_sent(toy: Stage, retriever: ScriptedRetriever) -> None:
    toy.queue("zuka founder <search> zuka founder <end>", "zuka founder kami <end>")
    toy.queue("zuka founder <search> zuka founder <end>")
    episode, contexts = await toy.play(max_turns=2)
    assert episode.status == Status.OVER_BUDGET
    assert len(contexts) == 2
    assert len(retriever.requests) == 1


@pytest.mark.parametrize("text", ["<end>", "<search> zuka <end>"])
async def test_an_empty_or_malformed_memory_is_a_format_error(toy: Stage, text: str) -> None:
    toy.queue("zuka founder <search> zuka founder <end>", text)
    assert (await toy.play())[0].status == Status.FORMAT_ERROR


async def test_a_memory_of_exactly_the_limit_is_kept(chat: Stage) -> None:
    memory = "the question and the answer"
    exact = len(chat.tokenizer.encode(memory))
    chat.queue(chat.rendering.write_action_search("t", ["a"]), chat.rendering.write_memory(memory))
    chat.queue(chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(memory_tokens=exact, memory_overflow="fail")
    assert episode.memories == (memory,)
    asked_for = chat.engine.requests[1]["sampling_params"]["max_new_tokens"]
    assert asked_for >= len(chat.tokenizer.encode(chat.rendering.write_memory(memory)))


@pytest.mark.parametrize("memory", ["m", "the question", "é 漢 .", "the memory of the question and the answer\n- and"])
async def test_frame_tokens_is_not_less_than_the_tokens_of_a_frame(chat_tokenizer: Tokenizer, memory: str) -> None:
    rendering = chat_rendering()
    limit = len(chat_tokenizer.encode(memory)) + frame_tokens(rendering, chat_tokenizer)
    assert len(chat_tokenizer.encode(rendering.write_memory(memory))) <= limit


async def test_a_memory_above_the_limit_is_truncated(chat: Stage) -> None:
    chat.queue(chat.rendering.write_action_search("t", ["a"]), "<memory>\nthe question and the answer and")
    chat.queue(chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(memory_tokens=3)
    (memory,) = episode.memories
    assert memory
    assert "the question and the answer".startswith(memory)
    assert len(chat.tokenizer.encode(memory)) <= 3
    assert episode.stats["num_truncated_memories"] == 1


@pytest.mark.parametrize("options", [{"memory_overflow": "fail"}, {"fidelity": "paper"}])
@pytest.mark.parametrize("text", ["<memory>\nthe question and", "<memory>\nthe question and\n</memory><|im_end|>"])
async def test_a_memory_above_the_limit_ends_the_trajectory_if_it_is_not_truncated(
    chat: Stage, options: dict[str, Any], text: str
) -> None:
    chat.queue(chat.rendering.write_action_search("t", ["a"]), text)
    episode, _ = await chat.play(memory_tokens=2, **options)
    assert episode.status == Status.OVER_BUDGET


async def test_passages_are_shortened_so_that_the_memory_fits(chat: Stage, retriever: ScriptedRetriever) -> None:
    retriever.text = "{query} " + "the answer and the question " * 100
    chat.queue(chat.rendering.write_action_search("t", ["a"]), chat.rendering.write_memory("m"))
    chat.queue(chat.rendering.write_answer("t", "x"))
    prompt = len(chat.tokenizer.encode(chat.rendering.prompt(QUESTION.text, "")))
    episode, contexts = await chat.play(context_tokens=prompt + 400, memory_tokens=64)
    assert episode.status == Status.COMPLETED
    assert episode.stats["num_shortened_observations"] == 1
    room = chat.engine.requests[1]["sampling_params"]["max_new_tokens"]
    assert room == 64 + frame_tokens(chat.rendering, chat.tokenizer)
    assert prompt + 400 - 20 < len(chat.engine.requests[1]["input_ids"]) + room <= prompt + 400
    assert len(contexts[0]) <= prompt + 400


@pytest.mark.parametrize(("fidelity", "room"), [("paper", 400), ("mended", 80)])
async def test_an_observation_that_cannot_fit_ends_the_trajectory(
    chat: Stage, retriever: ScriptedRetriever, fidelity: str, room: int
) -> None:
    retriever.text = "{query} " + "the answer and the question " * 100
    chat.queue(chat.rendering.write_action_search("t", ["a"]))
    prompt = len(chat.tokenizer.encode(chat.rendering.prompt(QUESTION.text, "")))
    episode, _ = await chat.play(context_tokens=prompt + room, memory_tokens=64, fidelity=fidelity)
    assert episode.status == Status.OVER_BUDGET
    assert "does not fit" in episode.reason


@pytest.mark.parametrize("fidelity", ["paper", "mended"])
async def test_response_tokens_count_from_the_end_of_the_prompt(
    chat: Stage, retriever: ScriptedRetriever, fidelity: str
) -> None:
    """The observation fits into the context of 6,000 tokens, and not into 400 tokens after the prompt."""
    retriever.text = "{query} " + "the answer and the question " * 100
    chat.queue(chat.rendering.write_action_search("t", ["a"]), chat.rendering.write_memory("m"))
    chat.queue(chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(response_tokens=400, action_tokens=100, memory_tokens=100, fidelity=fidelity)
    if fidelity == "paper":
        assert episode.status == Status.OVER_BUDGET
        assert "an observation does not fit into" in episode.reason
        return
    assert episode.stats["num_shortened_observations"] == 1
    prompt = len(chat.tokenizer.encode(chat.rendering.prompt(QUESTION.text, "")))
    room = chat.engine.requests[1]["sampling_params"]["max_new_tokens"]
    assert len(chat.engine.requests[1]["input_ids"]) + room <= prompt + 400


async def test_a_memory_that_fills_the_response_tokens_is_cut_off(chat: Stage, retriever: ScriptedRetriever) -> None:
    """Fidelity `paper` keeps no room for the memory: its generation gets what the observation leaves."""
    retriever.text = "the answer"
    action = chat.rendering.write_action_search("t", ["a"])
    chat.queue(action, chat.rendering.write_memory("m"))
    await chat.play(response_tokens=10_000, max_turns=2, fidelity="paper")
    used = len(chat.engine.requests[1]["input_ids"]) - len(chat.engine.requests[0]["input_ids"])
    chat.queue(action, "<memory>\nthe question")
    options = {"action_tokens": 10, "memory_tokens": used - 20, "fidelity": "paper"}
    episode, _ = await chat.play(response_tokens=used + 3, **options)
    assert chat.engine.requests[-1]["sampling_params"]["max_new_tokens"] == 3
    assert episode.status == Status.OVER_BUDGET


async def test_fidelity_paper_has_the_limits_of_the_paper() -> None:
    paper, mended = (MemSearcherOptions.model_validate({"fidelity": each}) for each in ("paper", "mended"))
    assert (paper.question_limit, paper.response_limit) == (695, 6_024)
    assert (mended.question_limit, mended.response_limit) == (None, None)
    own = MemSearcherOptions(fidelity="paper", question_tokens=10, response_tokens=4_000)
    assert (own.question_limit, own.response_limit) == (10, 4_000)
    with pytest.raises(ConfigError, match=r"workflow\.response_tokens must be > .* 512 \+ 1024, got 1500"):
        MemSearcher(
            MemSearcherOptions(response_tokens=1_500),
            tools={"search": search_tool()},
            context_tokens=CONTEXT_TOKENS,
        )


async def test_a_long_question_is_cut_in_every_context(chat: Stage, retriever: ScriptedRetriever) -> None:
    chat.queue(chat.rendering.write_action_search("t", ["a"]), chat.rendering.write_memory("m"))
    chat.queue(chat.rendering.write_answer("t", "x"))
    long = Question("q", "the answer and the question " * 50, ("x",))
    episode, contexts = await chat.play(long, question_tokens=9)
    cut = chat.tokenizer.truncate(long.text, 9)
    for context, memory in zip(contexts, ("", "m"), strict=True):
        assert chat.tokenizer.decode(context.token_ids.tolist()).startswith(chat.rendering.prompt(cut, memory))
    assert episode.stats["num_truncated_questions"] == 1
    assert episode.status == Status.COMPLETED


async def test_a_prompt_that_fills_the_context_ends_the_trajectory(toy: Stage) -> None:
    episode, contexts = await toy.play(context_tokens=8, action_tokens=4, memory_tokens=3)
    assert episode.status == Status.OVER_BUDGET
    assert contexts[0].num_trained_tokens == 0


async def test_a_retriever_error_fails_the_trajectory(toy: Stage, retriever: ScriptedRetriever) -> None:
    retriever.error = "index is missing"
    toy.queue("zuka founder <search> zuka founder <end>")
    episode, _ = await toy.play()
    assert (episode.status, toy.failures) == (Status.FAILED, {"SearchFailed": 1})
    assert "index is missing" in episode.reason
    assert "missing" not in episode.transcripts[0]


async def test_a_retriever_that_does_not_answer_fails_the_trajectory(toy: Stage, retriever: ScriptedRetriever) -> None:
    retriever.silent = True
    toy.queue("zuka founder <search> zuka founder <end>")
    episode, _ = await toy.play()
    assert (episode.status, toy.failures) == (Status.FAILED, {"SearchFailed": 1})


@pytest.mark.parametrize(
    ("status", "num_attempts", "message", "kind"),
    [(500, 2, "boom", "EngineUnavailable"), (400, 1, "prompt too long", "EngineRefused")],
)
async def test_an_engine_error_fails_the_trajectory(
    toy: Stage, status: int, num_attempts: int, message: str, kind: str
) -> None:
    for _ in range(num_attempts):
        toy.engine.fail(status, message)
    episode, contexts = await toy.play()
    assert (episode.status, toy.failures) == (Status.FAILED, {kind: 1})
    assert message in episode.reason
    assert len(toy.engine.requests) == num_attempts
    assert sum(context.num_trained_tokens for context in contexts) == 0


async def test_the_collection_of_a_question_is_searched(toy: Stage, retriever: ScriptedRetriever) -> None:
    toy.queue("zuka founder <search> zuka founder <end>", "zuka founder kami <end>", "? <answer> pelu <end>")
    await toy.play(Question("q", QUESTION.text, ("x",), {"collection": "world-7"}))
    assert retriever.requests[0].collection == "world-7"


@pytest.mark.parametrize(
    ("lengths", "available", "expected"),
    [([5, 5], 10, 5), ([5, 5], 9, 4), ([1, 9], 6, 5), ([1, 2, 9, 9], 11, 4), ([], 3, 0), ([4], 0, 0)],
)
def test_the_longest_passages_are_cut_first(lengths: list[int], available: int, expected: int) -> None:
    assert longest_that_fits(lengths, available) == expected
