"""A scripted workflow, a one-token engine and a rollout that uses both, for the tests of actor/rollout.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from actor.chat.tokenizer import Tokenizer
from actor.engines.completion import Completion, Finish, Span
from actor.engines.sampling import SamplingParams
from actor.episode import Episode
from actor.rewards.reward import ExactMatchReward, Reward
from actor.rollout import Episodes, GroupRollout
from actor.session import Session
from actor.tasks.task import Task
from actor.tasks.toy.tokenizer import write_tokenizer
from actor.tools.tool import Tool
from actor.workflows.workflow import Workflow
from protocol.codec import decode_frames, encode_group
from protocol.config_base import Options
from protocol.messages import Lease
from protocol.types import Question, TrajectoryGroup

END = 1
Play = Callable[[int, Session], Awaitable[object]]


class Scripted(Workflow):
    """A workflow that calls `play(k, session)` for the k-th episode that starts."""

    def __init__(self, play: Play, *, tools: Mapping[str, Tool] | None = None) -> None:
        super().__init__(Options(), tools=tools or {}, context_tokens=64)
        self.play = play
        self.num_started = 0

    async def run(self, question: Question, session: Session) -> Episode:
        index, self.num_started = self.num_started, self.num_started + 1
        return cast(Episode, await self.play(index, session))


class OneTokenEngine:
    """Implements `Generator`: returns the end token, sampled by version 0, for every request."""

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, min_version: int, prefer: str = "", rid: str = ""
    ) -> Completion:
        return Completion(
            token_ids=np.array([END], dtype=np.int32),
            logprobs=np.array([-0.5], dtype=np.float32),
            finish_reason=Finish("stop", END),
            spans=(Span(0, 1, "run:1:0"),),
            prompt_tokens=len(input_ids),
            cached_tokens=0,
        )


class SomeTask(Task):
    """Questions q0, q1, q2 in rotation, all with the answer `zuka`; `question` raises at the cursors `raises_at`."""

    def __init__(self, *, raises_at: Sequence[int] = ()) -> None:
        super().__init__(Options(), split="train", seed=0)
        self.raises_at = raises_at

    def question(self, cursor: int) -> Question:
        if cursor in self.raises_at:
            raise KeyError(f"row {cursor}")
        return Question(f"q{cursor % 3}", "who?", ("zuka",))


def make_rollout(
    workflow: Workflow,
    folder: Path,
    *,
    max_trajectories: int = 8,
    reward: Reward | None = None,
    task: Task | None = None,
) -> tuple[GroupRollout, Episodes]:
    write_tokenizer(folder)
    episodes = Episodes(
        workflow=workflow,
        reward=reward or ExactMatchReward(Options()),
        pool=OneTokenEngine(),
        tokenizer=Tokenizer.load(folder),
        sampling=SamplingParams(),
        run_id="run",
        max_context_tokens=64,
        max_trajectories=max_trajectories,
    )
    return GroupRollout(task=task or SomeTask(), episodes=episodes), episodes


def lease(*, cursor: int = 4, group_size: int = 4) -> Lease:
    return Lease(lease_id=1, run_id="run", cursor=cursor, attempt=2, group_size=group_size, min_version=0)


async def answer(session: Session, text: str = "zuka") -> Episode:
    """Plays one context of two tokens, one of them sampled, and answers."""
    session.open_context([7])
    await session.generate(1)
    session.close_context()
    return Episode(answer=text)


def sent_and_received(group: TrajectoryGroup) -> TrajectoryGroup:
    """The group as the learner decodes it."""
    return decode_frames(encode_group(group, lease_id=1)).unpack()


def decoded(folder: Path, ids: Sequence[int]) -> str:
    return Tokenizer.load(folder).decode(list(ids))
