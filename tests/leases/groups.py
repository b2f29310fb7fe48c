"""Groups that answer a lease, as frames and records."""

from __future__ import annotations

import numpy as np

from learner.leases.decisions import GroupReceived
from protocol.codec import decode_frames, encode_group
from protocol.messages import Lease
from protocol.types import Context, Question, Trajectory, TrajectoryGroup, VersionSpan

RUN = "test"
GROUP_SIZE = 2
VOCABULARY = 50


def make_group(
    lease: Lease, *, version: int = 0, publication: int = 1, rewards: tuple[float, ...] = (1.0, 0.0), token: int = 3
) -> TrajectoryGroup:
    """A valid answer to `lease`: one context of four tokens per trajectory, two of them sampled."""
    context = Context(
        token_ids=np.array([1, 2, token, 4], dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 1], dtype=np.bool_),
        behavior_logprobs=np.array([0, 0, -0.25, -1.5], dtype=np.float32),
        policy_versions=(VersionSpan(2, 4, version, publication),),
    )
    question = Question(id=f"q{lease.cursor}", text="who?", answers=("w1",))
    trajectories = tuple(Trajectory((context,), reward, reward_parts={"em": reward}) for reward in rewards)
    return TrajectoryGroup(lease.run_id, lease.cursor, lease.attempt, question, trajectories)


def arrived(group: TrajectoryGroup, *, lease_id: int) -> GroupReceived:
    """The record of `group`, as the coordinator would store it."""
    frames = encode_group(group, lease_id=lease_id)
    return GroupReceived(lease_id, decode_frames(frames), frames)
