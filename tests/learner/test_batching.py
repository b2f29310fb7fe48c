from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from learner.batch.flatten import aggregation_weights, flatten
from protocol.errors import MalformedMessage
from protocol.types import Status
from tests.learner.reference import Token, tokens_of
from tests.learner.tiny import group


def test_columns_follow_the_order_of_contexts() -> None:
    failed = (Status.COMPLETED, Status.FAILED, Status.COMPLETED, Status.COMPLETED)
    groups = [group(0, versions=(1, 2)), group(1, statuses=failed, versions=(3,))]
    batch = flatten(groups)
    counted = [t for g in groups for t in g.trajectories if t.status is not Status.FAILED]
    wanted: list[Token] = list(tokens_of([(t, 0.0) for t in counted]))
    found = batch.sampled
    assert batch.num_trajectories == 7
    assert found.trajectory.tolist() == [t.trajectory for t in wanted]
    assert found.context.tolist() == [t.context for t in wanted]
    assert found.position.tolist() == [t.position for t in wanted]
    assert found.version.tolist() == [t.version for t in wanted]
    assert found.behavior_logprob.tolist() == [t.behavior for t in wanted]
    assert found.token_id.tolist() == [t.source.token_ids[t.position] for t in wanted]
    assert batch.reward.tolist() == [t.reward for t in counted]
    assert batch.group.tolist() == [0] * 4 + [1] * 3
    assert batch.trajectory.tolist() == [i for i, t in enumerate(counted) for _ in t.contexts]
    contexts = [c for t in counted for c in t.contexts]
    assert batch.turn.tolist() == [c.turn for c in contexts]
    assert (batch.role, batch.policy) == (("agent",) * len(contexts), ("main",) * len(contexts))
    assert batch.context_reward.tolist() == [c.reward for c in contexts]


def test_aggregation_weights_on_hand_computed_values() -> None:
    """Trajectory 0 has contexts of 2 and 1 tokens, trajectory 2 one of 1; trajectory 1 sampled nothing."""
    trajectory, context = np.array([0, 0, 0, 2]), np.array([0, 0, 1, 3])

    def weights(aggregation: str) -> list[float]:
        return aggregation_weights(trajectory, context, aggregation=aggregation, constant=4.0).tolist()  # pyright: ignore[reportArgumentType]

    assert weights("token") == [1 / 4] * 4
    assert weights("trajectory") == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert weights("context") == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    assert weights("constant") == pytest.approx([1 / 8] * 4)
    assert aggregation_weights(trajectory[:0], context[:0], aggregation="token").tolist() == []


def test_last_context_only_keeps_one_context_per_trajectory() -> None:
    groups = [group(0)]
    batch = flatten(groups, last_context_only=True)
    assert batch.num_contexts == 4
    assert len(batch.sampled) == sum(t.contexts[-1].num_trained_tokens for t in groups[0].trajectories)


def test_a_sampled_first_token_and_incomplete_version_spans_are_refused() -> None:
    one = group(0, num_contexts=(1,), rewards=(1.0,))
    context = one.trajectories[0].contexts[0]
    mask = context.loss_mask.copy()
    mask[0] = True
    spans = (context.policy_versions[0]._replace(start=0, end=1), *context.policy_versions)
    for wrong, message in (
        (dataclasses.replace(context, loss_mask=mask, policy_versions=spans), r"loss_mask\[0\] must be false"),
        (dataclasses.replace(context, loss_mask=mask), "version spans must cover"),
    ):
        trajectory = dataclasses.replace(one.trajectories[0], contexts=(wrong,))
        with pytest.raises(MalformedMessage, match=message):
            flatten([dataclasses.replace(one, trajectories=(trajectory,))])


def test_no_groups_give_an_empty_batch() -> None:
    batch = flatten([])
    assert (batch.num_contexts, batch.num_trajectories, len(batch.sampled)) == (0, 0, 0)
