"""Types of groups of multi-context trajectories.

Group → Trajectory → Context → token; there are no padded rows. A context has exactly the tokens that the policy read
and sampled. A memory is passed to the next context as text and tokenised again there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.errors import UnknownVersion

_TAG = re.compile(r"^(?P<run>[A-Za-z0-9_.-]{1,64}):(?P<publication>\d{1,12}):(?P<version>\d{1,12})$")


class Status(StrEnum):
    """How a trajectory ended."""

    COMPLETED = "completed"
    """The policy gave an answer."""
    FORMAT_ERROR = "format_error"
    """The policy broke a format rule of the workflow; the reward reflects it. Trained."""
    OVER_BUDGET = "over_budget"
    """The budget of turns, memory or tokens was used up. Trained."""
    FAILED = "failed"
    """The environment failed (an engine, a retriever). Excluded from the advantage statistics and the gradient."""


class Edge(StrEnum):
    """How a context follows from the one before it."""

    START = "start"
    MEMORY_RESET = "memory_reset"
    SUB_AGENT = "sub_agent"


@dataclass(frozen=True, slots=True)
class PolicyTag:
    """The weight version that an engine reports, as text `run:publication:version`.

    `version` is the learner's step count. `publication` identifies one set of published bytes and is never reused;
    the store maps it to its step.
    """

    run_id: str
    publication: int
    version: int

    def __str__(self) -> str:
        return f"{self.run_id}:{self.publication}:{self.version}"

    @classmethod
    def parse(cls, text: str) -> PolicyTag:
        """Parses a reported weight version. Raises: UnknownVersion (SGLang reports `default` after a restart)."""
        match = _TAG.match(text)
        if match is None:
            raise UnknownVersion(f"weight version {text!r} is not of the form run:publication:version")
        return cls(match["run"], int(match["publication"]), int(match["version"]))


class VersionSpan(NamedTuple):
    """Positions [start, end) of a context, sampled by policy `version` as published in `publication`."""

    start: int
    end: int
    version: int
    publication: int


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """One context of L tokens, exactly as the policy read and sampled them.

    token_ids          int32   [L]
    loss_mask          bool    [L]  true where the policy sampled the token
    behavior_logprobs  float32 [L]  log-probability under the behaviour policy at its temperature; 0 where not sampled
    policy_versions    spans that cover exactly the sampled positions, ascending and disjoint
    reward             of this context alone, in addition to the trajectory's; 0 if the task gives none
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    behavior_logprobs: NDArray[np.float32]
    policy_versions: tuple[VersionSpan, ...]
    role: str = "agent"
    policy: str = "main"
    turn: int = 0
    edge: Edge = Edge.START
    reward: float = 0.0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int | None:
        """The lowest version of the sampled tokens; None if no token was sampled."""
        return min((span.version for span in self.policy_versions), default=None)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """K contexts and one reward. `reward_parts` and `stats` are named scalars for metrics (em, f1, num_searches …)."""

    contexts: tuple[Context, ...]
    reward: float
    status: Status = Status.COMPLETED
    reward_parts: dict[str, float] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)
    answer: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(len(context) for context in self.contexts)

    @property
    def num_trained_tokens(self) -> int:
        return sum(context.num_trained_tokens for context in self.contexts)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its gold answers. `id` is unique within its task."""

    id: str
    text: str
    answers: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """G trajectories of one question, made under one lease.

    (run_id, cursor) identifies the group. Of several attempts at it, the first that is stored durably is kept.
    """

    run_id: str
    cursor: int
    attempt: int
    question: Question
    trajectories: Sequence[Trajectory]

    def contexts(self) -> Iterator[Context]:
        for trajectory in self.trajectories:
            yield from trajectory.contexts

    @property
    def oldest_version(self) -> int | None:
        versions = [v for context in self.contexts() if (v := context.oldest_version) is not None]
        return min(versions, default=None)


@dataclass(frozen=True, slots=True)
class Passage:
    """A document that the retriever returned. A larger `score` is closer, in the index's metric."""

    id: str
    title: str
    text: str
    score: float = 0.0
