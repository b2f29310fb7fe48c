"""An exception in a workflow, reward, tool or task sets its own trajectories to FAILED and has no other effect.

The group is still returned and can be sent. `Episodes.failures` counts failures by kind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest

from actor.episode import Episode
from actor.rewards.reward import Reward, Score
from actor.rollout import GroupRollout
from actor.session import Session
from actor.tasks.task import Task
from actor.tools.tool import Observation, Services, Tool, ToolContext
from protocol.codec import encode_group
from protocol.config_base import Options
from protocol.errors import EngineRefused, RemoteError
from protocol.types import Question, Status, Trajectory
from tests.actor.rollout_parts import Scripted, SomeTask, answer, decoded, lease, make_rollout, sent_and_received

WAIT_S = 20.0


class ChosenReward(Reward):
    """A reward that returns `value` (or raises it) for the answer `odd`, and returns Score(1) for other answers."""

    def __init__(self, value: object) -> None:
        super().__init__(Options())
        self.value = value

    async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        if episode.answer != "odd":
            return Score(1.0)
        if isinstance(self.value, Exception):
            raise self.value
        return cast(Score, self.value)


class RaisingTool(Tool):
    """A tool that raises `error` at every call."""

    schema = MappingProxyType({"name": "broken", "description": "", "parameters": {}})

    def __init__(self, error: Exception) -> None:
        super().__init__(Options(), services=Services())
        self.error = error

    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> Observation:
        raise self.error


async def test_cancellation_is_not_a_failure(tmp_path: Path) -> None:
    started = asyncio.Event()

    async def play(index: int, session: Session) -> Episode:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError("the episode is cancelled")

    _, episodes = make_rollout(Scripted(play), tmp_path)
    running = asyncio.ensure_future(episodes.run(Question("q", "who?", ())))
    async with asyncio.timeout(WAIT_S):
        await started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not episodes.failures
    assert (episodes.num_running, episodes.num_done) == (0, 1)


async def raising(session: Session) -> Episode:
    session.open_context([7])
    await session.generate(1)
    raise KeyError("memory")


async def none(session: Session) -> None:
    await answer(session)


async def with_two_rewards(session: Session) -> Episode:
    episode = await answer(session)
    return Episode(answer=episode.answer, context_rewards=(0.5, 0.25))


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (raising, "workflow_KeyError", "KeyError: 'memory'"),
        (none, "workflow_TypeError", "TypeError: run must return an Episode, got NoneType"),
        (
            with_two_rewards,
            "workflow_ValueError",
            "ValueError: context_rewards must be empty or one for each of 1 contexts, got 2",
        ),
    ],
)
async def test_a_fault_of_the_workflow_fails_its_trajectory_only(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[Session], Awaitable[object]],
    kind: str,
    words: str,
) -> None:
    workflow = Scripted(lambda index, session: fault(session) if index == 1 else answer(session))
    rollout, episodes = make_rollout(workflow, tmp_path)
    group = await rollout(lease())
    assert [t.status for t in group.trajectories] == [
        Status.COMPLETED,
        Status.FAILED,
        Status.COMPLETED,
        Status.COMPLETED,
    ]
    assert [t.reward for t in group.trajectories] == [1.0, 0.0, 1.0, 1.0]
    assert episodes.failures == {kind: 1}
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert f"{Scripted.__module__}:Scripted raised {words}" in record.getMessage()
    assert record.exc_info is not None
    received = sent_and_received(group)
    assert [t.status for t in received.trajectories] == [t.status for t in group.trajectories]
    assert [len(t.contexts) for t in received.trajectories] == [len(t.contexts) for t in group.trajectories]


async def test_the_reason_of_a_failed_episode_names_the_import_path_the_error_and_the_line(tmp_path: Path) -> None:
    _, episodes = make_rollout(Scripted(lambda index, session: raising(session)), tmp_path)
    trajectory, episode = await episodes.run(Question("q", "who?", ()))
    assert (trajectory.status, episode.status) == (Status.FAILED, Status.FAILED)
    line = raising.__code__.co_firstlineno + 3
    assert episode.reason == (
        f"{Scripted.__module__}:Scripted raised KeyError: 'memory' ({Path(__file__).name}, line {line})"
    )
    assert episode.transcripts[0].startswith(decoded(tmp_path, [7]))


async def test_tracebacks_are_logged_for_the_first_failures_of_a_kind_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rollout, episodes = make_rollout(Scripted(lambda index, session: raising(session)), tmp_path)
    await rollout(lease(group_size=6))
    assert episodes.failures == {"workflow_KeyError": 6}
    records = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [bool(r.exc_info) for r in records] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (RuntimeError("judge"), "reward_RuntimeError", "RuntimeError: judge"),
        (Score(float("nan")), "reward_ValueError", "must be finite, got nan"),
        (Score(float("inf")), "reward_ValueError", "must be finite, got inf"),
        (Score(1.0, {"f1": float("nan")}), "reward_ValueError", "got 1.0 with {'f1': nan}"),
        (1.0, "reward_TypeError", "score must return a Score, got float"),
    ],
)
async def test_a_fault_of_the_reward_fails_its_trajectory_only(
    tmp_path: Path, value: object, kind: str, words: str
) -> None:
    workflow = Scripted(lambda index, session: answer(session, "odd" if index == 2 else "zuka"))
    rollout, episodes = make_rollout(workflow, tmp_path, reward=ChosenReward(value))
    group = await rollout(lease())
    assert [t.status is Status.FAILED for t in group.trajectories] == [False, False, True, False]
    assert [t.reward for t in group.trajectories] == [1.0, 1.0, 0.0, 1.0]
    assert episodes.failures == {kind: 1}
    received = sent_and_received(group)
    assert [len(t.contexts) for t in received.trajectories] == [1, 1, 1, 1]

    _, episodes = make_rollout(
        Scripted(lambda index, session: answer(session, "odd")), tmp_path, reward=ChosenReward(value)
    )
    _, episode = await episodes.run(group.question)
    assert episode.reason.startswith(f"{ChosenReward.__module__}:ChosenReward raised ")
    assert words in episode.reason


async def test_the_reward_is_not_called_for_a_failed_trajectory(tmp_path: Path) -> None:
    async def failed(index: int, session: Session) -> Episode:
        return Episode(status=Status.FAILED, reason="no browser", answer="odd")

    _, episodes = make_rollout(Scripted(failed), tmp_path, reward=ChosenReward(AssertionError("called")))
    trajectory, episode = await episodes.run(Question("q", "who?", ()))
    assert (trajectory.status, episode.reason) == (Status.FAILED, "no browser")
    assert episodes.failures == {"by_workflow": 1}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ZeroDivisionError("tool"), "tool_ZeroDivisionError", "RaisingTool raised ZeroDivisionError: tool"),
        (RemoteError("no index"), "RemoteError", "RemoteError: no index"),
        (EngineRefused("too long"), "EngineRefused", "EngineRefused: too long"),
    ],
)
async def test_a_tool_that_raises_fails_its_trajectory_only(
    tmp_path: Path, error: Exception, kind: str, words: str
) -> None:
    tool = RaisingTool(error)

    async def play(index: int, session: Session) -> Episode:
        if index == 0:
            session.open_context([7])
            await session.call(tool, {})
        return await answer(session)

    rollout, episodes = make_rollout(Scripted(play, tools={"broken": tool}), tmp_path)
    group = await rollout(lease(group_size=2))
    assert [t.status for t in group.trajectories] == [Status.FAILED, Status.COMPLETED]
    assert episodes.failures == {kind: 1}
    assert len(sent_and_received(group).trajectories) == 2

    _, episodes = make_rollout(Scripted(play, tools={"broken": tool}), tmp_path)
    _, episode = await episodes.run(group.question)
    assert words in episode.reason


async def test_an_exceeded_budget_ends_the_trajectory_as_over_budget(tmp_path: Path) -> None:
    async def play(index: int, session: Session) -> Episode:
        session.open_context([7] * 64)
        await session.generate(1)
        raise AssertionError("the context has no room")

    _, episodes = make_rollout(Scripted(play), tmp_path)
    trajectory, episode = await episodes.run(Question("q", "who?", ()))
    assert (trajectory.status, trajectory.reward) == (Status.OVER_BUDGET, 0.0)
    assert "workflow.context_tokens = 64 tokens" in episode.reason
    assert [len(context) for context in trajectory.contexts] == [64]
    assert not episodes.failures


async def test_a_task_that_raises_fails_the_group_of_its_lease_only(tmp_path: Path) -> None:
    workflow = Scripted(lambda index, session: answer(session))
    task = SomeTask(raises_at=[3])
    rollout, episodes = make_rollout(workflow, tmp_path, task=task)
    bad, good = await rollout(lease(cursor=3)), await rollout(lease(cursor=4))
    assert (bad.cursor, bad.attempt, [t.status for t in bad.trajectories]) == (3, 2, [Status.FAILED] * 4)
    assert [t.status for t in good.trajectories] == [Status.COMPLETED] * 4
    assert workflow.num_started == 4
    assert episodes.failures["task_KeyError"] >= 1
    assert set(episodes.failures) == {"task_KeyError"}
    received = sent_and_received(bad)
    assert [(t.status, len(t.contexts)) for t in received.trajectories] == [(Status.FAILED, 0)] * 4


async def test_a_failed_task_is_logged_with_its_import_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rollout, _ = make_rollout(
        Scripted(lambda index, session: answer(session)),
        tmp_path,
        task=SomeTask(raises_at=[3]),
    )
    await rollout(lease(cursor=3))
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert f"{SomeTask.__module__}:SomeTask raised KeyError: 'row 3'" in record.getMessage()
    assert record.exc_info is not None


async def test_values_of_user_code_that_cannot_be_sent_fail_their_trajectory_only(tmp_path: Path) -> None:
    """An answer with half a surrogate pair, or a stat that is not a number: the group can still be sent."""

    async def episode(index: int, session: Session) -> Episode:
        bad: dict[int, dict[str, Any]] = {
            0: {"answer": "\ud800"},
            1: {"stats": {"n": cast(float, "many")}},
            2: {"stats": {"x" * 200: 1.0}},
        }
        return Episode(**{"answer": "zuka", **bad.get(index, {})})

    rollout, episodes = make_rollout(Scripted(episode), tmp_path)
    group = await rollout(lease(group_size=4))
    assert [t.status for t in group.trajectories] == [Status.FAILED] * 3 + [Status.COMPLETED]
    assert episodes.failures.total() == 3
    assert encode_group(group, lease_id=1)


@pytest.mark.parametrize(
    "question", [None, Question("", "who?", ()), Question("q", "who?", cast(tuple[str, ...], (1,)))]
)
async def test_a_question_that_cannot_be_sent_fails_its_group_only(tmp_path: Path, question: Question | None) -> None:
    class BadTask(Task):
        def question(self, cursor: int) -> Question:
            return cast(Question, question)

    async def unreachable(index: int, session: Session) -> Episode:
        raise AssertionError("no episode is run")

    _, episodes = make_rollout(Scripted(unreachable), tmp_path)
    rollout = GroupRollout(task=BadTask(Options(), split="train", seed=0), episodes=episodes)
    group = await rollout(lease(group_size=4))
    assert [t.status for t in group.trajectories] == [Status.FAILED] * 4
    assert episodes.failures.total() == 4
    assert encode_group(group, lease_id=1)
