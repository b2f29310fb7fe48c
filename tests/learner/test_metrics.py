"""Every metric that is written is declared, every declared one is written, and the values are right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from learner.metrics.catalogue import CATALOGUE, missing, undeclared
from learner.metrics.document import render
from learner.metrics.drift import Drift, Mean
from learner.metrics.layout import metric_name, tensorboard_tag
from learner.metrics.metrics_writer import MetricsWriter
from learner.metrics.peer_metrics import QUEUE_METRICS
from learner.metrics.rollout_metrics import rollout_metrics
from learner.model.loading import Policy
from learner.training.trainer import Trainer
from protocol.learner_config import LearnerConfig
from protocol.metric import Metric
from protocol.types import Status, TrajectoryGroup
from tests.learner.configs import advantage_config, loss_config
from tests.learner.tiny import group, save_tiny_model, tiny_model
from tests.network.peers import Setting, open_network

LEARNER_SECTIONS = ("reward", "staleness", "policy", "rollout", "learner", "trajectories")
STEP = 10
"""A step whose trajectories are written as text."""


def record(folder: Path, config: LearnerConfig, groups: Sequence[TrajectoryGroup]) -> EventAccumulator:
    """Trains one step on `groups`; returns its TensorBoard events. folder/run/metrics.jsonl has the same step."""
    model = save_tiny_model(folder / "model")
    (folder / "run").mkdir()
    reference = Policy(model=tiny_model(seed=1), tokenizer_files=()) if config.loss.kl_coefficient else None
    trainer = Trainer(policy=Policy(model=tiny_model(), tokenizer_files=()), config=config, reference=reference)
    stepped = trainer.train_step(groups, step=STEP)
    with MetricsWriter(folder / "run", step=STEP, tokenizer_folder=model, staleness_bound=2) as writer:
        gauges = {"queue/buffered": 3.0}
        writer.record(stepped, groups, wait_s=2.0, publish_s=1.0, num_checkpoint_failures=0, gauges=gauges)
    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    return events


def tags_of(events: EventAccumulator) -> set[str]:
    """The names of the metrics in `events`."""
    tags = events.Tags()
    texts = (tag.removesuffix("/text_summary") for tag in tags["tensors"] if tag.endswith("/text_summary"))
    return {metric_name(tag) for tag in (*tags["scalars"], *tags["histograms"], *texts)}


def test_every_tag_is_declared_and_every_declared_metric_is_written(tmp_path: Path) -> None:
    events = record(tmp_path, LearnerConfig(), [group(0, versions=(STEP - 2, STEP))])
    tags = tags_of(events)
    assert undeclared(tags) == set()
    assert missing(tags, sections=LEARNER_SECTIONS) == set()
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row.keys() == set(map(metric_name, events.Tags()["scalars"])) | {
        "time",
        "step",
        "tokens_by_age",
        "tokens_by_context",
    }


def test_metrics_of_optional_parts_of_a_step_are_declared_and_written(tmp_path: Path) -> None:
    """A reference policy, a value head and several minibatches: all but the MFU of a known device and the texts about
    failures and first samples, which the learner's loop writes."""
    config = LearnerConfig(advantage=advantage_config(use="gae"), loss=loss_config(kl_coefficient=0.1, minibatches=2))
    tags = tags_of(record(tmp_path, config, [group(0, versions=(STEP,))]))
    assert undeclared(tags) == set()
    every = [metric for metric in CATALOGUE if metric.section in ("staleness", "policy", "learner", "trajectories")]
    assert {metric.name for metric in every if not any(map(metric.matches, tags))} == {
        "learner/mfu",
        "trajectories/failures",
        "trajectories/first_samples",
    }


def test_the_coordinators_gauges_are_the_declared_ones(tmp_path: Path) -> None:
    with open_network(Setting(tmp_path)) as network:
        gauges = network.run(network.coordinator.gauges())
    assert set(gauges) == {metric.name for metric in QUEUE_METRICS}


