"""A lease becomes a group: G episodes of one question, at most so many at once, failures kept apart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actor.chat.tokenizer import Tokenizer
from actor.engines.sampling import SamplingParams
from actor.rewards.reward import reward_named
from actor.rollout import Episodes, GroupRollout
from actor.session import Session
from actor.tasks.qa import QuestionAnswering
from actor.tasks.toy.tokenizer import write_tokenizer
from actor.workflows.workflow import Episode
from protocol.messages import Lease
from protocol.types import Question, Status

WAIT_S = 20.0


@dataclass
class Waiting:
    """A workflow without a model: each episode waits for `go`, and answers with what it was given in turn."""

    outcomes: Sequence[tuple[str, Status]]
    go: asyncio.Event = field(default_factory=asyncio.Event)
    num_running: int = 0
    num_started: int = 0
    most: int = 0

    async def run(self, question: Question, session: Session) -> Episode:
        index, self.num_started = self.num_started, self.num_started + 1
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        try:
            await self.go.wait()
        finally:
            self.num_running -= 1
        answer, status = self.outcomes[index % len(self.outcomes)]
        return Episode(answer=answer, status=status, reason="", stats={"turns": 1.0})


class NoEngine:
    async def generate(self, *_: object, **__: object) -> None:
        raise AssertionError("nothing is sampled here")


def make(workflow: Waiting, folder: Path, *, max_trajectories: int) -> tuple[GroupRollout, Episodes]:
    write_tokenizer(folder)
    questions = [Question(f"q{i}", "who?", ("zuka",)) for i in range(3)]
    task = QuestionAnswering(questions, reward=reward_named("em"), seed=None)
    episodes = Episodes(
        workflow=workflow,
        reward=task.reward,
        pool=NoEngine(),  # pyright: ignore[reportArgumentType]
        tokenizer=Tokenizer.load(folder),
        sampling=SamplingParams(),
        run_id="run",
        max_context_tokens=64,
        max_trajectories=max_trajectories,
    )
    return GroupRollout(task=task, episodes=episodes), episodes


def lease(*, cursor: int = 4, group_size: int = 4) -> Lease:
    return Lease(lease_id=1, run_id="run", cursor=cursor, attempt=2, group_size=group_size, min_version=0)


async def test_a_lease_becomes_a_group(tmp_path: Path) -> None:
    outcomes = [("zuka", Status.COMPLETED), ("bela", Status.COMPLETED), ("", Status.FORMAT_ERROR), ("", Status.FAILED)]
    workflow = Waiting(outcomes)
    workflow.go.set()
    rollout, episodes = make(workflow, tmp_path, max_trajectories=8)
    group = await rollout(lease())
    assert (group.run_id, group.cursor, group.attempt, group.question.id) == ("run", 4, 2, "q1")
    assert [trajectory.reward for trajectory in group.trajectories] == [1.0, 0.0, 0.0, 0.0]
    assert [trajectory.status for trajectory in group.trajectories] == [status for _, status in outcomes]
    assert (episodes.num_running, episodes.num_done) == (0, 4)


async def test_no_more_than_so_many_at_once(tmp_path: Path) -> None:
    workflow = Waiting([("zuka", Status.COMPLETED)])
    rollout, episodes = make(workflow, tmp_path, max_trajectories=3)
    groups = [asyncio.ensure_future(rollout(lease(cursor=i))) for i in range(3)]
    async with asyncio.timeout(WAIT_S):
        while workflow.num_running < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert episodes.num_running == 3
        workflow.go.set()
        assert len(await asyncio.gather(*groups)) == 3
    assert (workflow.most, workflow.num_started, episodes.num_done) == (3, 12, 12)


async def test_cancelled_it_frees_its_slots(tmp_path: Path) -> None:
    workflow = Waiting([("zuka", Status.COMPLETED)])
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
