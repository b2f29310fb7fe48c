"""Rolls out the group of a lease: G episodes of one question, each with its own session.

    Lease ─► task.question(cursor) ─► G × [ slot ─► Session + workflow.run ─► reward.score ] ─► TrajectoryGroup
                                           at most max_trajectories at once in this actor

Errors in a workflow, a tool or a reward end their trajectory as FAILED, which is not trained. They never end the actor.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from actor.chat.tokenizer import Tokenizer
from actor.engines.pool import Generator
from actor.engines.sampling import SamplingParams
from actor.episode import Episode
from actor.rewards.reward import Reward, Score
from actor.session import BudgetExceeded, Session, ToolFailed
from actor.tasks.task import Task
from actor.workflows.workflow import Workflow
from protocol.codec import encode_group
from protocol.errors import EngineError, RemoteError
from protocol.extensions import described
from protocol.messages import MAX_ANSWER_CHARS, Lease
from protocol.types import Question, Status, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

# A traceback is logged for the first failures of each kind; later ones are one line each.
_MAX_TRACEBACKS = 3


_NO_QUESTION = Question("none", "", ())
_EMPTY = Trajectory(contexts=(), reward=0.0, status=Status.FAILED)


class _Failure(Exception):
    """Ends a trajectory as FAILED. `kind`: name of the counter; `reason`: one sentence."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Episodes:
    """Runs and scores episodes of one workflow, for training and for evaluation.

    `failures` counts FAILED trajectories by kind, such as `SearchFailed` or `workflow_TypeError`.
    """

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
        self.failures: Counter[str] = Counter()

    async def run(self, question: Question, *, min_version: int = 0, rid: str = "") -> tuple[Trajectory, Episode]:
        """Waits for one of the `max_trajectories` slots, then runs and scores one episode."""
        async with self._slots:
            self.num_running += 1
            session = self._session(question, min_version=min_version, rid=rid)
            try:
                episode = await self._run_workflow(question, session)
                trajectory = _trajectory(session, episode)
                score = await self._score(question, episode, trajectory)
                return replace(trajectory, reward=score.reward, reward_parts=dict(score.parts)), episode
            except _Failure as failure:
                self.failures[failure.kind] += 1
                episode = _close_session(session, Episode(status=Status.FAILED, reason=failure.reason))
                return _trajectory(session, episode), episode
            finally:
                self.num_running -= 1
                self.num_done += 1

    def fail(self, what: str, extension: object, error: Exception, *, count: int = 1) -> list[Trajectory]:
        """Counts `count` FAILED trajectories for an error of `extension` and returns empty ones in their place."""
        self.failures[self._logged_failure(what, extension, error).kind] += count
        return [_EMPTY] * count

    def sendable(self, trajectory: Trajectory, lease: Lease) -> Trajectory:
        """Returns the trajectory, or an empty FAILED one if values of user code in it cannot be encoded."""
        try:
            encode_group(_group(lease, _NO_QUESTION, [trajectory]), lease_id=lease.lease_id)
        except Exception as error:
            return self.fail("workflow", self._workflow, error)[0]
        return trajectory

    def _session(self, question: Question, *, min_version: int, rid: str) -> Session:
        return Session(
            pool=self._pool,
            tokenizer=self._tokenizer,
            sampling=replace(self._sampling, seed=self._sampling.derived_seed(rid)),
            run_id=self._run_id,
            min_version=min_version,
            max_context_tokens=self._max_context_tokens,
            question=question,
            rid=rid,
        )

    async def _run_workflow(self, question: Question, session: Session) -> Episode:
        try:
            episode = await self._workflow.run(question, session)
            if not isinstance(episode, Episode):
                raise TypeError(f"run must return an Episode, got {type(episode).__name__}")
            if episode.status is Status.FAILED:
                raise _Failure("by_workflow", episode.reason)
        except _Failure:
            raise
        except BudgetExceeded as error:
            episode = Episode(status=Status.OVER_BUDGET, reason=str(error))
        except (EngineError, RemoteError) as error:
            raise _Failure(type(error).__name__, f"{type(error).__name__}: {error}") from error
        except ToolFailed as failed:
            raise self._logged_failure("tool", failed.tool, failed.__cause__ or failed) from failed
        except Exception as error:
            raise self._logged_failure("workflow", self._workflow, error) from error
        episode = _close_session(session, episode)
        if len(episode.context_rewards) not in (0, len(session.contexts)):
            mismatch = ValueError(
                f"context_rewards must be empty or one for each of {len(session.contexts)} contexts, got "
                f"{len(episode.context_rewards)}"
            )
            raise self._logged_failure("workflow", self._workflow, mismatch)
        return episode

    async def _score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        try:
            score = await self._reward.score(question, episode, trajectory)
            if not isinstance(score, Score):
                raise TypeError(f"score must return a Score, got {type(score).__name__}")
            if not all(map(math.isfinite, (score.reward, *score.parts.values()))):
                raise ValueError(
                    f"the reward and its parts must be finite, got {score.reward} with {dict(score.parts)}"
                )
        except Exception as error:
            raise self._logged_failure("reward", self._reward, error) from error
        return score

    def _logged_failure(self, what: str, extension: object, error: BaseException) -> _Failure:
        """Logs an exception of a task, workflow, tool or reward, and returns the failure to raise."""
        kind = f"{what}_{type(error).__name__}"
        reason = f"{type(extension).__module__}:{type(extension).__qualname__} raised {described(error)}"
        trace = error if self.failures[kind] < _MAX_TRACEBACKS else None
        log.error("trajectory failed: %s", reason, exc_info=trace)
        return _Failure(kind, reason)


