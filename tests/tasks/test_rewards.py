"""Metrics, format and rewards, against recorded cases of the public implementations."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actor.episode import Episode
from actor.extensions import REWARDS
from actor.rewards.format import check_chat, last_boxed
from actor.rewards.reward import Reward, Score
from actor.rewards.text import exact_match, f1, normalise
from protocol.config import RewardConfig
from protocol.errors import ConfigError
from protocol.types import Question, Status, Trajectory
from tests.actor.search_tool import chat_rendering

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PALIMPSEST_DATA", ROOT.parent / "shared" / "data"))
# The original accepts it and crashes when it reads the answer; here an unclosed box is not a box.
CRASHES_IN_THE_ORIGINAL = {"fmt-unclosed-box"}
QUESTION = Question(id="q", text="who?", answers=("Ada Lovelace", "Lovelace"))


def vectors(name: str) -> list[dict]:
    path = DATA / "vectors" / name
    if not path.exists():
        pytest.skip(f"no {path}; set PALIMPSEST_DATA to the data folder")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_match_the_recorded_cases():
    rows = vectors("qa_metric_vectors.jsonl")
    for row in rows:
        prediction, golds = row["prediction"], row["golds"]
        assert normalise(prediction) == row["norm_squad"], row["id"]
        assert exact_match(prediction, golds) == row["searchr1_em"] == row["hotpot_em"], row["id"]
        assert f1(prediction, golds) == pytest.approx(row["memsearcher_f1"], abs=1e-6), row["id"]
        assert f1(prediction, golds) == pytest.approx(row["hotpot_f1"], abs=1e-6), row["id"]
    matches = {row["searchr1_em"] for row in rows}
    assert matches == {0, 1}, "at least one right and one wrong prediction"
    assert any(0 < row["memsearcher_f1"] < 1 for row in rows), "at least one partly right prediction"
    assert any(len(row["golds"]) > 1 for row in rows), "at least one question with several answers"


def test_formats_match_the_recorded_cases():
    rows = [row for row in vectors("format_vectors.jsonl") if "memsearcher_valid" in row]
    for row in rows:
        check = check_chat(row["text"])
        if row["id"] in CRASHES_IN_THE_ORIGINAL:
            assert check.reason == "the last response is missing \\boxed"
            continue
        assert chat_rendering(fidelity="paper").format_fault(row["text"]) == (row["memsearcher_reason"] or ""), row[
            "id"
        ]
        expected = (row["memsearcher_valid"], row["memsearcher_reason"], row["memsearcher_boxed"])
        assert (check.valid, check.reason, check.boxed) == expected, row["id"]
    assert {row["memsearcher_valid"] for row in rows} == {True, False}, "at least one of each verdict"
    assert {row["id"] for row in rows} >= CRASHES_IN_THE_ORIGINAL


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_f1_is_between_0_and_1_and_normalise_is_idempotent(prediction: str, answers: list[str]):
    assert 0 <= f1(prediction, answers) <= 1
    assert exact_match(answers[0], answers) == 1
    assert normalise(normalise(prediction)) == normalise(prediction) or prediction.lower() != prediction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{a} then \boxed{b{c}{d}} end", "b{c}{d}"),
        (r"\boxed{}", ""),
        (r"\boxed{open", None),
        ("no box", None),
    ],
)
def test_the_last_box_is_read_with_balanced_braces(text: str, expected: str | None):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("name", "answer", "status", "reward"),
    [
        ("em", "the lovelace", Status.COMPLETED, 1.0),
        ("em", "Ada", Status.COMPLETED, 0.0),
        ("f1", "Ada", Status.COMPLETED, 2 / 3),
        ("memsearcher", "Ada", Status.COMPLETED, 2 / 3),
        ("memsearcher", "Byron", Status.COMPLETED, 0.1),
        ("memsearcher", None, Status.FORMAT_ERROR, 0.0),
        ("memsearcher", None, Status.OVER_BUDGET, 0.0),
        ("em", "Lovelace", Status.FORMAT_ERROR, 0.0),
    ],
)
async def test_rewards(name: str, answer: str | None, status: Status, reward: float):
    score = await score_of({"use": name}, answer, status)
    assert score.reward == pytest.approx(reward)
    assert set(score.parts) == {"em", "f1", "format"}
    assert score.parts["format"] == (status is Status.COMPLETED)


async def score_of(section: dict[str, object], answer: str | None, status: Status = Status.COMPLETED) -> Score:
    """Returns the score of an answer by the reward of a `[reward]` section."""
    reward: Reward = REWARDS.create(RewardConfig.model_validate(section), base_dir=None)
    trajectory = Trajectory(contexts=(), reward=0.0, status=status)
    return await reward.score(QUESTION, Episode(status=status, answer=answer), trajectory)


async def test_the_reward_of_a_well_formed_wrong_answer_is_an_option():
    assert (await score_of({"use": "memsearcher", "well_formed_reward": 0.25}, "Byron")).reward == 0.25


def test_an_unknown_reward_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"reward\.use: there is no built-in reward 'bleu'; built-in: em, f1, memsear"
    ):
        REWARDS.load("bleu")
    assert sorted(REWARDS.builtins) == ["em", "f1", "memsearcher"]


def test_every_built_in_reward_can_be_loaded():
    assert [REWARDS.load(name).__name__ for name in ("em", "f1", "memsearcher")] == [
        "ExactMatchReward",
        "F1Reward",
        "MemSearcherReward",
    ]
