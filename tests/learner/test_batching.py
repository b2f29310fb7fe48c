from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batching import Batch, MicroBatch, aggregation_weights, flatten, make_micro_batches, make_minibatches
from protocol.errors import MalformedMessage
from protocol.types import Status, TrajectoryGroup
from tests.learner.reference import Token, tokens_of
from tests.learner.tiny import group


def batch_of(groups: list[TrajectoryGroup], **options: bool) -> Batch:
    return flatten(groups, [np.arange(len(g.trajectories), dtype=float) for g in groups], **options)


def read_back(micro_batch: MicroBatch) -> dict[tuple[int, int], tuple[int, ...]]:
    """(context, position) -> the ids that the token's log-prob is conditioned on, and its own."""
    tokens = micro_batch.tokens
    return {
        (int(c), int(t)): (*micro_batch.token_ids[r, :t].tolist(), int(i))
        for c, t, r, i in zip(tokens.context, tokens.position, micro_batch.row, tokens.token_id, strict=True)
    }


def test_columns_are_those_of_the_contexts_in_order() -> None:
    failed = (Status.COMPLETED, Status.FAILED, Status.COMPLETED, Status.COMPLETED)
    groups = [group(0, versions=(1, 2)), group(1, statuses=failed, versions=(3,))]
    batch = batch_of(groups)
    everyone = [(t, float(n)) for g in groups for n, t in enumerate(g.trajectories)]
    counted = [(t, a) for t, a in everyone if t.status is not Status.FAILED]
    wanted: list[Token] = list(tokens_of(counted))
    found = batch.sampled
    assert batch.num_trajectories == 7
    assert found.trajectory.tolist() == [t.trajectory for t in wanted]
    assert found.context.tolist() == [t.context for t in wanted]
    assert found.position.tolist() == [t.position for t in wanted]
    assert found.version.tolist() == [t.version for t in wanted]
    assert found.advantage.tolist() == [t.advantage for t in wanted]
    assert found.behavior_logprob.tolist() == [t.behavior for t in wanted]
    assert found.token_id.tolist() == [t.source.token_ids[t.position] for t in wanted]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(1, 400))
def test_every_token_is_in_one_micro_batch_with_its_own_past(seed: int, budget: int) -> None:
    groups = [group(seed), group(seed + 1)]
    batch = batch_of(groups)
    weight = np.arange(len(batch.sampled), dtype=np.float32)
    parts = make_micro_batches(batch, tokens=batch.sampled, weight=weight, tokens_per_micro_batch=budget)
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for part in parts:
        assert part.token_ids.size <= budget or len(part.token_ids) == 1
        assert not seen.keys() & read_back(part).keys()
        seen |= read_back(part)
    contexts = [c for g in groups for c in g.contexts()]
    wanted = {
        (k, t): tuple(c.token_ids[: t + 1].tolist())
        for k, c in enumerate(contexts)
        for t in np.flatnonzero(c.loss_mask)
    }
    assert seen == wanted
    assert sorted(w for part in parts for w in part.weight.tolist()) == weight.tolist()


def test_sorting_keeps_padding_low() -> None:
    batch = batch_of([group(seed, lengths=(4, 200)) for seed in range(16)])
    weight = np.ones(len(batch.sampled), dtype=np.float32)
    parts = make_micro_batches(batch, tokens=batch.sampled, weight=weight, tokens_per_micro_batch=1024)
    real = sum(part.num_input_tokens for part in parts)
    assert real / sum(part.token_ids.size for part in parts) > 0.9


def test_contexts_are_cut_before_their_last_trained_token_and_untrained_ones_are_left_out() -> None:
    one = group(0, num_contexts=(2, 1), rewards=(1.0, 0.0), versions=(5,))
    first = one.trajectories[0].contexts[0]
    old = dataclasses.replace(
        first, policy_versions=tuple(dataclasses.replace(span, version=0) for span in first.policy_versions)
    )
    trajectory = dataclasses.replace(one.trajectories[0], contexts=(old, one.trajectories[0].contexts[1]))
    batch = batch_of([dataclasses.replace(one, trajectories=(trajectory, one.trajectories[1]))])
    (minibatch,) = make_minibatches(
        batch,
        num_minibatches=1,
        tokens_per_micro_batch=1000,
        aggregation="token",
        constant=1.0,
        oldest_version=3,
        newest_version=5,
    )
    (part,) = minibatch.micro_batches
    assert len(part.token_ids) == 2
    assert minibatch.num_over_age == first.num_trained_tokens
    assert part.token_ids.shape[1] == part.tokens.position.max()


def test_minibatches_split_by_trajectory_in_lease_order() -> None:
    batch = batch_of([group(0), group(1)])
    parts = make_minibatches(
        batch,
        num_minibatches=3,
        tokens_per_micro_batch=100,
        aggregation="trajectory",
        constant=1.0,
        oldest_version=0,
        newest_version=0,
    )
    owners = [sorted({int(t) for m in part.micro_batches for t in m.tokens.trajectory}) for part in parts]
    assert owners == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [sum(float(m.weight.sum()) for m in part.micro_batches) for part in parts] == pytest.approx([1.0] * 3)


def test_aggregations_by_hand() -> None:
    """Trajectory 0 has contexts of 2 and 1 tokens, trajectory 2 one of 1; trajectory 1 sampled nothing."""
    trajectory, context = np.array([0, 0, 0, 2]), np.array([0, 0, 1, 3])

    def weights(aggregation: str) -> list[float]:
        return aggregation_weights(trajectory, context, aggregation=aggregation, constant=4.0).tolist()  # pyright: ignore[reportArgumentType]

    assert weights("token") == [1 / 4] * 4
    assert weights("trajectory") == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert weights("context") == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert weights("constant") == pytest.approx([1 / 8] * 4)
    assert aggregation_weights(trajectory[:0], context[:0], aggregation="token").tolist() == []


def test_the_last_context_alone() -> None:
    groups = [group(0)]
    batch = batch_of(groups, last_context_only=True)
    assert batch.num_contexts == 4
    assert len(batch.sampled) == sum(t.contexts[-1].num_trained_tokens for t in groups[0].trajectories)


def test_a_first_token_that_was_sampled_is_refused() -> None:
    one = group(0, num_contexts=(1,), rewards=(1.0,))
    context = one.trajectories[0].contexts[0]
    mask = context.loss_mask.copy()
    mask[0] = True
    spans = (dataclasses.replace(context.policy_versions[0], start=0, end=1), *context.policy_versions)
    for wrong, message in (
        (dataclasses.replace(context, loss_mask=mask, policy_versions=spans), r"loss_mask\[0\] must be false"),
        (dataclasses.replace(context, loss_mask=mask), "version spans must cover"),
    ):
        trajectory = dataclasses.replace(one.trajectories[0], contexts=(wrong,))
        with pytest.raises(MalformedMessage, match=message):
            batch_of([dataclasses.replace(one, trajectories=(trajectory,))])


def test_nothing_gives_nothing() -> None:
    batch = flatten([], [])
    assert (batch.num_contexts, batch.num_trajectories, len(batch.sampled)) == (0, 0, 0)