def test_written_values_can_be_read_from_tensorboard(tmp_path: Path) -> None:
    events = record(tmp_path, LearnerConfig(), [group(0, versions=(STEP - 2, STEP))])
    (reward,) = events.Scalars(tensorboard_tag("reward/mean"))
    assert (reward.step, reward.value) == (STEP, pytest.approx(0.375))
    (oldest,) = events.Scalars(tensorboard_tag("staleness/max"))
    assert oldest.value == 2
    (wait_s,) = events.Scalars(tensorboard_tag("learner/wait_s"))
    assert wait_s.value == 2.0
    (ages,) = events.Histograms(tensorboard_tag("staleness/histogram"))
    held = dict(zip(ages.histogram_value.bucket_limit, ages.histogram_value.bucket, strict=True))
    assert held.keys() == {0.5, 1.5, 2.5}
    assert held[1.5] == 0
    assert min(held[0.5], held[2.5]) > 0
    assert sum(held.values()) == ages.histogram_value.num
    (text,) = events.Tensors(tensorboard_tag("trajectories/worst/text_summary"))
    markdown = text.tensor_proto.string_val[0].decode()
    assert "question  what is w1 ?\ngold      w1" in markdown
    assert "#### Context 1 (agent, start, turn 0, " in markdown
    assert "**Sampled by version 8**, " in markdown


def test_rollout_metrics_leave_failed_trajectories_out() -> None:
    statuses = (Status.COMPLETED, Status.FAILED, Status.COMPLETED, Status.COMPLETED)
    one = group(0, num_contexts=(3, 1, 2, 4), rewards=(1.0, 9.0, 0.5, 0.0), statuses=statuses)
    flat = group(1, rewards=(1.0, 1.0, 1.0, 1.0))
    counted = [each for part in (one, flat) for each in part.trajectories if each.status is not Status.FAILED]
    lengths = [len(context) for each in counted for context in each.contexts]
    assert rollout_metrics([one, flat], interval_s=2.0) == pytest.approx(
        {
            "reward/mean": (1.5 + 4.0) / 7,
            "reward/std": (sum((r - 5.5 / 7) ** 2 for r in (1.0, 0.5, 0.0, *[1.0] * 4)) / 7) ** 0.5,
            "reward/em": (1.5 + 4.0) / 7,
            "reward/zero_variance_fraction": 0.5,
            "rollout/contexts": (9 + 10) / 7,
            "rollout/num_searches": (9 + 10) / 7,
            "rollout/context_tokens": sum(lengths) / len(lengths),
            "rollout/completed_fraction": 7 / 8,
            "rollout/format_error_fraction": 0.0,
            "rollout/over_budget_fraction": 0.0,
            "rollout/failed_fraction": 1 / 8,
            "rollout/tokens_per_s": sum(each.num_trained_tokens for each in counted) / 2.0,
        }
    )


def test_rollout_metrics_without_a_counted_trajectory_are_zero() -> None:
    for groups in ([], [group(0, statuses=(Status.FAILED,) * 4)]):
        values = rollout_metrics(groups, interval_s=1.0)
        fractions = {"rollout/failed_fraction", "reward/zero_variance_fraction"}
        assert {value for tag, value in values.items() if tag not in fractions} == {0.0}
        assert all(values[tag] == bool(groups) for tag in fractions)


def test_declarations_are_complete_and_unique() -> None:
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert metric.unit, metric.name
        assert metric.reduction, metric.name
        assert metric.explanation, metric.name
        assert metric.is_family <= bool(metric.absent_if), metric.name


def test_the_document_has_one_row_per_metric() -> None:
    rows = [line.split(" | ") for line in render().splitlines() if line.startswith("| `")]
    assert [row[0].strip("| `") for row in rows] != []
    assert sorted(row[0].strip("| `") for row in rows) == sorted(metric.name for metric in CATALOGUE)
    assert {len(row) for row in rows} == {5}


@pytest.mark.parametrize(
    ("name", "tag", "is_matched"),
    [
        ("queue/running", "queue/running", True),
        ("queue/running", "queue/running_total", False),
        ("queue/running", "queueXrunning", False),
        ("policy/kl_{age}", "policy/kl_15", True),
        ("policy/kl_{age}", "policy/kl_", False),
        ("policy/kl_{age}_nats", "policy/kl_15_nats", True),
        ("policy/kl.{age}", "policy/kl_15", False),
    ],
)
def test_a_placeholder_matches_any_text(name: str, tag: str, is_matched: bool) -> None:
    metric = Metric(name=name, reduction="mean", unit="nats", explanation="")
    assert metric.matches(tag) is is_matched


def test_ages_beyond_the_last_bucket_are_counted_in_the_last_bucket_of_drift(tmp_path: Path) -> None:
    row = {"step": 0, "policy/kl_behavior": 1.0, "learner/trained_tokens": 30, "policy/kl_behavior_age_15": 1.0,
           "tokens_by_age": {"15": 10, "20": 20}, "tokens_by_context": {}}  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert Drift.read(tmp_path / "metrics.jsonl").by_age == {15: Mean(1.0, 30)}
