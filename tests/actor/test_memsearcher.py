"""The workflow, driven by a scripted policy over real HTTP and a scripted retriever over a real socket."""

from collections.abc import AsyncIterator

import pytest

from actor.chat.chatml import ChatRendering
from actor.chat.fit_observation import longest_that_fits
from actor.chat.rendering import Fidelity
from actor.chat.toy import ToyRendering
from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import Retry
from actor.rewards.format import check_chat
from actor.session import Session
from actor.workflows.memsearcher import MAX_SEARCHES, MAX_TOP_N, MemSearcher, frame_tokens
from protocol.config import WorkflowConfig
from protocol.types import Edge, Question, Status

QUESTION = Question("q0", "what is zuka founder birthplace ?", ("peru",))
CONTEXT_TOKENS = 6_000


@pytest.fixture
async def pool(engine) -> AsyncIterator[EnginePool]:
    async with EnginePool(run_id="run", retry=Retry(num_attempts=2, base_s=0.001)) as p:
        p.set_engines([EngineInfo(engine.url, 0)])
        yield p


class Stage:
    """One rendering with its tokenizer, a workflow on it, and a policy whose texts are queued."""

    def __init__(self, engine, pool, search, rendering, tokenizer) -> None:
        self.engine, self.pool, self.search = engine, pool, search
        self.rendering, self.tokenizer = rendering, tokenizer

    def say(self, *texts: str) -> None:
        for text in texts:
            ids = self.tokenizer.encode(text)
            ended = text.endswith(self.rendering.end_token)
            self.engine.reply(ids, finish=None if ended else {"type": "length"})

    async def play(self, question: Question = QUESTION, context_tokens: int = CONTEXT_TOKENS, **config):
        workflow = MemSearcher(config=WorkflowConfig(**config), rendering=self.rendering, search=self.search)
        session = Session(
            pool=self.pool,
            tokenizer=self.tokenizer,
            sampling=SamplingParams(),
            run_id="run",
            max_context_tokens=context_tokens,
        )
        return await workflow.run(question, session), session.contexts

    def sampled(self, context) -> str:
        return self.tokenizer.decode(context.token_ids[context.loss_mask].tolist())


@pytest.fixture
def toy(engine, pool, search, toy_tokenizer) -> Stage:
    return Stage(engine, pool, search, ToyRendering(), toy_tokenizer)


@pytest.fixture
def chat(engine, pool, search, chat_tokenizer) -> Stage:
    return Stage(engine, pool, search, ChatRendering(), chat_tokenizer)


async def test_a_toy_episode_of_three_contexts(toy: Stage, retriever) -> None:
    toy.say("zuka founder <search> zuka founder <end>", "zuka founder kami <end>")
    toy.say("founder birthplace <search> kami birthplace <end>", "kami birthplace pelu <end>")
    toy.say("birthplace ? <answer> pelu <end>")
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
    chat.say(r.write_action_search("hm", ["zuka founder"]), r.write_memory("the founder is kami"))
    chat.say(r.write_answer("sure", "peru"))
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


