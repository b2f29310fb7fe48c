"""Every trained token is in exactly one micro-batch, with its own prefix and weight."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch.flatten import Batch, flatten
from learner.batch.microbatches import MicroBatch, StepPlan, make_micro_batches, make_plan
from protocol.types import TrajectoryGroup
from tests.learner.properties import deterministic
from tests.learner.tiny import group


def plan_of(batch: Batch, **options: object) -> StepPlan:
    defaults = {
        "num_minibatches": 1,
        "tokens_per_micro_batch": 1000,
        "aggregation": "trajectory",
        "constant": 1.0,
        "oldest_version": 0,
        "newest_version": 5,
    }
    return make_plan(batch, **defaults | options)  # pyright: ignore[reportArgumentType]


def read_back(batch: Batch, part: MicroBatch) -> dict[tuple[int, int], tuple[int, ...]]:
    """(context, position) -> the ids that the token's log-prob is conditioned on, and its own id."""
    found = {}
    for token, pair in zip(part.tokens, part.placement.gather, strict=True):
        source = int(part.placement.source[pair])
        past = [j for j in range(source + 1) if source < part.pack.subtree_end[j]]
        assert part.pack.depth[past].tolist() == list(range(len(past)))
        ids = (*part.pack.token_ids[past].tolist(), int(part.placement.target[pair]))
        found[int(batch.sampled.context[token]), int(batch.sampled.position[token])] = ids
    return found


def with_common_prefix(one: TrajectoryGroup, length: int = 12) -> TrajectoryGroup:
    """Puts the same unsampled tokens before every context."""
    prompt = np.arange(length, dtype=np.int32)

    def extended(context):
        spans = tuple(s._replace(start=s.start + length, end=s.end + length) for s in context.policy_versions)
        return dataclasses.replace(
            context,
            token_ids=np.concatenate([prompt, context.token_ids]),
            loss_mask=np.concatenate([np.zeros(length, dtype=np.bool_), context.loss_mask]),
            behavior_logprobs=np.concatenate([np.zeros(length, dtype=np.float32), context.behavior_logprobs]),
            policy_versions=spans,
        )

    trajectories = tuple(
        dataclasses.replace(t, contexts=tuple(extended(c) for c in t.contexts)) for t in one.trajectories
    )
    return dataclasses.replace(one, trajectories=trajectories)


@settings(deterministic, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    budget=st.integers(1, 400),
    num_ranks=st.integers(1, 3),
    share=st.sampled_from(["auto", True, False]),
)
def test_every_token_is_in_one_micro_batch_with_its_own_prefix(
    seed: int, budget: int, num_ranks: int, share: str | bool
) -> None:
    groups = [with_common_prefix(group(seed)), group(seed + 1)]
    batch = flatten(groups)
    everything = np.arange(len(batch.sampled))
    by_rank = [
        make_micro_batches(
            batch,
            tokens=everything,
            tokens_per_micro_batch=budget,
            share=share,  # pyright: ignore[reportArgumentType]
            rank=rank,
            num_ranks=num_ranks,
        )
        for rank in range(num_ranks)
    ]
    assert len({len(parts) for parts in by_rank}) == 1
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for part in [part for parts in by_rank for part in parts]:
        assert part.pack.num_unique_tokens <= budget or part.num_contexts <= 1
        assert not seen.keys() & read_back(batch, part).keys()
        seen |= read_back(batch, part)
    contexts = [c for g in groups for c in g.contexts()]
    wanted = {
        (k, t): tuple(c.token_ids[: t + 1].tolist())
        for k, c in enumerate(contexts)
        for t in np.flatnonzero(c.loss_mask)
    }
    assert seen == wanted


def test_common_prefixes_are_computed_once() -> None:
    batch = flatten([with_common_prefix(group(0), length=64)])
    (shared,) = plan_of(batch).minibatches[0]
    (apart,) = plan_of(batch, share=False).minibatches[0]
    assert shared.pack.num_total_tokens == apart.pack.num_unique_tokens
    assert apart.pack.num_unique_tokens - shared.pack.num_unique_tokens == 64 * (batch.num_contexts - 1)


def test_contexts_end_before_their_last_trained_token_and_untrained_ones_are_left_out() -> None:
    one = group(0, num_contexts=(2, 1), rewards=(1.0, 0.0), versions=(5,))
    first = one.trajectories[0].contexts[0]
    old = dataclasses.replace(first, policy_versions=tuple(span._replace(version=0) for span in first.policy_versions))
    trajectory = dataclasses.replace(one.trajectories[0], contexts=(old, one.trajectories[0].contexts[1]))
    batch = flatten([dataclasses.replace(one, trajectories=(trajectory, one.trajectories[1]))])
    plan = plan_of(batch, aggregation="token", oldest_version=3)
    (part,) = plan.minibatches[0]
    assert part.num_contexts == 2
    assert plan.num_over_age == first.num_trained_tokens
    assert plan.weight == pytest.approx(1 / len(batch.sampled)), "masked tokens keep their part of the denominator"
    last = [batch.sampled.position[batch.sampled.context == c].max() for c in (1, 2)]
    assert part.pack.num_total_tokens == sum(last)


def test_minibatches_split_by_trajectory_in_lease_order() -> None:
    batch = flatten([group(0), group(1)])
    plan = plan_of(batch, num_minibatches=3, tokens_per_micro_batch=100)
    tokens = [np.concatenate([m.tokens for m in part]) for part in plan.minibatches]
    owners = [sorted(set(batch.sampled.trajectory[each].tolist())) for each in tokens]
    assert owners == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [float(plan.weight[each].sum()) for each in tokens] == pytest.approx([1.0] * 3)


def test_a_batch_without_tokens_has_a_plan() -> None:
    plan = plan_of(flatten([]))
    assert sum(len(m.tokens) for part in plan.minibatches for m in part) == 0
