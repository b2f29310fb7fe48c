"""GroupRollout: a lease becomes a group of G episodes of one question, with a bound on concurrent episodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from actor.chat.tokenizer import Tokenizer
from actor.engines.completion import Completion
from actor.engines.sampling import SamplingParams
from actor.episode import Episode
from actor.rewards.reward import ExactMatchReward
from actor.rollout import Episodes, GroupRollout
from actor.session import Session
from actor.tasks.task import Task
from actor.tasks.toy.tokenizer import write_tokenizer
from actor.workflows.workflow import Workflow
from protocol.config_base import Options
from protocol.messages import Lease
from protocol.types import Question, Status

WAIT_S = 20.0


class GatedWorkflow(Workflow):
    """A workflow without a model: each episode waits for `go` and returns the next of `outcomes`."""

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


class ThreeQuestions(Task):
    """Questions q0, q1, q2 in turn, all with the answer "zuka"."""

    def question(self, cursor: int) -> Question:
        return Question(f"q{cursor % 3}", "who?", ("zuka",))


class NoEngine:
    async def generate(self, *_: object, **__: object) -> Completion:
        raise AssertionError("these tests sample no tokens")


def make(workflow: GatedWorkflow, folder: Path, *, max_trajectories: int) -> tuple[GroupRollout, Episodes]:
    write_tokenizer(folder)
    episodes = Episodes(
        workflow=workflow,
        reward=ExactMatchReward(Options()),
        pool=NoEngine(),
        tokenizer=Tokenizer.load(folder),
        sampling=SamplingParams(),
        run_id="run",
        max_context_tokens=64,
        max_trajectories=max_trajectories,
    )
    task = ThreeQuestions(Options(), split="train", seed=0)
    return GroupRollout(task=task, episodes=episodes), episodes


def lease(*, cursor: int = 4, group_size: int = 4) -> Lease:
    return Lease(lease_id=1, run_id="run", cursor=cursor, attempt=2, group_size=group_size, min_version=0)


async def test_a_lease_becomes_a_group(tmp_path: Path) -> None:
    outcomes = [("zuka", Status.COMPLETED), ("bela", Status.COMPLETED), ("", Status.FORMAT_ERROR), ("", Status.FAILED)]
    workflow = GatedWorkflow(outcomes)
    workflow.go.set()
    rollout, episodes = make(workflow, tmp_path, max_trajectories=8)
    group = await rollout(lease())
    assert (group.run_id, group.cursor, group.attempt, group.question.id) == ("run", 4, 2, "q1")
    assert [trajectory.reward for trajectory in group.trajectories] == [1.0, 0.0, 0.0, 0.0]
    assert [trajectory.status for trajectory in group.trajectories] == [status for _, status in outcomes]
    assert (episodes.num_running, episodes.num_done) == (0, 4)


async def test_concurrent_episodes_are_bounded_by_max_trajectories(tmp_path: Path) -> None:
    workflow = GatedWorkflow([("zuka", Status.COMPLETED)])
    rollout, episodes = make(workflow, tmp_path, max_trajectories=3)
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
    rollout, episodes = make(workflow, tmp_path, max_trajectories=2)
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
