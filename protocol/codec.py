"""A trajectory group as one header and one frame a column (many small frames cost three times as much)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from protocol.errors import MalformedMessage
from protocol.messages import QuestionFields, SubmitGroup
from protocol.types import Context, Edge, Question, Status, Trajectory, TrajectoryGroup, VersionSpan
from protocol.wire import Buffer, decode, encode, expect

_COLUMNS = (("token_ids", "<i4"), ("loss_mask", "u1"), ("behavior_logprobs", "<f4"), ("spans", "<i4"))
_NUM_FRAMES = 1 + len(_COLUMNS)


def encode_group(group: TrajectoryGroup, *, lease_id: int) -> list[Buffer]:
    """[header, token_ids, loss_mask, behavior_logprobs, spans]; see `SubmitGroup` for the layout."""
    contexts = list(group.contexts())
    roles, role_index = _intern([context.role for context in contexts])
    policies, policy_index = _intern([context.policy for context in contexts])
    header = SubmitGroup.model_construct(
        lease_id=lease_id,
        run_id=group.run_id,
        cursor=group.cursor,
        attempt=group.attempt,
        question=QuestionFields.model_construct(
            id=group.question.id,
            text=group.question.text,
            answers=list(group.question.answers),
            metadata=group.question.metadata,
        ),
        rewards=[float(trajectory.reward) for trajectory in group.trajectories],
        statuses=[trajectory.status.value for trajectory in group.trajectories],
        answers=[trajectory.answer for trajectory in group.trajectories],
        reward_parts=_columns_of([trajectory.reward_parts for trajectory in group.trajectories]),
        stats=_columns_of([trajectory.stats for trajectory in group.trajectories]),
        num_contexts=[len(trajectory.contexts) for trajectory in group.trajectories],
        context_lengths=[len(context) for context in contexts],
        context_num_spans=[len(context.policy_versions) for context in contexts],
        context_turns=[context.turn for context in contexts],
        context_roles=role_index,
        context_policies=policy_index,
        context_edges=[context.edge.value for context in contexts],
        context_rewards=[float(context.reward) for context in contexts],
        role_names=roles,
        policy_names=policies,
    )
    spans = [
        (span.start, span.end, span.version, span.publication)
        for context in contexts
        for span in context.policy_versions
    ]
    return [
        encode(header),
        _flat([context.token_ids for context in contexts], "<i4"),
        _flat([context.loss_mask for context in contexts], "u1"),
        _flat([context.behavior_logprobs for context in contexts], "<f4"),
        np.asarray(spans, dtype="<i4").tobytes(),
    ]


def decode_group(header: SubmitGroup, payload: Sequence[Buffer]) -> TrajectoryGroup:
    """The group, checked as a whole. Its trajectories, read-only views into `payload`, are made when first looked at.

    Raises: MalformedMessage where columns disagree in length, a span is out of its context, or spans do not cover
    exactly the sampled tokens.
    """
    _check_header(header)
    lengths = np.asarray(header.context_lengths, dtype=np.int64)
    num_tokens, num_spans = int(lengths.sum()), sum(header.context_num_spans)
    ids, mask, logprobs, spans = _views(payload, num_tokens, num_spans)
    _check_tokens(ids, mask, logprobs)
    _check_spans(spans, mask, lengths, np.asarray(header.context_num_spans, dtype=np.int64))
    question = Question(
        header.question.id,
        header.question.text,
        tuple(header.question.answers),
        dict(header.question.metadata),
    )
    trajectories = _Trajectories(header, ids, mask.view(np.bool_), logprobs, spans)
    return TrajectoryGroup(header.run_id, header.cursor, header.attempt, question, trajectories)


class _Trajectories(Sequence[Trajectory]):
    """Those of a group whose columns have been checked, all made at the first look at one of them."""

    def __init__(
        self,
        header: SubmitGroup,
        ids: NDArray[np.int32],
        mask: NDArray[np.bool_],
        logprobs: NDArray[np.float32],
        spans: NDArray[np.int32],
    ) -> None:
        self._header = header
        self._columns = ids, mask, logprobs, spans

    def __len__(self) -> int:
        return len(self._header.rewards)

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
        header = self._header
        contexts = self._contexts()
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

    def _contexts(self) -> list[Context]:
        header, (ids, mask, logprobs, spans) = self._header, self._columns
        token_offsets = [0, *np.cumsum(header.context_lengths).tolist()]
        span_offsets = [0, *np.cumsum(header.context_num_spans).tolist()]
        versions = [VersionSpan(*row) for row in spans.tolist()]
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


def pack_groups(groups: Sequence[TrajectoryGroup]) -> bytes:
    """Groups as one run of bytes: each frame of each group, after its length in 8 bytes, little-endian."""
    frames = [frame for group in groups for frame in encode_group(group, lease_id=0)]
    return b"".join(part for frame in frames for part in (struct.pack("<Q", len(frame)), frame))


def unpack_groups(data: bytes) -> list[TrajectoryGroup]:
    """What `pack_groups` packed. Raises: MalformedMessage."""
    frames, at = [], 0
    while at < len(data):
        start = at + 8
        at = start + int.from_bytes(data[at:start], "little")
        frames.append(memoryview(data)[start:at])
    if at != len(data) or len(frames) % _NUM_FRAMES:
        raise MalformedMessage(f"groups: {len(data)} bytes are not whole frames, {_NUM_FRAMES} a group")
    groups = []
    for first in range(0, len(frames), _NUM_FRAMES):
        message, payload = decode(frames[first : first + _NUM_FRAMES])
        groups.append(decode_group(expect(message, SubmitGroup), payload))
    return groups


def _check_header(header: SubmitGroup) -> None:
    num_trajectories, num_contexts = len(header.rewards), len(header.context_lengths)
    if num_trajectories == 0:
        raise MalformedMessage("group: it has no trajectory")
    per_trajectory = {
        "statuses": header.statuses,
        "answers": header.answers,
        "num_contexts": header.num_contexts,
    }
    per_trajectory |= {f"reward_parts.{name}": column for name, column in header.reward_parts.items()}
    per_trajectory |= {f"stats.{name}": column for name, column in header.stats.items()}
    for name, column in per_trajectory.items():
        if len(column) != num_trajectories:
            raise MalformedMessage(f"group: {name} must have {num_trajectories} entries, got {len(column)}")
    for name in ("num_spans", "turns", "roles", "policies", "edges", "rewards"):
        column = getattr(header, f"context_{name}")
        if len(column) != num_contexts:
            raise MalformedMessage(f"group: context_{name} must have {num_contexts} entries, got {len(column)}")
    if sum(header.num_contexts) != num_contexts:
        raise MalformedMessage(f"group: num_contexts must add up to {num_contexts}, got {sum(header.num_contexts)}")
    for name, index, names in (
        ("context_roles", header.context_roles, header.role_names),
        ("context_policies", header.context_policies, header.policy_names),
    ):
        if max(index, default=-1) >= len(names):
            raise MalformedMessage(f"group: {name} must be below {len(names)}, got {max(index)}")
    if not (np.isfinite(header.rewards).all() and np.isfinite(header.context_rewards).all()):
        raise MalformedMessage("group: rewards must be finite")


def _views(
    payload: Sequence[Buffer], num_tokens: int, num_spans: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
    if len(payload) != len(_COLUMNS):
        raise MalformedMessage(f"group: payload must have {len(_COLUMNS)} frames, got {len(payload)}")
    columns = []
    for (name, dtype), frame in zip(_COLUMNS, payload, strict=True):
        count = num_spans * 4 if name == "spans" else num_tokens
        expected = count * np.dtype(dtype).itemsize
        if len(frame) != expected:
            raise MalformedMessage(f"group: {name} must have {expected} bytes, got {len(frame)}")
        columns.append(np.frombuffer(frame, dtype=dtype))
    return columns[0], columns[1], columns[2], columns[3].reshape(num_spans, 4)


def _check_tokens(ids: NDArray[np.int32], mask: NDArray[np.uint8], logprobs: NDArray[np.float32]) -> None:
    if len(ids) and int(ids.min()) < 0:
        raise MalformedMessage(f"group: token_ids must be >= 0, got {int(ids.min())}")
    if len(mask) and int(mask.max()) > 1:
        raise MalformedMessage(f"group: loss_mask must be 0 or 1, got {int(mask.max())}")
    # NaN fails the comparisons too. A small positive value is float noise around log 1.
    if len(logprobs) and not (logprobs.max() <= 1e-3 and logprobs.min() > -np.inf):
        raise MalformedMessage("group: behavior_logprobs must be finite and <= 0")


def _check_spans(
    spans: NDArray[np.int32],
    mask: NDArray[np.uint8],
    lengths: NDArray[np.int64],
    num_spans: NDArray[np.int64],
) -> None:
    """Spans lie within their context and cover each sampled token once and nothing else."""
    bounds = spans[:, :2].astype(np.int64)
    start, end = bounds.T
    if (spans < 0).any() or (start >= end).any() or (end > lengths.repeat(num_spans)).any():
        raise MalformedMessage("group: a span must satisfy 0 <= start < end <= its context's length")
    bounds += (lengths.cumsum() - lengths).repeat(num_spans)[:, np.newaxis]
    flat = bounds.ravel()
    if (flat[1:] < flat[:-1]).any():
        raise MalformedMessage("group: spans must be ascending")
    # Where one span ends and the next starts, sampling goes on: the mask has no edge at such a pair of bounds.
    is_edge = np.ones(len(flat), dtype=np.bool_)
    meets = flat[1:] == flat[:-1]
    is_edge[1:] &= ~meets
    is_edge[:-1] &= ~meets
    if not np.array_equal(flat[is_edge], np.flatnonzero(np.diff(mask.view(np.bool_), prepend=False, append=False))):
        raise MalformedMessage("group: spans must cover every sampled token once and no other")


def _flat(arrays: Sequence[NDArray[np.generic]], dtype: str) -> Buffer:
    """The bytes of the arrays after one another, copied once."""
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="safe").view(np.uint8).data.toreadonly()


def _intern(names: list[str]) -> tuple[list[str], list[int]]:
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(index), [index[name] for name in names]


def _columns_of(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _row_of(columns: dict[str, list[float | None]], i: int) -> dict[str, float]:
    return {name: value for name, column in columns.items() if (value := column[i]) is not None}
