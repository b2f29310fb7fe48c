"""The best and the worst trajectory of a batch, as Markdown for TensorBoard's text tab."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tensorboard.plugin_util import markdown_to_safe_html

from learner.metrics.trajectory_text import best_and_worst, render_trajectory
from protocol.types import Context, Question, Status, Trajectory, VersionSpan
from tests.learner.tiny import group

QUESTION = Question(id="q", text="who?", answers=("Ada", "Bob"))


def context(text: str, *, sampled: tuple[tuple[int, int, int], ...], role: str = "agent") -> Context:
    """A context with one token a character; `sampled`: (start, end, version)."""
    ids = np.array([ord(char) for char in text], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.bool_)
    for start, end, _ in sampled:
        mask[start:end] = True
    spans = tuple(VersionSpan(start, end, version, version) for start, end, version in sampled)
    logprobs = np.zeros(len(ids), dtype=np.float32)
    return Context(token_ids=ids, loss_mask=mask, behavior_logprobs=logprobs, policy_versions=spans, role=role)


def decode(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def test_best_and_worst_are_of_the_whole_batch() -> None:
    failed = (Status.FAILED, *(Status.COMPLETED,) * 3)
    first = group(0, rewards=(9.0, 0.5, 0.5, 0.6), statuses=failed)
    second = group(1, rewards=(0.9, 0.4, 0.1, 0.3))
    chosen = best_and_worst([first, second])
    assert {which: trajectory.reward for which, (_, trajectory) in chosen.items()} == {"best": 0.9, "worst": 0.1}
    assert all(question is second.question for question, _ in chosen.values())
    assert best_and_worst([group(2, statuses=(Status.FAILED,) * 4)]) == {}
    assert best_and_worst([]) == {}


def test_given_and_sampled_tokens_are_separate_blocks() -> None:
    first = context("<|user|>who?\n<search>Ada</search>\nfound", sampled=((13, 33, 4),))
    second = context("memory: x\nAda", sampled=((10, 12, 4), (12, 13, 5)), role="reader")
    trajectory = Trajectory((first, second), reward=0.5, reward_parts={"em": 1.0}, answer="Ada")
    text = render_trajectory(trajectory, question=QUESTION, decode=decode)
    assert "question  who?\ngold      Ada | Bob\nanswer    Ada" in text
    assert "**reward 0.500**, em 1.000; completed; 2 contexts, 52 tokens" in text
    assert "#### Context 2 (reader, start, turn 0, 13 tokens)" in text
    blocks = re.findall(r"^([^\n]+), (\d+) tokens:\n\n```\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert blocks == [
        ("Prompt", "13", "<|user|>who?\n"),
        ("**Sampled by version 4**", "20", "<search>Ada</search>"),
        ("Observation", "6", "\nfound"),
        ("Prompt", "10", "memory: x\n"),
        ("**Sampled by version 4**", "2", "Ad"),
        ("**Sampled by version 5**", "1", "a"),
    ]


@pytest.mark.parametrize(
    "text",
    ["```\n# title\n<b>bold</b>\n```", "~~~\n* a\n``````", "<script>alert(1)</script>", "\x1b[31mred\x00", "| a | b |"],
)
def test_hostile_text_stays_text_in_tensorboard(text: str) -> None:
    """Rendered by TensorBoard itself, the text is the content of one code block."""
    trajectory = Trajectory((context(text, sampled=((0, len(text), 1),)),), reward=0.0, answer=text)
    source = render_trajectory(trajectory, question=QUESTION, decode=decode)
    html = markdown_to_safe_html(source)
    assert len(re.findall("<pre>", html)) == 2
    outside = re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    for part in ("title", "bold", "script", "alert", "red", "| a"):
        assert part not in outside
    assert "\x1b" not in html
    assert "\x00" not in html


def test_lines_are_wrapped_and_long_texts_are_cut_with_a_note() -> None:
    words = "word " * 4_000
    trajectory = Trajectory((context(words, sampled=((5, 10, 1),)),), reward=0.0, answer="x" * 10_000)
    text = render_trajectory(trajectory, question=QUESTION, decode=decode)
    assert max(map(len, text.splitlines())) <= 120
    assert "[9500 characters are omitted here]" in text
    assert "[15990 characters are omitted here]" in text
    assert len(text) < 10_000


def test_contexts_in_the_middle_of_a_long_trajectory_are_omitted_with_a_note() -> None:
    one = context("ab", sampled=((1, 2, 1),))
    trajectory = Trajectory(tuple(replace(one, turn=turn) for turn in range(40)), reward=0.0)
    text = render_trajectory(trajectory, question=QUESTION, decode=decode)
    assert [int(number) for number in re.findall(r"#### Context (\d+)", text)] == [*range(1, 7), *range(35, 41)]
    assert "*28 contexts are omitted here.*" in text
    assert "40 contexts, 80 tokens" in text
