"""Metrics, format and rewards, against recorded cases of the public implementations."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actor.chat.chatml import ChatRendering
from actor.rewards.format import check_chat, last_boxed
from actor.rewards.reward import REWARDS, reward_named
from actor.rewards.text import exact_match, f1, normalise
from protocol.errors import ConfigError
from protocol.types import Question, Status

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PALIMPSEST_DATA", ROOT.parent / "shared" / "data"))
# The original calls it valid and crashes when it reads the answer; here an unclosed box is no box.
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
    assert len(rows) == 75


def test_formats_match_the_recorded_cases():
    rows = [row for row in vectors("format_vectors.jsonl") if "memsearcher_valid" in row]
    for row in rows:
        check = check_chat(row["text"])
        if row["id"] in CRASHES_IN_THE_ORIGINAL:
            assert check.reason == "the last response is missing \\boxed"
            continue
        assert ChatRendering(fidelity="paper").format_fault(row["text"]) == (row["memsearcher_reason"] or ""), row["id"]
        expected = (row["memsearcher_valid"], row["memsearcher_reason"], row["memsearcher_boxed"])
        assert (check.valid, check.reason, check.boxed) == expected, row["id"]
    assert len(rows) == 14


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_scores_are_shares_and_a_normalised_text_stays(prediction: str, answers: list[str]):
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
def test_rewards(name: str, answer: str | None, status: Status, reward: float):
    score = reward_named(name).score(question=QUESTION, answer=answer, status=status)
    assert score.reward == pytest.approx(reward)
    assert set(score.parts) == {"em", "f1", "format"}
    assert score.parts["format"] == (status is Status.COMPLETED)


def test_an_unknown_reward_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"one of em, f1, memsearcher, got 'bleu'"):
        reward_named("bleu")
    assert sorted(REWARDS) == ["em", "f1", "memsearcher"]
