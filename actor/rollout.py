"""Rolls out the group of a lease: G episodes of one question, each with its own session.

    Lease ─► task.question(cursor) ─► G × [ slot ─► Session + workflow.run ─► reward.score ] ─► TrajectoryGroup
                                           at most max_trajectories at once in this actor

Errors in a workflow, a tool or a reward end their trajectory as FAILED, which is not trained. They never end the actor.
The learner gets the counts of their reasons with every heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
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
from protocol.failure_counts import FailureCounts
from protocol.messages import MAX_ANSWER_CHARS, Lease
from protocol.types import Question, Status, Trajectory, TrajectoryGroup

log = logging.getLogger(__name__)

# A traceback is logged for the first failures of each kind; later ones are one line each.
_MAX_TRACEBACKS = 3


_NO_QUESTION = Question("none", "", ())
_EMPTY = Trajectory(contexts=(), reward=0.0, status=Status.FAILED)


class _Failure(Exception):
    """Ends a trajectory as FAILED. `kind`: the name of its counter; `reason`: one sentence."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class Episodes:
    """Runs and scores episodes of one workflow, for training and for evaluation.

    failures  kind, such as `SearchFailed` or `workflow_TypeError` → FAILED trajectories
    reasons   the same by reason: the kind and what happened
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
        self.reasons = FailureCounts()

    async def run(self, question: Question, *, min_version: int = 0, rid: str = "") -> tuple[Trajectory, Episode]:
        """Waits for one of the `max_trajectories` slots, then runs and scores one episode."""
        async with self._slots:
            self.num_running += 1
            session = self._session(question, min_version=min_version, rid=rid)
            try:
                episode, trajectory = await self._run_workflow(question, session)
                score = await self._score(question, episode, trajectory)
                return replace(trajectory, reward=score.reward, reward_parts=dict(score.parts)), episode
            except _Failure as failure:
                self._count(failure)
                return _failed(session, failure.reason)
            finally:
                self.num_running -= 1
                self.num_done += 1

    def fail(self, what: str, extension: object, error: BaseException, *, count: int = 1) -> list[Trajectory]:
        """Counts `count` FAILED trajectories for an error of `extension` and returns empty ones in their place."""
        self._count(self._logged_failure(what, extension, error), count)
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

    def _count(self, failure: _Failure, count: int = 1) -> None:
        self.failures[failure.kind] += count
        names_kind = failure.reason.startswith(f"{failure.kind}:")
        self.reasons.add(failure.reason if names_kind else f"{failure.kind}: {failure.reason}", count)

    async def _run_workflow(self, question: Question, session: Session) -> tuple[Episode, Trajectory]:
        """Runs the workflow and takes its tokens; the trajectory has no reward yet. Raises: _Failure."""
        try:
            episode = _close_session(session, await self._episode(question, session))
            if len(episode.context_rewards) not in (0, len(session.contexts)):
                raise ValueError(
                    f"context_rewards must be empty or one for each of {len(session.contexts)} contexts, got "
                    f"{len(episode.context_rewards)}"
                )
            return episode, _trajectory(session, episode)
        except _Failure:
            raise
        except (EngineError, RemoteError) as error:
            raise _Failure(type(error).__name__, f"{type(error).__name__}: {error}") from error
        except ToolFailed as failed:
            raise self._logged_failure("tool", failed.tool, failed.__cause__ or failed) from failed
        except BaseException as error:
            if not is_fault(error):
                raise
            raise self._logged_failure("workflow", self._workflow, error) from error

    async def _episode(self, question: Question, session: Session) -> Episode:
        try:
            episode = await self._workflow.run(question, session)
        except BudgetExceeded as error:
            return Episode(status=Status.OVER_BUDGET, reason=str(error))
        if not isinstance(episode, Episode):
            raise TypeError(f"run must return an Episode, got {type(episode).__name__}")
        if episode.status is Status.FAILED:
            raise _Failure("by_workflow", episode.reason)
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
        except BaseException as error:
            if not is_fault(error):
                raise
            raise self._logged_failure("reward", self._reward, error) from error
        return score

    def _logged_failure(self, what: str, extension: object, error: BaseException) -> _Failure:
        """Logs an exception of a task, workflow, tool or reward, and returns the failure to raise."""
        kind = f"{what}_{type(error).__name__}"
        reason = f"{type(extension).__module__}:{type(extension).__qualname__} raised {described(error)}"
        trace = error if self.failures[kind] < _MAX_TRACEBACKS else None
        log.error("trajectory failed: %s", reason, exc_info=trace)
        return _Failure(kind, reason)


def is_fault(error: BaseException) -> bool:
    """Whether user code raised `error`: false for the cancellation of the running task and for Ctrl-C.

    True for SystemExit, and for a CancelledError although the task was not cancelled.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit)


def _failed(session: Session, reason: str) -> tuple[Trajectory, Episode]:
    """A FAILED trajectory with the tokens of the session; empty if user code has made them unusable."""
    episode = Episode(status=Status.FAILED, reason=reason)
    try:
        episode = _close_session(session, episode)
        return _trajectory(session, episode), episode
    except Exception:
        log.exception("the tokens of a failed trajectory cannot be used")
        return _EMPTY, episode


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

    async def __call__(self, lease: Lease, on_trajectory_end: Callable[[], None] = lambda: None) -> TrajectoryGroup:
        """Returns the group of a lease, which can be encoded. Errors make FAILED trajectories; nothing is raised.

        on_trajectory_end  called when a trajectory has ended and its slot is free
        """
        try:
            question = self._task.question(lease.cursor)
            encode_group(_group(lease, question, [_EMPTY]), lease_id=lease.lease_id)
        except BaseException as error:
            if not is_fault(error):
                raise
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
            for each in running:
                each.add_done_callback(lambda _: on_trajectory_end())
        group = _group(lease, question, [each.result()[0] for each in running])
        return self._encodable(group, lease)

    def _encodable(self, group: TrajectoryGroup, lease: Lease) -> TrajectoryGroup:
        """The group; trajectories with values of user code that cannot be encoded are replaced by FAILED ones."""
        try:
            encode_group(group, lease_id=lease.lease_id)
            return group
        except Exception:
            group = replace(group, trajectories=tuple(self._episodes.sendable(t, lease) for t in group.trajectories))
        try:
            encode_group(group, lease_id=lease.lease_id)
            return group
        except Exception as error:  # every trajectory can be encoded, but together they are too large
            failed = self._episodes.fail("group", self._task, error, count=lease.group_size)
            return replace(group, trajectories=tuple(failed))


def _group(lease: Lease, question: Question, trajectories: Sequence[Trajectory]) -> TrajectoryGroup:
    return TrajectoryGroup(
        run_id=lease.run_id,
        cursor=lease.cursor,
        attempt=lease.attempt,
        question=question,
        trajectories=tuple(trajectories),
    )
