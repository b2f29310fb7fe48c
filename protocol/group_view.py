"""A group as it crossed the wire: a checked header and a few columns, viewed as trajectories when somebody asks.

What the coordinator must know of a group (is it valid, by which versions was it sampled, how much of it is trained) it
reads from the columns; contexts are made where they are trained.
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
    """`protocol.codec.decode_group` makes it, checked as a whole.

    token_ids  int32   [T]     of all contexts after one another
    spans      int32   [S, 4]  (start, end, version, publication), within their context
    logprobs   float32 [N]     of the sampled tokens, which are those that the spans cover
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
        """The lowest version among sampled tokens; None where nothing was sampled."""
        return int(self.spans[:, 2].min()) if len(self.spans) else None

    @property
    def num_trained_tokens(self) -> int:
        return len(self.logprobs)

    def num_trained_tokens_each(self) -> NDArray[np.int64]:
        """int64 [G]: the sampled tokens of each trajectory."""
        header = self.header
        trajectory = np.repeat(np.arange(len(header.num_contexts)), header.num_contexts)
        lengths = self.spans[:, 1] - self.spans[:, 0]
        owner = np.repeat(trajectory, header.context_num_spans)
        return np.bincount(owner, weights=lengths, minlength=len(header.num_contexts)).astype(np.int64)

    def unpack(self) -> TrajectoryGroup:
        """Its trajectories are made when first looked at; `token_ids` stay views of what was received."""
        header = self.header
        question = Question(
            header.question.id,
            header.question.text,
            tuple(header.question.answers),
            dict(header.question.metadata),
        )
        return TrajectoryGroup(self.run_id, self.cursor, self.attempt, question, _Trajectories(self))


class _Trajectories(Sequence[Trajectory]):
    """Those of a packed group, all made at the first look at one of them."""

    def __init__(self, packed: GroupView) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed.header.rewards)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | Sequence[Trajectory]:
        return self._made[index]

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self._made)

    @cached_property
    def _made(self) -> tuple[Trajectory, ...]:
        header, contexts = self._packed.header, _contexts(self._packed)
        offsets = [0, *np.cumsum(header.num_contexts).tolist()]
        return tuple(
            Trajectory(
                contexts=tuple(contexts[first:last]),
                reward=header.rewards[i],
                status=Status(header.statuses[i]),
                reward_parts=_row_of(header.reward_parts, i),
                stats=_row_of(header.stats, i),
                answer=header.answers[i],
            )
            for i, (first, last) in enumerate(pairwise(offsets))
        )


def _contexts(packed: GroupView) -> list[Context]:
    header, ids = packed.header, packed.token_ids
    token_offsets = [0, *np.cumsum(header.context_lengths).tolist()]
    span_offsets = [0, *np.cumsum(header.context_num_spans).tolist()]
    versions = list(map(VersionSpan._make, packed.spans.tolist()))
    mask, logprobs = np.zeros(len(ids), dtype=np.bool_), np.zeros(len(ids), dtype=np.float32)
    for k, (first, last) in enumerate(pairwise(span_offsets)):
        for span in versions[first:last]:
            mask[token_offsets[k] + span.start : token_offsets[k] + span.end] = True
    logprobs[mask] = packed.logprobs
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


def _row_of(columns: dict[str, list[float | None]], i: int) -> dict[str, float]:
    return {name: value for name, column in columns.items() if (value := column[i]) is not None}
