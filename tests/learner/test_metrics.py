from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.metrics.tensorboard import TensorBoardWriter, render_trajectory, summarise_rollouts
from learner.model.loading import Policy
from learner.training.trainer import Trainer
from protocol.config import LearnerConfig
from protocol.types import Status
from tests.learner.tiny import group, tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
PROMISED = {
    "reward/mean",
    "reward/em",
    "staleness/mean",
    "staleness/max",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/kl_behavior",
    "policy/importance_weight_mean",
    "rollout/tokens_per_s",
    "rollout/turns",
    "rollout/context_tokens",
    "learner/step_s",
    "learner/wait_s",
    "learner/tokens_per_s",
    "queue/buffered_groups",
}


@pytest.fixture
def events(tmp_path: Path) -> EventAccumulator:
    groups = [group(0, versions=(3, 5))]
    metrics = Trainer(policy=Policy(model=tiny_model(), tokenizer_files=()), config=LearnerConfig()).train_step(
        groups, step=5
    )
    writer = TensorBoardWriter(tmp_path)
    writer.step(metrics)
    writer.rollouts(summarise_rollouts(groups), step=5)
    writer.scalars({"rollout/tokens_per_s": 1.0, "learner/wait_s": 2.0, "queue/buffered_groups": 3.0}, step=5)
    text = render_trajectory(groups[0].trajectories[1], ["w1 w2"], question="what is w1 ?")
    writer.trajectory("0", text, step=5)
    writer.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    return accumulator


def test_every_promised_tag_is_written_and_every_written_one_is_explained(events: EventAccumulator) -> None:
    tags = set(events.Tags()["scalars"])
    assert tags >= PROMISED
    explained = DOCS.read_text()
    measured = tags - {"reward/em", "rollout/num_searches", "queue/buffered_groups"} | {"staleness/histogram"}
    measured = {re.sub(r"_age_\d+$", "_age_<a>", re.sub(r"_context_\d+$", "_context_<k>", tag)) for tag in measured}
    assert {tag for tag in measured if f"`{tag}`" not in explained} == set()


def test_values_arrive(events: EventAccumulator) -> None:
    (reward,) = events.Scalars("reward/mean")
    assert (reward.step, reward.value) == (5, pytest.approx(0.375))
    (oldest,) = events.Scalars("staleness/max")
    assert oldest.value == 2
    (ages,) = events.Histograms("staleness/histogram")
    held = dict(zip(ages.histogram_value.bucket_limit, ages.histogram_value.bucket, strict=True))
    assert held.keys() == {0.5, 1.5, 2.5}
    assert held[1.5] == 0
    assert min(held[0.5], held[2.5]) > 0
    assert sum(held.values()) == ages.histogram_value.num
    (text,) = events.Tensors("trajectories/0/text_summary")
    assert b"what is w1 ?" in text.tensor_proto.string_val[0]


def test_rollouts_are_summarised_without_failures() -> None:
    statuses = (Status.COMPLETED, Status.FAILED, Status.COMPLETED, Status.COMPLETED)
    one = group(0, num_contexts=(3, 1, 2, 4), rewards=(1.0, 9.0, 0.5, 0.0), statuses=statuses)
    flat = group(1, rewards=(1.0, 1.0, 1.0, 1.0))
    found = summarise_rollouts([one, flat])
    assert found.reward_mean == pytest.approx((1.5 + 4.0) / 7)
    assert found.reward_parts == pytest.approx({"em": (1.5 + 4.0) / 7})
    assert found.turns == pytest.approx((9 + 10) / 7)
    assert found.failed_fraction == pytest.approx(1 / 8)
    assert found.zero_variance_fraction == 0.5
    empty = summarise_rollouts([group(0, statuses=(Status.FAILED,) * 4)])
    assert (empty.reward_mean, empty.turns, empty.context_tokens, empty.failed_fraction) == (0.0, 0.0, 0.0, 1.0)
    assert dataclasses.asdict(summarise_rollouts([]))["num_trajectories"] == 0
