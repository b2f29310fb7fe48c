"""GroupRollout: rolls out a lease as a group of G episodes of one question; concurrent episodes are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from actor.episode import Episode
from actor.session import Session
from actor.workflows.workflow import Workflow
from protocol.config_base import Options
from protocol.messages import MAX_ANSWER_CHARS
from protocol.types import Question, Status
from tests.actor.rollout_parts import END, Scripted, answer, decoded, lease, make_rollout, sent_and_received

WAIT_S = 20.0


class GatedWorkflow(Workflow):
    """A workflow without a model: each episode waits for the event `go` and returns the next of `outcomes`."""

    def __init__(self, outcomes: Sequence[tuple[str, Status]]) -> None:
        super().__init__(Options(), tools={}, context_tokens=64)
        self.outcomes = outcomes
        self.go = asyncio.Event()
        self.num_running = 0
        self.num_started = 0
        self.max_running = 0

    async def run(self, question: Question, session: Session) -> Episode:
        index, self.num_started = self.num_started, self.num_started + 1
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await self.go.wait()
        finally:
            self.num_running -= 1
        answer, status = self.outcomes[index % len(self.outcomes)]
        return Episode(answer=answer, status=status, reason="", stats={"turns": 1.0})


async def test_a_lease_becomes_a_group(tmp_path: Path) -> None:
    outcomes = [("zuka", Status.COMPLETED), ("bela", Status.COMPLETED), ("", Status.FORMAT_ERROR), ("", Status.FAILED)]
    workflow = GatedWorkflow(outcomes)
    workflow.go.set()
    rollout, episodes = make_rollout(workflow, tmp_path, max_trajectories=8)
    group = await rollout(lease())
    assert (group.run_id, group.cursor, group.attempt, group.question.id) == ("run", 4, 2, "q1")
    assert [trajectory.reward for trajectory in group.trajectories] == [1.0, 0.0, 0.0, 0.0]
    assert [trajectory.status for trajectory in group.trajectories] == [status for _, status in outcomes]
    assert (episodes.num_running, episodes.num_done) == (0, 4)


async def test_concurrent_episodes_are_bounded_by_max_trajectories(tmp_path: Path) -> None:
    workflow = GatedWorkflow([("zuka", Status.COMPLETED)])
    rollout, episodes = make_rollout(workflow, tmp_path, max_trajectories=3)
    groups = [asyncio.ensure_future(rollout(lease(cursor=i))) for i in range(3)]
    async with asyncio.timeout(WAIT_S):
        while workflow.num_running < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert episodes.num_running == 3
        workflow.go.set()
        assert len(await asyncio.gather(*groups)) == 3
    assert (workflow.max_running, workflow.num_started, episodes.num_done) == (3, 12, 12)


async def test_a_cancelled_rollout_frees_its_slots(tmp_path: Path) -> None:
    workflow = GatedWorkflow([("zuka", Status.COMPLETED)])
    rollout, episodes = make_rollout(workflow, tmp_path, max_trajectories=2)
    rolling = asyncio.ensure_future(rollout(lease()))
    async with asyncio.timeout(WAIT_S):
        while workflow.num_running < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        rolling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rolling
        assert (episodes.num_running, workflow.num_running) == (0, 0)
        workflow.go.set()
        await rollout(lease(group_size=2))


async def test_each_context_gets_its_own_reward(tmp_path: Path) -> None:
    async def play(index: int, session: Session) -> Episode:
        await answer(session)
        await answer(session)
        return Episode(answer="zuka", context_rewards=(0.5, -0.25))

    rollout, episodes = make_rollout(Scripted(play), tmp_path)
    group = await rollout(lease(group_size=2))
    assert [[c.reward for c in t.contexts] for t in sent_and_received(group).trajectories] == [[0.5, -0.25]] * 2
    assert not episodes.failures


async def test_an_open_context_is_closed_and_stats_of_session_and_workflow_are_merged(tmp_path: Path) -> None:
    async def play(index: int, session: Session) -> Episode:
        session.open_context([7])
        await session.generate(1)
        return Episode(answer="x" * (MAX_ANSWER_CHARS + 1), stats={"num_notes": 3.0, "num_turns": 9.0})

    _, episodes = make_rollout(Scripted(play), tmp_path)
    trajectory, episode = await episodes.run(Question("q", "who?", ()))
    assert [context.token_ids.tolist() for context in trajectory.contexts] == [[7, END]]
    assert trajectory.stats == episode.stats
    assert trajectory.stats["num_notes"] == 3.0
    assert trajectory.stats["num_turns"] == 9.0, "the workflow's own count has precedence"
    assert trajectory.stats["num_generated_tokens"] == 1.0
    assert episode.transcripts == (decoded(tmp_path, [7, END]),)
    assert len(trajectory.answer) == MAX_ANSWER_CHARS
