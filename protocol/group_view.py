"""A received group: a checked header and three columns, from which trajectories are built on demand.

The coordinator reads versions and numbers of sampled tokens from the columns; contexts are built only in the learner's
loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from protocol.messages import SubmitGroup
from protocol.types import Context, Edge, Question, Status, Trajectory, TrajectoryGroup, VersionSpan


@dataclass(frozen=True, slots=True, eq=False)
class GroupView:
    """A group whose header and columns `protocol.codec.decode_group` has checked; build it with that function only.

    token_ids  int32   [T]     all contexts, concatenated
    spans      int32   [S, 4]  (start, end, version, publication); start and end are positions in the span's context
    logprobs   float32 [N]     of the sampled tokens: the N tokens that the spans cover, in order
    """

    header: SubmitGroup
    token_ids: NDArray[np.int32]
    spans: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @property
    def run_id(self) -> str:
        return self.header.run_id

    @property
    def cursor(self) -> int:
        return self.header.cursor

    @property
    def attempt(self) -> int:
        return self.header.attempt

    @property
    def oldest_version(self) -> int | None:
        """The lowest version of the sampled tokens; None if no token was sampled."""
        return int(self.spans[:, 2].min()) if len(self.spans) else None

    @property
    def num_trained_tokens(self) -> int:
        return len(self.logprobs)

    def num_trained_tokens_each(self) -> NDArray[np.int64]:
        """Returns int64 [G]: the number of sampled tokens of each trajectory."""
        header = self.header
        trajectory = np.repeat(np.arange(len(header.num_contexts)), header.num_contexts)
        lengths = self.spans[:, 1] - self.spans[:, 0]
        owner = np.repeat(trajectory, header.context_num_spans)
        return np.bincount(owner, weights=lengths, minlength=len(header.num_contexts)).astype(np.int64)

    def unpack(self) -> TrajectoryGroup:
        """Returns the group. Its trajectories are built at the first access; `token_ids` are views of the payload."""
        header = self.header
        question = Question(
            header.question.id,
            header.question.text,
            tuple(header.question.answers),
            dict(header.question.metadata),
        )
        return TrajectoryGroup(self.run_id, self.cursor, self.attempt, question, _Trajectories(self))


class _Trajectories(Sequence[Trajectory]):
    """The trajectories of a GroupView; all of them are built at the first access to one."""

    def __init__(self, view: GroupView) -> None:
        self._view = view

    def __len__(self) -> int:
        return len(self._view.header.rewards)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | Sequence[Trajectory]:
        return self._built[index]

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self._built)

    @cached_property
    def _built(self) -> tuple[Trajectory, ...]:
        header, contexts = self._view.header, _build_contexts(self._view)
        offsets = [0, *np.cumsum(header.num_contexts).tolist()]
        return tuple(
            Trajectory(
                contexts=tuple(contexts[first:last]),
                reward=header.rewards[i],
                status=Status(header.statuses[i]),
                reward_parts=_row(header.reward_parts, i),
                stats=_row(header.stats, i),
                answer=header.answers[i],
            )
            for i, (first, last) in enumerate(pairwise(offsets))
        )


def _build_contexts(view: GroupView) -> list[Context]:
    header, ids = view.header, view.token_ids
    token_offsets = [0, *np.cumsum(header.context_lengths).tolist()]
    span_offsets = [0, *np.cumsum(header.context_num_spans).tolist()]
    versions = list(map(VersionSpan._make, view.spans.tolist()))
    mask, logprobs = np.zeros(len(ids), dtype=np.bool_), np.zeros(len(ids), dtype=np.float32)
    for k, (first, last) in enumerate(pairwise(span_offsets)):
        for span in versions[first:last]:
            mask[token_offsets[k] + span.start : token_offsets[k] + span.end] = True
    logprobs[mask] = view.logprobs
    mask.flags.writeable = logprobs.flags.writeable = False
    return [
        Context(
            token_ids=ids[start:end],
            loss_mask=mask[start:end],
            behavior_logprobs=logprobs[start:end],
            policy_versions=tuple(versions[first:last]),
            role=header.role_names[header.context_roles[k]],
            policy=header.policy_names[header.context_policies[k]],
            turn=header.context_turns[k],
            edge=Edge(header.context_edges[k]),
            reward=header.context_rewards[k],
        )
        for k, ((start, end), (first, last)) in enumerate(
            zip(pairwise(token_offsets), pairwise(span_offsets), strict=True)
        )
    ]


def _row(columns: dict[str, list[float | None]], i: int) -> dict[str, float]:
    return {name: value for name, column in columns.items() if (value := column[i]) is not None}