async def test_several_calls_are_one_request(chat: Stage, retriever) -> None:
    chat.say(chat.rendering.write_action_search("hm", ["a", "b", "a"]), chat.rendering.write_memory("m"))
    chat.say(chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(top_n=2)
    assert [list(r.queries) for r in retriever.requests] == [["a", "b", "a"]]
    assert episode.transcripts[0].count("<tool_response>") == 3
    assert episode.stats["num_searches"] == 3


def call(arguments: str) -> str:
    return f'<tool_call>{{"name": "wikipedia_search", "arguments": {arguments}}}</tool_call>'


async def test_a_bad_call_is_an_observation_and_the_trajectory_goes_on(chat: Stage, retriever) -> None:
    chat.say("t</think><tool_call>{</tool_call>" + call('{"query": "ok"}') + "<|im_end|>")
    chat.say(chat.rendering.write_memory("m"), chat.rendering.write_answer("t", "x"))
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
async def test_the_paper_does_not_see_what_the_mended_rules_see(
    chat: Stage, fidelity: Fidelity, first: str | None, last: str
) -> None:
    chat.rendering = ChatRendering(fidelity=fidelity)
    if first:
        chat.say(f"{first}<|im_end|>", chat.rendering.write_memory("m"))
    chat.say(f"{last}<|im_end|>")
    episode, _ = await chat.play(fidelity=fidelity)
    expected = Status.COMPLETED if fidelity == "paper" else Status.FORMAT_ERROR
    assert (episode.status, episode.answer, bool(episode.reason)) == (expected, "x", fidelity == "mended")


@pytest.mark.parametrize("fidelity", ["paper", "mended"])
async def test_both_see_a_thought_that_does_not_end(chat: Stage, fidelity: Fidelity) -> None:
    chat.rendering = ChatRendering(fidelity=fidelity)
    chat.say(r"t \boxed{x}<|im_end|>")
    episode, _ = await chat.play(fidelity=fidelity)
    assert (episode.status, episode.answer) == (Status.FORMAT_ERROR, "x")


async def test_a_top_n_above_what_a_policy_may_ask_for_is_kept(chat: Stage, retriever) -> None:
    asked = call('{"query": "a", "top_n": 999}')
    chat.say(f"t</think>{asked}<|im_end|>", chat.rendering.write_memory("m"))
    chat.say(chat.rendering.write_answer("t", "x"))
    await chat.play(top_n=30)
    assert retriever.requests[0].top_n == 30


async def test_no_search_is_sent_where_all_calls_are_bad(chat: Stage, retriever) -> None:
    chat.say(f"t</think>{call('{}')}<|im_end|>", chat.rendering.write_memory("m"))
    chat.say(chat.rendering.write_answer("t", "x"))
    assert (await chat.play())[0].status == Status.COMPLETED
    assert not retriever.requests


@pytest.mark.parametrize(("fidelity", "default"), [("mended", 4), ("paper", 10)])
async def test_top_n_left_out_asked_for_and_capped(chat: Stage, retriever, fidelity: str, default: int) -> None:
    calls = call('{"query": "a"}') + call('{"query": "b", "top_n": 3}') + call('{"query": "c", "top_n": 999}')
    chat.say(f"t</think>{calls}<|im_end|>", chat.rendering.write_memory("m"), chat.rendering.write_answer("t", "x"))
    await chat.play(top_n=4, fidelity=fidelity)
    assert {tuple(r.queries): r.top_n for r in retriever.requests} == {("a",): default, ("b",): 3, ("c",): MAX_TOP_N}


async def test_the_retriever_cannot_be_flooded(chat: Stage, retriever) -> None:
    chat.say(chat.rendering.write_action_search("t", [f"q{k}" for k in range(MAX_SEARCHES + 2)]))
    chat.say(chat.rendering.write_memory("m"), chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(top_n=1)
    assert len(retriever.requests[0].queries) == MAX_SEARCHES
    assert episode.stats["num_bad_calls"] == 2


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("no tags at all<|im_end|>", Status.FORMAT_ERROR),
        ("t</think><tool_call>{}<|im_end|>", Status.FORMAT_ERROR),
        ("cut off in the mid", Status.OVER_BUDGET),
    ],
)
async def test_actions_that_end_it(chat: Stage, text: str, status: Status) -> None:
    chat.say(text)
    episode, contexts = await chat.play()
    assert (episode.status, episode.answer) == (status, None)
    assert episode.reason
    assert contexts[0].num_trained_tokens == len(chat.tokenizer.encode(text))


async def test_a_foreign_stop_ends_it(toy: Stage) -> None:
    toy.engine.reply(toy.tokenizer.encode("zuka <search> zuka <pad>"))
    assert (await toy.play())[0].status == Status.FORMAT_ERROR


async def test_the_last_turns_search_is_not_run(toy: Stage, retriever) -> None:
    toy.say("zuka founder <search> zuka founder <end>", "zuka founder kami <end>")
    toy.say("zuka founder <search> zuka founder <end>")
    episode, contexts = await toy.play(max_turns=2)
    assert episode.status == Status.OVER_BUDGET
    assert len(contexts) == 2
    assert len(retriever.requests) == 1


@pytest.mark.parametrize("text", ["<end>", "<search> zuka <end>"])
async def test_an_empty_or_malformed_memory_ends_it(toy: Stage, text: str) -> None:
    toy.say("zuka founder <search> zuka founder <end>", text)
    assert (await toy.play())[0].status == Status.FORMAT_ERROR


