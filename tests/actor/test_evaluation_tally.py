"""The sums of an evaluation, against NumPy and against all subsets."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actor.evaluation.samples import Sample, failed_sample
from actor.evaluation.tally import Tally, expected_best
from protocol.evaluation import EvaluationPlan
from protocol.types import Question, Status


def sample(cursor: int, number: int, reward: float | None) -> Sample:
    if reward is None:
        return failed_sample(Question("q", "", ()), "the retriever timed out", cursor=cursor, sample=number)
    return Sample(
        cursor=cursor,
        sample=number,
        id="q",
        question="",
        answers=(),
        answer="",
        status=Status.COMPLETED,
        reason="",
        reward=reward,
        parts={"em": reward},
        stats={},
        versions=("v",),
        num_contexts=1,
        num_tokens=10,
    )


def tally(rewards: list[list[float | None]], *, order: random.Random | None = None) -> Tally:
    plan = EvaluationPlan(engines=("http://127.0.0.1:1",), samples=len(rewards[0]))
    result = Tally(plan, num_questions=len(rewards))
    samples = [sample(q, i, reward) for q, row in enumerate(rewards) for i, reward in enumerate(row)]
    if order is not None:
        order.shuffle(samples)
    for each in samples:
        result.add(each)
    return result


@given(
    st.lists(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=3, max_size=3), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_means_are_over_questions_and_do_not_depend_on_the_order(
    rewards: list[list[float | None]], order: random.Random
) -> None:
    report = tally(rewards).report(complete=True)
    assert tally(rewards, order=order).report(complete=True) == report
    valid = [[reward for reward in row if reward is not None] for row in rewards]
    means = [np.mean(row) for row in valid if row]
    if not means:
        assert report.reward is None
        return
    assert report.reward is not None
    assert report.reward.num_questions == len(means)
    assert report.reward.mean == pytest.approx(np.mean(means), abs=1e-6)
    stderr = np.std(means, ddof=1) / np.sqrt(len(means)) if len(means) > 1 else None
    assert report.reward.stderr == (None if stderr is None else pytest.approx(stderr, abs=1e-6))
    assert report.num_failed == sum(reward is None for row in rewards for reward in row)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(1, 6))
def test_best_of_k_is_the_mean_over_all_subsets(rewards: list[float], k: int) -> None:
    k = min(k, len(rewards))
    expected = np.mean([max(subset) for subset in combinations(rewards, k)])
    assert float(expected_best(rewards, k)) == pytest.approx(expected, abs=1e-9)


def test_pass_at_k_of_0_and_1() -> None:
    """One right of four samples: the right one is in half of the pairs."""
    report = tally([[1.0, 0.0, 0.0, 0.0]] * 2).report(complete=True)
    assert {k: estimate.mean for k, estimate in report.best_of.items()} == {2: 0.5, 4: 1.0}


def test_a_question_with_too_few_valid_samples_is_not_in_best_of() -> None:
    report = tally([[1.0, None], [0.0, 0.0]]).report(complete=True)
    assert report.best_of[2].num_questions == 1
    assert report.best_of[2].mean == 0.0