def _close_session(session: Session, episode: Episode) -> Episode:
    """Closes the open context, if any; returns the episode with the session's transcripts and counts."""
    if session.is_open:
        session.close_context()
    return replace(
        episode,
        transcripts=session.transcripts(),
        weight_versions=session.weight_versions,
        stats={**session.stats(), **episode.stats},
    )


def _trajectory(session: Session, episode: Episode) -> Trajectory:
    contexts = session.contexts
    if episode.context_rewards:
        contexts = tuple(
            replace(context, reward=reward) for context, reward in zip(contexts, episode.context_rewards, strict=True)
        )
    return Trajectory(
        contexts=contexts,
        reward=0.0,
        status=episode.status,
        stats=dict(episode.stats),
        answer=(episode.answer or "")[:MAX_ANSWER_CHARS],
    )


class GroupRollout:
    """Rolls out the group of a lease. Called by the runner."""

    def __init__(self, *, task: Task, episodes: Episodes) -> None:
        self._task = task
        self._episodes = episodes

    async def __call__(self, lease: Lease) -> TrajectoryGroup:
        """Returns the group of a lease. If user code raises, the group has FAILED trajectories; nothing is raised."""
        try:
            question = self._task.question(lease.cursor)
            encode_group(_group(lease, question, [_EMPTY]), lease_id=lease.lease_id)
        except Exception as error:
            failed = self._episodes.fail("task", self._task, error, count=lease.group_size)
            return _group(lease, replace(_NO_QUESTION, id=f"question {lease.cursor}"), failed)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(
                    self._episodes.run(
                        question, min_version=lease.min_version, rid=f"{lease.cursor}.{lease.attempt}.{i}"
                    )
                )
                for i in range(lease.group_size)
            ]
        group = _group(lease, question, [each.result()[0] for each in running])
        try:
            encode_group(group, lease_id=lease.lease_id)
        except Exception:  # some trajectory holds values of user code that cannot be encoded: find it
            return _group(lease, question, [self._episodes.sendable(each, lease) for each in group.trajectories])
        return group


def _group(lease: Lease, question: Question, trajectories: Sequence[Trajectory]) -> TrajectoryGroup:
    return TrajectoryGroup(
        run_id=lease.run_id,
        cursor=lease.cursor,
        attempt=lease.attempt,
        question=question,
        trajectories=tuple(trajectories),
    )
