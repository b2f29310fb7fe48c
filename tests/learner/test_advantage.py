from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.advantages import (
    Credit,
    grpo_advantages,
    maxrl_advantages,
    rewards_differ,
    rloo_advantages,
)
from learner.algorithms.returns import discounted_sums, generalized_advantages, whitened
from protocol.algorithm_config import ADVANTAGE_OPTIONS
from protocol.errors import ConfigError
from tests.learner.configs import advantage_config, advantages_of
from tests.learner.properties import deterministic
from tests.learner.reference import reference_token_advantages

ESTIMATORS = tuple(ADVANTAGE_OPTIONS)


def credit_of(seed: int, *, num_trajectories: int | None = None, max_tokens: int = 4) -> Credit:
    """A batch of groups of different sizes; contexts of two roles and policies, some without a sampled token."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(0, 7)) if num_trajectories is None else num_trajectories
    owner = np.repeat(np.arange(num), rng.integers(1, 4, size=num))
    context = np.repeat(np.arange(len(owner)), rng.integers(0, max_tokens + 1, size=len(owner)))
    role = rng.integers(0, 2, size=len(owner))
    return Credit(
        reward=rng.choice([0.0, 0.25, 1.0], size=num),
        group=np.sort(rng.integers(0, 3, size=num)),
        owner=owner,
        role=role,
        turn=rng.integers(0, 2, size=len(owner)),
        trajectory=owner[context],
        context=context,
        policy=role[context],
        roles=("memory-manager", "answerer"),
        context_reward=rng.choice([0.0, 0.5, 1.0], size=len(owner)),
    )


def test_the_baseline_is_over_trajectories_not_contexts() -> None:
    """Rewards [1 with 3 contexts, 0 with 1 context]: the baseline is 0.5."""
    credit = dataclasses.replace(
        credit_of(0, num_trajectories=0),
        reward=np.array([1.0, 0.0]),
        group=np.array([0, 0]),
        owner=np.array([0, 0, 0, 1]),
        role=np.zeros(4, dtype=np.int64),
        turn=np.array([0, 1, 2, 0]),
        trajectory=np.array([0, 0, 0, 0, 1]),
        context=np.array([0, 1, 1, 2, 3]),
        policy=np.zeros(5, dtype=np.int64),
    )
    found = advantages_of(credit, advantage_config(normalize_std=False))
    assert found.advantage.tolist() == [0.5, 0.5, 0.5, 0.5, -0.5]
    assert found.advantage.dtype == np.float32
    assert found.returns is None


@pytest.mark.parametrize(("estimator", "context_rewards"), itertools.product(ESTIMATORS, ("none", "add")))
@settings(deterministic, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    lam=st.sampled_from([0.0, 0.9, 1.0]),
    flag=st.booleans(),
    with_penalty=st.booleans(),
)
def test_token_advantages_equal_the_reference(
    estimator: str, context_rewards: str, seed: int, gamma: float, lam: float, flag: bool, with_penalty: bool
) -> None:
    credit = credit_of(seed)
    rng = np.random.default_rng(seed)
    values, penalty = rng.normal(size=(2, len(credit.trajectory)))
    options = {"gamma": gamma, "lam": lam, "whiten": flag, "normalize_std": flag, "eps": 1e-3}
    config = advantage_config(
        use=estimator,
        context_rewards=context_rewards,
        role_weights={"answerer": 0.25, "other": 9.0},
        **{name: value for name, value in options.items() if name in ADVANTAGE_OPTIONS[estimator].model_fields},
    )
    penalty = penalty * 0.1 if with_penalty and estimator != "maxrl" else None
    found = advantages_of(credit, config, values=values, kl_penalty=penalty)
    wanted, returns = reference_token_advantages(
        credit, config, values=values.tolist(), penalty=None if penalty is None else penalty.tolist()
    )
    np.testing.assert_allclose(found.advantage, wanted, rtol=1e-5, atol=1e-5)
    assert (found.returns is None) == (returns is None)
    if found.returns is not None and returns is not None:
        np.testing.assert_allclose(found.returns, np.array(returns), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [1.0], [0.0], []])
def test_equal_rewards_give_advantage_exactly_zero(estimator: str, rewards: list[float]) -> None:
    """One token each: equal rewards, a group of one, no trajectory. A batch of one token is not whitened."""
    num = len(rewards)
    index = np.arange(num)
    nothing = np.zeros(num, dtype=np.int64)
    credit = Credit(np.array(rewards), nothing, index, nothing, nothing, index, index, nothing, ("agent",))
    config = advantage_config(use=estimator)
    found = advantages_of(credit, config, values=np.zeros(num)).advantage
    along_tokens = estimator in ("gae", "reinforce_pp")
    assert found.tolist() == (rewards if along_tokens and num == 1 else [0.0] * num)
    assert not rewards_differ(rewards)


def test_trajectories_without_sampled_tokens_count_only_in_their_group() -> None:
    nothing = np.zeros(1, dtype=np.int64)
    credit = Credit(
        np.array([1.0, 0.0]), np.array([0, 0]), np.arange(2), np.zeros(2, dtype=np.int64),
        np.zeros(2, dtype=np.int64), nothing, nothing, nothing, ("agent",),
    )  # fmt: skip
    assert advantages_of(credit, advantage_config(use="rloo")).advantage.tolist() == [1.0]
    found = advantages_of(credit, advantage_config(use="gae"), values=[0.25])
    assert found.returns is not None
    assert (found.advantage.tolist(), found.returns.tolist()) == ([0.75], [1.0])


def test_group_estimators_on_hand_computed_values() -> None:
    assert grpo_advantages([1.0, 0.0, 0.0, 0.0], normalize_std=False).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert rloo_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert maxrl_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([3.0, -1.0, -1.0, -1.0], rel=1e-5)
    assert maxrl_advantages([-1.0, 0.0]).tolist() == [0.0, 0.0]


def test_gae_chains_cross_contexts_and_separate_policies() -> None:
    """Two chains, interleaved: 0, 2, 3 and 1, 4."""
    chain = np.array([0, 1, 0, 0, 1])
    rewards, values = np.array([0.0, 0.0, 0.0, 8.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    advantages, returns = generalized_advantages(rewards, values, chain, gamma=0.5, lam=0.5)
    last, before = 8.0 - 4.0, 0.5 * 4.0 - 3.0
    first = 0.5 * 3.0 - 1.0
    wanted = [first + 0.25 * (before + 0.25 * last), 0.5 * 5.0 - 2.0 + 0.25 * -1.0, before + 0.25 * last, last, -1.0]
    assert advantages == pytest.approx(wanted)
    assert returns == pytest.approx(np.array(wanted) + values)
    assert discounted_sums(rewards, chain, discount=0.5).tolist() == [2.0, 2.0, 4.0, 8.0, 4.0]


def test_whitening() -> None:
    assert whitened(np.array([1.0, 3.0]), eps=1e-9) == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert whitened(np.array([0.1] * 7), eps=1e-9).tolist() == [0.0] * 7
    assert whitened(np.array([5.0]), eps=1e-9).tolist() == [5.0]
    assert whitened(np.zeros(0), eps=1e-9).tolist() == []


def test_missing_inputs_are_refused_by_name() -> None:
    credit = dataclasses.replace(credit_of(1, num_trajectories=3), context_reward=None)
    with pytest.raises(ConfigError, match=r"learner.advantage.context_rewards must be 'none' .*, got 'add'"):
        advantages_of(credit, advantage_config(context_rewards="add"))
    with pytest.raises(ValueError, match=r"gae needs values \[N\], got None"):
        advantages_of(credit, advantage_config(use="gae"))
