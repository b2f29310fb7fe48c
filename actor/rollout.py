"""From a lease to a group: G episodes of one question, each with a session of its own.

Lease ─► task.question(cursor) ─► G × [ slot ─► Session + workflow.run ─► reward ] ─► TrajectoryGroup
                                       bounded: max_trajectories at once in this actor
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from actor.chat.tokenizer import Tokenizer
from actor.engines.pool import Generator
from actor.engines.sampling import SamplingParams
from actor.rewards.reward import Reward
from actor.session import Session
from actor.tasks.task import Task
from actor.workflows.workflow import Episode, Workflow
from protocol.messages import Lease
from protocol.types import Context, Question, Trajectory, TrajectoryGroup


class Episodes:
    """Runs episodes of one workflow with one way of sampling; used in training and in evaluation alike."""

    def __init__(
        self,
        *,
        workflow: Workflow,
        reward: Reward,
        pool: Generator,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        run_id: str | None,
        max_context_tokens: int,
        max_trajectories: int,
    ) -> None:
        self._workflow = workflow
        self._reward = reward
        self._pool = pool
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._run_id = run_id
        self._max_context_tokens = max_context_tokens
        self._slots = asyncio.Semaphore(max_trajectories)
        self.num_running = 0
        self.num_done = 0

    async def run(self, question: Question, *, min_version: int = 0, rid: str = "") -> tuple[Trajectory, Episode]:
        """One trajectory, scored; waits for one of the `max_trajectories` slots."""
        async with self._slots:
            self.num_running += 1
            try:
                return await self._episode(question, min_version=min_version, rid=rid)
            finally:
                self.num_running -= 1
                self.num_done += 1

    async def _episode(self, question: Question, *, min_version: int, rid: str) -> tuple[Trajectory, Episode]:
        session = Session(
            pool=self._pool,
            tokenizer=self._tokenizer,
            sampling=replace(self._sampling, seed=self._sampling.derived_seed(rid)),
            run_id=self._run_id,
            min_version=min_version,
            max_context_tokens=self._max_context_tokens,
            rid=rid,
        )
        episode = await self._workflow.run(question, session)
        score = self._reward.score(question=question, answer=episode.answer, status=episode.status)
        trajectory = Trajectory(
            contexts=_with_rewards(session.contexts, episode.context_rewards),
            reward=score.reward,
            status=episode.status,
            reward_parts=dict(score.parts),
            stats=dict(episode.stats),
            answer=episode.answer or "",
        )
        return trajectory, episode


def _with_rewards(contexts: tuple[Context, ...], rewards: tuple[float, ...]) -> tuple[Context, ...]:
    if not rewards:
        return contexts
    return tuple(replace(context, reward=reward) for context, reward in zip(contexts, rewards, strict=True))


class GroupRollout:
    """What the runner calls for each lease."""

    def __init__(self, *, task: Task, episodes: Episodes) -> None:
        self._task = task
        self._episodes = episodes

    async def __call__(self, lease: Lease) -> TrajectoryGroup:
        question = self._task.question(lease.cursor)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(
                    self._episodes.run(
                        question, min_version=lease.min_version, rid=f"{lease.cursor}.{lease.attempt}.{i}"
                    )
                )
                for i in range(lease.group_size)
            ]
        return TrajectoryGroup(
            run_id=lease.run_id,
            cursor=lease.cursor,
            attempt=lease.attempt,
            question=question,
            trajectories=tuple(each.result()[0] for each in running),
        )
