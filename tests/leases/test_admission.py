"""Which groups are accepted, skipped, retried or refused, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from learner.leases.admission import Rules, Verdict, judge
from protocol.codec import decode_frames, encode_group
from protocol.types import Context, Question, Status, Trajectory, TrajectoryGroup, VersionSpan

RULES = Rules(run_id="r", group_size=2, vocab_size=10, skip_zero_variance=False)
PUBLICATIONS = {1: 0, 2: 3}


def context(*, ids: tuple[int, ...] = (1, 2, 3), version: int = 3, publication: int = 2, first: int = 1) -> Context:
    mask = np.arange(len(ids)) >= first
    span = VersionSpan(first, len(ids), version, publication)
    return Context(np.array(ids, np.int32), mask, np.zeros(len(ids), np.float32), (span,))


def group(*trajectories: Trajectory) -> TrajectoryGroup:
    both = trajectories or (Trajectory((context(),), 1.0), Trajectory((context(),), 0.0))
    return TrajectoryGroup("r", 0, 0, Question("q", "?", ("a",)), both)


def verdict(group: TrajectoryGroup, *, rules: Rules = RULES, step: int = 4, min_version: int = 2) -> Verdict:
    packed = decode_frames(encode_group(group, lease_id=1))
    return judge(packed, rules=rules, publications=PUBLICATIONS, step=step, min_version=min_version)


def with_context(wrong: Context) -> TrajectoryGroup:
    return group(Trajectory((context(), wrong), 1.0), Trajectory((context(),), 0.0))


def test_a_valid_group_is_accepted() -> None:
    assert verdict(group()) == Verdict("accept")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (with_context(context(version=0, publication=1)), "versions must be >= 2 for this lease, got 0"),
        (with_context(context(version=2, publication=2)), "publication 2 of version 2 is not known"),
        (with_context(context(version=3, publication=9)), "publication 9 of version 3 is not known"),
        (with_context(context(ids=(1, 10, 3))), "below the vocabulary size 10, got 10"),
        (with_context(context(first=0)), "first token"),
        (group(Trajectory((context(),), 1.0)), "must have 2 trajectories, got 1"),
    ],
)
def test_refused_groups_have_a_reason(wrong: TrajectoryGroup, reason: str) -> None:
    given = verdict(wrong)
    assert given.kind == "refuse"
    assert reason in given.reason


def test_a_version_from_the_future_is_refused() -> None:
    assert verdict(group(), step=2).kind == "refuse"


def test_a_group_of_failed_trajectories_is_retried() -> None:
    failed = Trajectory((context(),), 0.0, Status.FAILED)
    assert verdict(group(failed, failed)).kind == "retry"
    assert verdict(group(failed, Trajectory((context(),), 1.0))).kind == "accept"


def test_zero_variance_is_skipped_if_configured() -> None:
    flat = group(Trajectory((context(),), 1.0), Trajectory((context(),), 1.0))
    assert verdict(flat).kind == "accept"
    assert verdict(flat, rules=replace(RULES, skip_zero_variance=True)).kind == "skip"