async def test_the_memory_limit_can_be_reached(chat: Stage) -> None:
    memory = "the question and the answer"
    exact = len(chat.tokenizer.encode(memory))
    chat.say(chat.rendering.write_action_search("t", ["a"]), chat.rendering.write_memory(memory))
    chat.say(chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(memory_tokens=exact, memory_overflow="fail")
    assert episode.memories == (memory,)
    asked_for = chat.engine.requests[1]["sampling_params"]["max_new_tokens"]
    assert asked_for >= len(chat.tokenizer.encode(chat.rendering.write_memory(memory)))


@pytest.mark.parametrize("memory", ["m", "the question", "é 漢 .", "the memory of the question and the answer\n- and"])
async def test_a_frame_never_counts_less_than_it_takes(chat_tokenizer, memory: str) -> None:
    rendering = ChatRendering()
    limit = len(chat_tokenizer.encode(memory)) + frame_tokens(rendering, chat_tokenizer)
    assert len(chat_tokenizer.encode(rendering.write_memory(memory))) <= limit


async def test_a_memory_that_overflows_is_truncated(chat: Stage) -> None:
    chat.say(chat.rendering.write_action_search("t", ["a"]), "<memory>\nthe question and the answer and")
    chat.say(chat.rendering.write_answer("t", "x"))
    episode, _ = await chat.play(memory_tokens=3)
    (memory,) = episode.memories
    assert memory
    assert "the question and the answer".startswith(memory)
    assert len(chat.tokenizer.encode(memory)) <= 3
    assert episode.stats["num_truncated_memories"] == 1


@pytest.mark.parametrize("config", [{"memory_overflow": "fail"}, {"fidelity": "paper"}])
@pytest.mark.parametrize("text", ["<memory>\nthe question and", "<memory>\nthe question and\n</memory><|im_end|>"])
async def test_or_it_ends_the_trajectory(chat: Stage, config: dict, text: str) -> None:
    chat.say(chat.rendering.write_action_search("t", ["a"]), text)
    episode, _ = await chat.play(memory_tokens=2, **config)
    assert episode.status == Status.OVER_BUDGET


async def test_passages_are_shortened_so_that_the_memory_fits(chat: Stage, retriever) -> None:
    retriever.text = "{query} " + "the answer and the question " * 100
    chat.say(chat.rendering.write_action_search("t", ["a"]), chat.rendering.write_memory("m"))
    chat.say(chat.rendering.write_answer("t", "x"))
    prompt = len(chat.tokenizer.encode(chat.rendering.prompt(QUESTION.text, "")))
    episode, contexts = await chat.play(context_tokens=prompt + 400, memory_tokens=64)
    assert episode.status == Status.COMPLETED
    assert episode.stats["num_shortened_observations"] == 1
    room = chat.engine.requests[1]["sampling_params"]["max_new_tokens"]
    assert room == 64 + frame_tokens(chat.rendering, chat.tokenizer)
    assert prompt + 400 - 20 < len(chat.engine.requests[1]["input_ids"]) + room <= prompt + 400
    assert len(contexts[0]) <= prompt + 400


@pytest.mark.parametrize(("fidelity", "room"), [("paper", 400), ("mended", 80)])
async def test_an_observation_that_cannot_fit_ends_it(chat: Stage, retriever, fidelity: str, room: int) -> None:
    retriever.text = "{query} " + "the answer and the question " * 100
    chat.say(chat.rendering.write_action_search("t", ["a"]))
    prompt = len(chat.tokenizer.encode(chat.rendering.prompt(QUESTION.text, "")))
    episode, _ = await chat.play(context_tokens=prompt + room, memory_tokens=64, fidelity=fidelity)
    assert episode.status == Status.OVER_BUDGET
    assert "does not fit" in episode.reason


async def test_a_prompt_that_fills_the_context_ends_it(toy: Stage) -> None:
    episode, contexts = await toy.play(context_tokens=8)
    assert episode.status == Status.OVER_BUDGET
    assert contexts[0].num_trained_tokens == 0


async def test_the_environments_failures_fail_the_trajectory(toy: Stage, retriever) -> None:
    retriever.error = "index is gone"
    toy.say("zuka founder <search> zuka founder <end>")
    episode, _ = await toy.play()
    assert episode.status == Status.FAILED
    assert "index is gone" in episode.reason
    assert "gone" not in episode.transcripts[0]

    retriever.error = ""
    retriever.silent = True
    toy.say("zuka founder <search> zuka founder <end>")
    assert (await toy.play())[0].status == Status.FAILED

    toy.engine.fail(500, "boom")
    toy.engine.fail(500, "boom")
    episode, contexts = await toy.play()
    assert episode.status == Status.FAILED
    assert contexts[0].num_trained_tokens == 0

    toy.engine.fail(400, "prompt too long")
    assert (await toy.play())[0].status == Status.FAILED


async def test_a_question_names_its_collection(toy: Stage, retriever) -> None:
    toy.say("zuka founder <search> zuka founder <end>", "zuka founder kami <end>", "? <answer> pelu <end>")
    await toy.play(Question("q", QUESTION.text, ("x",), {"collection": "world-7"}))
    assert retriever.requests[0].collection == "world-7"


@pytest.mark.parametrize(
    ("lengths", "available", "expected"),
    [([5, 5], 10, 5), ([5, 5], 9, 4), ([1, 9], 6, 5), ([1, 2, 9, 9], 11, 4), ([], 3, 0), ([4], 0, 0)],
)
def test_the_longest_are_cut_first(lengths: list[int], available: int, expected: int) -> None:
    assert longest_that_fits(lengths, available) == expected
