from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantage import group_advantages, grpo_advantages, has_signal
from protocol.config import AdvantageConfig
from protocol.types import Status
from tests.learner.reference import reference_advantages
from tests.learner.tiny import group

REWARDS = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12)


def test_the_baseline_counts_trajectories_and_not_contexts() -> None:
    one = group(0, num_contexts=(3, 1), rewards=(1.0, 0.0))
    centred = group_advantages(one, AdvantageConfig(normalize_std=False))
    assert centred.tolist() == [0.5, -0.5]


@given(REWARDS)
def test_equals_the_reference(rewards: list[float]) -> None:
    one = group(0, num_contexts=(1,) * len(rewards), rewards=tuple(rewards))
    for ddof in (0, 1):
        found = group_advantages(one, AdvantageConfig(ddof=ddof))  # pyright: ignore[reportArgumentType]
        np.testing.assert_allclose(found, reference_advantages(one, ddof=ddof), rtol=1e-9, atol=1e-6)


@given(REWARDS, st.integers(0, 12))
def test_failed_trajectories_change_nothing(rewards: list[float], at: int) -> None:
    at = min(at, len(rewards))
    wanted = grpo_advantages(rewards, [True] * len(rewards))
    valid = [True] * len(rewards)
    found = grpo_advantages([*rewards[:at], float("nan"), *rewards[at:]], [*valid[:at], False, *valid[at:]])
    assert found[at] == 0.0
    np.testing.assert_array_equal(np.delete(found, at), wanted)


@pytest.mark.parametrize(
    ("rewards", "valid"),
    [([0.1] * 7, [True] * 7), ([1.0], [True]), ([1.0, 0.0], [True, False]), ([1.0, 0.0], [False, False]), ([], [])],
)
def test_no_signal_is_exactly_zero(rewards: list[float], valid: list[bool]) -> None:
    assert not has_signal(rewards, valid)
    assert not grpo_advantages(rewards, valid).any()


def test_a_group_with_failures_uses_the_others() -> None:
    statuses = (Status.COMPLETED, Status.FAILED, Status.OVER_BUDGET, Status.FORMAT_ERROR)
    one = group(0, rewards=(1.0, 5.0, 0.0, 0.0), statuses=statuses)
    found = group_advantages(one, AdvantageConfig())
    kept = tuple(t for t in one.trajectories if t.status is not Status.FAILED)
    wanted = group_advantages(dataclasses.replace(one, trajectories=kept), AdvantageConfig())
    np.testing.assert_array_equal(found[[0, 2, 3]], wanted)
    assert found[1] == 0.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\[G\] alike"):
        grpo_advantages([1.0, 2.0], [True])
