"""An episode whose policy or code returns unusual values ends alone: its actor continues, and the group can be sent."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest

from actor.chat.chatml import ChatRendering, parse_call
from actor.chat.rendering import Action, BadCall, Malformed, Result, ToolCall, ToolCalls
from actor.episode import Episode
from actor.rewards.reward import Reward, Score
from actor.session import Session
from actor.tools.search import SearchOptions, search_schema
from actor.tools.tool import Observation, Services, Tool, ToolContext
from protocol.codec import encode_group
from protocol.config_base import Options
from protocol.failure_counts import MAX_REASON_CHARS
from protocol.types import Question, Status, Trajectory
from tests.actor.rollout_parts import Scripted, answer, lease, make_rollout, sent_and_received

NAMES = ("wikipedia_search",)


def call(arguments: str) -> str:
    return f'{{"name": "wikipedia_search", "arguments": {arguments}}}'


@pytest.mark.parametrize(
    "body",
    [
        call('{"query": "q", "top_n": ' + "9" * 5_000 + "}"),
        call('{"query": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "[" * 100_000,
        '{"a":' * 50_000,
        call('{"query": NaN}'),
        call('{"query": "q", "top_n": -Infinity}'),
        call('{"query": "q", "top_n": 1e999}'),
        call(r'{"query": "\ud800"}'),
        r'{"name": "\udfff", "arguments": {}}',
        call('{"query": "a\0b"}'),
        "\0",
        "",
        '{"name": ["wikipedia_search"], "arguments": {}}',
        '{"name": ' + "[" * 500 + "]" * 500 + ', "arguments": {}}',
        '{"name": null, "arguments": null}',
    ],
)
def test_a_tool_call_that_no_tool_could_take_is_a_bad_call(body: str) -> None:
    found = parse_call(body, names=NAMES)
    assert isinstance(found, BadCall)
    assert len(found.error) < 1_000
    found.error.encode()


def test_any_text_between_tool_call_tags_is_parsed_without_an_exception() -> None:
    chat = ChatRendering(tools=[search_schema(SearchOptions())])
    rng = random.Random(0)
    pieces = ['{"name"', ":", '"wikipedia_search"', ',"arguments"', "{", "}", "[", "]", '"query"', "1e400", "9" * 4_400]
    pieces += [
        "NaN",
        r'"\ud83d"',
        r'"\ud83d\ude00"',
        "\0",
        "\\",
        '"',
        "\u2028",
        "true",
        "-0",
        "<tool_call>",
        "</think>",
    ]
    for _ in range(3_000):
        body = "".join(rng.choices(pieces, k=rng.randint(1, 14)))
        action: Action = chat.parse_action(f"</think><tool_call>{body}</tool_call>")
        if isinstance(action, ToolCalls):
            results = [Result(each, Observation(text="found")) for each in action.calls]
            chat.observation(results).encode()
            assert all(isinstance(each, BadCall | ToolCall) for each in action.calls)
        elif isinstance(action, Malformed):
            action.reason.encode()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Leaving(Tool):
    """A tool that ends the process."""

    schema = MappingProxyType({"name": "leave", "description": "", "parameters": {}})

    def __init__(self) -> None:
        super().__init__(Options(), services=Services())

    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> Observation:
        raise SystemExit(3)


async def leaves(session: Session) -> Episode:
    raise SystemExit("bye")


async def calls_a_tool_that_leaves(session: Session) -> Episode:
    await session.call(Leaving(), {})
    return Episode()


async def cancels_itself(session: Session) -> Episode:
    raise asyncio.CancelledError


async def raises_unprintable(session: Session) -> Episode:
    raise Unprintable


async def raises_a_long_text(session: Session) -> Episode:
    raise ValueError("x\n" * 100_000 + "\ud800")


async def recurses(session: Session) -> Episode:
    return await recurses(session)


async def appends_a_token_that_does_not_exist(session: Session) -> Episode:
    session.open_context([7])
    await session.generate(1)
    session.append([2**40])
    return Episode(answer="zuka")


async def answers_with_a_number(session: Session) -> Episode:
    return Episode(answer=cast(str, 42))


async def counts_with_a_list(session: Session) -> Episode:
    return Episode(answer="zuka", stats=cast(dict[str, float], [1.0]))


@pytest.mark.parametrize(
    "fault",
    [
        leaves,
        calls_a_tool_that_leaves,
        cancels_itself,
        raises_unprintable,
        raises_a_long_text,
        recurses,
        appends_a_token_that_does_not_exist,
        answers_with_a_number,
        counts_with_a_list,
    ],
)
async def test_a_poison_episode_ends_alone(tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest-xdist cannot send a captured log with half a surrogate pair.
    monkeypatch.setattr(logging.getLogger("actor.rollout"), "propagate", False)
    workflow = Scripted(lambda index, session: fault(session) if index == 1 else answer(session))
    rollout, episodes = make_rollout(workflow, tmp_path)
    group = await rollout(lease(group_size=3))
    assert [t.status for t in group.trajectories] == [Status.COMPLETED, Status.FAILED, Status.COMPLETED]
    assert len(sent_and_received(group).trajectories) == 3
    (reason,) = episodes.reasons.most_common()
    assert len(reason) <= MAX_REASON_CHARS
    assert episodes.failures.total() == episodes.reasons.total == 1


@pytest.mark.parametrize("value", [Score(cast(float, 10**400)), Score(1.0, cast(dict[str, float], [1.0]))])
async def test_a_poison_score_ends_its_trajectory_alone(tmp_path: Path, value: Score) -> None:
    class PoisonReward(Reward):
        async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
            return value if episode.answer == "odd" else Score(1.0)

    workflow = Scripted(lambda index, session: answer(session, "odd" if index == 0 else "zuka"))
    rollout, episodes = make_rollout(workflow, tmp_path, reward=PoisonReward(Options()))
    group = await rollout(lease(group_size=2))
    assert [t.status for t in group.trajectories] == [Status.FAILED, Status.COMPLETED]
    assert encode_group(group, lease_id=1)
    assert episodes.reasons.total == 1


async def test_reasons_name_the_kind_and_the_numbers_of_one_cause_do_not_matter(tmp_path: Path) -> None:
    async def fails(index: int, session: Session) -> Episode:
        raise ValueError(f"page {index} of 'book {index}' is missing")

    rollout, episodes = make_rollout(Scripted(fails), tmp_path)
    await rollout(lease(group_size=6))
    ((reason, count),) = episodes.reasons.most_common().items()
    assert count == 6
    assert reason.startswith(f"workflow_ValueError: {Scripted.__module__}:Scripted raised ValueError: page ")
