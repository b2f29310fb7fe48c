"""Whether a group that has arrived will be trained. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from protocol.group_view import GroupView
from protocol.types import Status


@dataclass(frozen=True, slots=True)
class Rules:
    """What every group of a run must satisfy."""

    run_id: str
    group_size: int
    vocab_size: int
    skip_zero_variance: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """An actor that is silent for `lease_timeout_s` loses its leases; a lease that has run for `straggler_timeout_s`
    may be overtaken (None: never)."""

    lease_timeout_s: float
    straggler_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`accept` it; `skip` it (valid, but teaches nothing); `retry` the question (the environment failed);
    `refuse` it (it must not be trained; the question is issued again)."""

    kind: Literal["accept", "skip", "retry", "refuse"]
    reason: str = ""


def judge(group: GroupView, *, rules: Rules, publications: Mapping[int, int], step: int, min_version: int) -> Verdict:
    """`publications` maps a publication to its version; `step` is the learner's; `min_version` is the lease's."""
    problem = _problem(group, rules=rules, publications=publications, step=step, min_version=min_version)
    if problem:
        return Verdict("refuse", problem)
    valid = [i for i, status in enumerate(group.header.statuses) if status != Status.FAILED]
    if not group.num_trained_tokens_each()[valid].any():
        return Verdict("retry", "no trajectory survived the environment")
    rewards = {group.header.rewards[i] for i in valid}
    if rules.skip_zero_variance and len(rewards) == 1:
        return Verdict("skip", "zero variance")
    return Verdict("accept")


def _problem(group: GroupView, *, rules: Rules, publications: Mapping[int, int], step: int, min_version: int) -> str:
    if group.run_id != rules.run_id:
        return f"run must be {rules.run_id}, got {group.run_id}"
    if len(group.header.rewards) != rules.group_size:
        return f"a group has {rules.group_size} trajectories, got {len(group.header.rewards)}"
    if not group.spans[:, 0].all():
        return "the first token of a context cannot be sampled: there is nothing that it was sampled after"
    if len(group.token_ids) and (largest := int(group.token_ids.max())) >= rules.vocab_size:
        return f"token ids must be below the vocabulary's {rules.vocab_size}, got {largest}"
    sampled_by = np.unique(group.spans[:, 2].astype(np.int64) << 32 | group.spans[:, 3])
    for version, publication in zip((sampled_by >> 32).tolist(), (sampled_by & 0xFFFFFFFF).tolist(), strict=True):
        if publications.get(publication) != version or version > step:
            return f"publication {publication} of version {version} is not known to this run"
        if version < min_version:
            return f"its lease asks for versions >= {min_version}, got {version}"
    return ""
