"""Decides whether a received group is accepted for training. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from protocol.group_view import GroupView
from protocol.types import Status


@dataclass(frozen=True, slots=True)
class Rules:
    """The run's settings that every group is checked against."""

    run_id: str
    group_size: int
    vocab_size: int
    skip_zero_variance: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on a group.

    accept  train the group
    skip    store the group but do not train it: its advantages are all 0
    retry   the environment failed: issue the question again
    refuse  the group breaks a rule: discard it and issue the question again
    """

    kind: Literal["accept", "skip", "retry", "refuse"]
    reason: str = ""


def judge(group: GroupView, *, rules: Rules, publications: Mapping[int, int], step: int, min_version: int) -> Verdict:
    """Returns the verdict on a group. The scheduler has already checked its run id.

    publications  publication → version
    step          the learner's current step
    min_version   the oldest version that the group's lease allows
    """
    problem = _problem(group, rules=rules, publications=publications, step=step, min_version=min_version)
    if problem:
        return Verdict("refuse", problem)
    valid = [i for i, status in enumerate(group.header.statuses) if status != Status.FAILED]
    if not group.num_trained_tokens_each()[valid].any():
        return Verdict("retry", "every trajectory failed or has no sampled token")
    rewards = {group.header.rewards[i] for i in valid}
    if rules.skip_zero_variance and len(rewards) == 1:
        return Verdict("skip", "zero variance")
    return Verdict("accept")


def _problem(group: GroupView, *, rules: Rules, publications: Mapping[int, int], step: int, min_version: int) -> str:
    """The reason to refuse the group; empty if it breaks no rule."""
    if len(group.header.rewards) != rules.group_size:
        return f"a group must have {rules.group_size} trajectories, got {len(group.header.rewards)}"
    if not group.spans[:, 0].all():
        return "the first token of a context must not be a sampled token: it has no prefix to condition on"
    if len(group.token_ids) and (largest := int(group.token_ids.max())) >= rules.vocab_size:
        return f"token ids must be below the vocabulary size {rules.vocab_size}, got {largest}"
    sampled_by = np.unique(group.spans[:, 2].astype(np.int64) << 32 | group.spans[:, 3])
    for version, publication in zip((sampled_by >> 32).tolist(), (sampled_by & 0xFFFFFFFF).tolist(), strict=True):
        if publications.get(publication) != version or version > step:
            return f"publication {publication} of version {version} is not known to this run"
        if version < min_version:
            return f"versions must be >= {min_version} for this lease, got {version}"
    return ""
