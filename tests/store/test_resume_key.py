"""Which config keys may change when a run is resumed."""

from __future__ import annotations

import pytest

from learner.store.resume_key import resume_key
from protocol.config import Config


def config(**learner: object) -> Config:
    tree = {"model": {"path": "m"}, "task": {"use": "toy", "worlds": [1]}, "learner": learner}
    return Config.model_validate(tree)


@pytest.mark.parametrize("change", [{"torch_threads": 4}, {"tokens_per_micro_batch": 5}, {"lease_timeout_s": 3.0}])
def test_placement_and_speed_may_change(change: dict[str, object]) -> None:
    assert resume_key(config(**change)) == resume_key(config())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"group_size": 4}, "group_size"),
        ({"staleness_bound": 1}, "staleness_bound"),
        ({"loss": {"aggregation": "token"}}, "learner.loss"),
        ({"optimizer": {"learning_rate": 0.5}}, "learner.optimizer"),
        ({"ablation": "last-context"}, "ablation"),
        ({"check_drift": True}, "learner.check_drift"),
        ({"lora": {"rank": 4}}, "learner.lora"),
        ({"reference": "other"}, "learner.reference"),
    ],
)
def test_what_is_trained_may_not_change(change: dict[str, object], key: str) -> None:
    before, after = resume_key(config()), resume_key(config(**change))
    assert [name for name in before if before[name] != after[name]] == [key]


def test_num_steps_may_change_unless_the_schedule_depends_on_it() -> None:
    assert resume_key(config(num_steps=5)) == resume_key(config(num_steps=9))
    linear = {"schedule": "linear"}
    assert resume_key(config(num_steps=5, optimizer=linear)) != resume_key(config(num_steps=9, optimizer=linear))
