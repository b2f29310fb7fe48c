"""Encodes a trajectory group as one header frame and one frame per column (one frame per context costs three times
as much).

TrajectoryGroup ── encode_group ──► frames ── decode_group (checks) ──► GroupView ── unpack ──► TrajectoryGroup
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import cast

import numpy as np
from numpy.typing import NDArray

from protocol.errors import MalformedMessage
from protocol.framing import Buffer, check_sizes, decode, encode_fields, expect
from protocol.group_view import GroupView
from protocol.messages import SubmitGroup
from protocol.types import Context, Trajectory, TrajectoryGroup, VersionSpan

_DTYPES = {
    "token_ids": np.dtype("<i4"),
    "spans": np.dtype("<i4"),
    "behavior_logprobs": np.dtype("<f4"),
    "loss_mask": np.dtype(np.bool_),
}
_COLUMNS = ("token_ids", "spans", "behavior_logprobs")
_NUM_FRAMES = 1 + len(_COLUMNS)
_MAX_INT32 = 2**31 - 1


def encode_group(group: TrajectoryGroup, *, lease_id: int) -> list[Buffer]:
    """Returns the frames [header, token_ids, spans, behavior_logprobs]; see `SubmitGroup` for the layout.

    The frames are within the limits of `protocol.framing`.
    Raises: MalformedMessage (a field is out of its bounds; an array has another type or length, or is not contiguous;
    spans do not cover exactly the sampled tokens), MessageTooLarge.
    """
    contexts = [context for trajectory in group.trajectories for context in trajectory.contexts]
    lengths = [len(context.token_ids) for context in contexts]
    header = encode_fields(
        SubmitGroup,
        {
            "lease_id": lease_id,
            "run_id": group.run_id,
            "cursor": group.cursor,
            "attempt": group.attempt,
            "question": {
                "id": group.question.id,
                "text": group.question.text,
                "answers": list(group.question.answers),
                "metadata": group.question.metadata,
            },
            **_trajectory_columns(group.trajectories),
            **_context_columns(contexts, lengths),
        },
    )
    spans = _pack_spans([span for context in contexts for span in context.policy_versions])
    _check_masks(contexts, lengths)
    logprobs = [context.behavior_logprobs[s.start : s.end] for context in contexts for s in context.policy_versions]
    ids = _join_arrays([context.token_ids for context in contexts], "token_ids")
    frames: list[Buffer] = [header, ids, spans, _join_arrays(logprobs, "behavior_logprobs")]
    check_sizes(frames)
    return frames


def decode_group(header: SubmitGroup, payload: Sequence[Buffer]) -> GroupView:
    """Returns the group after checking it completely; its columns are read-only views of `payload`.

    Raises: MalformedMessage (columns differ in length, a span is outside its context, spans are not ascending, a value
    is out of its bounds).
    """
    _check_header(header)
    lengths = np.array(header.context_lengths, dtype=np.int64)
    ids, spans, logprobs = _view_columns(payload, int(lengths.sum()), sum(header.context_num_spans))
    if len(ids) and ids.view(np.uint32).max() > _MAX_INT32:  # as uint32, negative ids are > _MAX_INT32
        raise MalformedMessage(f"group: token_ids must be >= 0, got {ids.min()}")
    num_sampled = _check_spans(spans, lengths, header.context_num_spans)
    if len(logprobs) != num_sampled:
        raise MalformedMessage(
            f"group: behavior_logprobs must have the {num_sampled} entries that spans cover, got {len(logprobs)}"
        )
    # NaN fails both comparisons. A small positive value is allowed: it is rounding of log 1 = 0.
    if len(logprobs) and not (logprobs.max() <= 1e-3 and logprobs.min() > -np.inf):
        raise MalformedMessage("group: behavior_logprobs must be finite and <= 0")
    return GroupView(header, ids, spans, logprobs)


def decode_frames(frames: Sequence[Buffer]) -> GroupView:
    """Decodes the frames that `encode_group` returned. Raises: ProtocolError."""
    message, payload = decode(frames)
    return decode_group(expect(message, SubmitGroup), payload)


def pack_groups(groups: Sequence[TrajectoryGroup]) -> bytes:
    """Serializes groups: all frames of all groups, each preceded by its length (8 bytes, little-endian)."""
    frames = [frame for group in groups for frame in encode_group(group, lease_id=0)]
    return b"".join(part for frame in frames for part in (struct.pack("<Q", len(frame)), frame))


def unpack_groups(data: bytes) -> list[TrajectoryGroup]:
    """Returns the groups that `pack_groups` serialized. Raises: ProtocolError."""
    frames, at = [], 0
    while at < len(data):
        start = at + 8
        at = start + int.from_bytes(data[at:start], "little")
        frames.append(memoryview(data)[start:at])
    if at != len(data) or len(frames) % _NUM_FRAMES:
        raise MalformedMessage(f"groups: {len(data)} bytes are not whole frames, {_NUM_FRAMES} per group")
    return [decode_frames(frames[first : first + _NUM_FRAMES]).unpack() for first in range(0, len(frames), _NUM_FRAMES)]


# --- encoding ---


def _trajectory_columns(trajectories: Sequence[Trajectory]) -> dict[str, object]:
    return {
        "rewards": [float(trajectory.reward) for trajectory in trajectories],
        "statuses": [str(trajectory.status) for trajectory in trajectories],
        "answers": [trajectory.answer for trajectory in trajectories],
        "reward_parts": _to_columns([trajectory.reward_parts for trajectory in trajectories]),
        "stats": _to_columns([trajectory.stats for trajectory in trajectories]),
        "num_contexts": [len(trajectory.contexts) for trajectory in trajectories],
    }


def _context_columns(contexts: Sequence[Context], lengths: list[int]) -> dict[str, object]:
    roles, role_index = _intern([context.role for context in contexts])
    policies, policy_index = _intern([context.policy for context in contexts])
    return {
        "context_lengths": lengths,
        "context_num_spans": [len(context.policy_versions) for context in contexts],
        "context_turns": [context.turn for context in contexts],
        "context_roles": role_index,
        "context_policies": policy_index,
        "context_edges": [str(context.edge) for context in contexts],
        "context_rewards": [float(context.reward) for context in contexts],
        "role_names": roles,
        "policy_names": policies,
    }


def _check_masks(contexts: Sequence[Context], lengths: list[int]) -> None:
    """Checks that each loss mask is equal to the positions that the spans cover; masks are not sent."""
    covered = []
    for context, length in zip(contexts, lengths, strict=True):
        if not length == len(context.loss_mask) == len(context.behavior_logprobs):
            raise MalformedMessage(
                f"group: a context of {length} tokens must have as many entries in loss_mask and behavior_logprobs, "
                f"got {len(context.loss_mask)} and {len(context.behavior_logprobs)}"
            )
        at = 0
        for span in context.policy_versions:
            covered.append(b"\0" * (span.start - at))
            covered.append(b"\1" * (span.end - span.start))
            at = span.end
        covered.append(b"\0" * (length - at))
    if b"".join(covered) != _join_arrays([context.loss_mask for context in contexts], "loss_mask"):
        raise MalformedMessage("group: spans must cover every sampled token once and no other")


def _pack_spans(spans: Sequence[VersionSpan]) -> bytes:
    try:
        return struct.pack(f"<{4 * len(spans)}i", *chain.from_iterable(spans))
    except struct.error as error:
        raise MalformedMessage(f"group: spans must be int32: {error}") from error


def _join_arrays(arrays: Sequence[NDArray[np.generic]], name: str) -> bytes:
    """Returns the concatenated bytes of the arrays; they are copied once."""
    dtype = _DTYPES[name]
    for array in arrays:
        if array.dtype is not dtype and array.dtype != dtype:
            raise MalformedMessage(f"group: {name} must be of {dtype}, got {array.dtype}")
    try:
        return b"".join(cast("Sequence[Buffer]", arrays))  # join accepts any contiguous buffer
    except (TypeError, ValueError) as error:
        raise MalformedMessage(f"group: {name} must be contiguous: {error}") from error


def _intern(names: list[str]) -> tuple[list[str], list[int]]:
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return list(index), [index[name] for name in names]


def _to_columns(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


# --- decoding ---


def _check_header(header: SubmitGroup) -> None:
    num_trajectories, num_contexts = len(header.rewards), len(header.context_lengths)
    if num_trajectories == 0:
        raise MalformedMessage("group: it must have at least 1 trajectory, got 0")
    per_trajectory = {"statuses": header.statuses, "answers": header.answers, "num_contexts": header.num_contexts}
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
    if not all(map(math.isfinite, header.rewards + header.context_rewards)):
        raise MalformedMessage("group: rewards must be finite")


def _view_columns(
    payload: Sequence[Buffer], num_tokens: int, num_spans: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    if len(payload) != len(_COLUMNS):
        raise MalformedMessage(f"group: payload must have {len(_COLUMNS)} frames, got {len(payload)}")
    for name, frame, expected in zip(_COLUMNS, payload, (4 * num_tokens, 16 * num_spans, None), strict=True):
        if expected is not None and len(frame) != expected:
            raise MalformedMessage(f"group: {name} must have {expected} bytes, got {len(frame)}")
    if len(payload[2]) % 4:
        raise MalformedMessage(f"group: the bytes of behavior_logprobs must be a multiple of 4, got {len(payload[2])}")
    ids, logprobs = np.frombuffer(payload[0], "<i4"), np.frombuffer(payload[2], "<f4")
    return ids, np.frombuffer(payload[1], "<i4").reshape(num_spans, 4), logprobs


def _check_spans(spans: NDArray[np.int32], lengths: NDArray[np.int64], num_spans: list[int]) -> int:
    """Checks that spans are inside their context, ascending and disjoint. Returns the number of covered tokens."""
    bounds = spans[:, :2].astype(np.int64)
    num_covered = bounds[:, 1] - bounds[:, 0]
    limits = lengths.repeat(num_spans)
    if len(spans) and not (spans.min() >= 0 and num_covered.min() > 0 and (bounds[:, 1] <= limits).all()):
        raise MalformedMessage("group: a span must satisfy 0 <= start < end <= its context's length")
    bounds += (lengths.cumsum() - lengths).repeat(num_spans)[:, np.newaxis]
    flat = bounds.ravel()
    if (flat[1:] < flat[:-1]).any():
        raise MalformedMessage("group: spans must be ascending")
    return int(num_covered.sum())
