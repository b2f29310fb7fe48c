"""Failure reasons: texts of the same cause are one, and memory is bounded over a long run."""

from __future__ import annotations

import pytest

from protocol.failure_counts import (
    MAX_REASON_CHARS,
    MAX_SENT_REASONS,
    OTHER,
    FailureCounts,
    clean_reason,
    failure_line,
    reason_key,
)
from protocol.messages import Heartbeat


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SearchFailed: no answer from tcp://10.0.0.1:4012 in 30 s", "SearchFailed: no answer from tcp://h:1 in 2.5 s"),
        ("EngineRefused: got 2100 tokens", "EngineRefused: got 1,987 tokens"),
        ("rid 3.0.12 was aborted", "rid 124.1.7 was aborted"),
        ("KeyError: 'row 3' (agent.py, line 12)", "KeyError: 'row 77' (agent.py, line 12)"),
        ("no tool `abc`", "no tool `x y`"),
        ("object at 0x7f3a10 is closed", "object at 0xDEADBEEF is closed"),
        ("lease 1b4e28ba-2fa1-11d2-883f-0016d3cca427", "lease 6fa459ea-ee8a-3ca4-894e-db77e160355e"),
        ("loss 1e-05", "loss 3.25"),
    ],
)
def test_reasons_that_differ_in_varying_parts_are_one(one: str, other: str) -> None:
    assert reason_key(one) == reason_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("KeyError: 'a' (agent.py, line 12)", "KeyError: 'a' (agent.py, line 40)"),
        ("HTTP 400: bad", "HTTP 503: bad"),
        ("workflow_TypeError: x", "workflow_KeyError: x"),
        ("the engine can't be reached", "the retriever can't be reached"),
    ],
)
def test_different_causes_stay_apart(one: str, other: str) -> None:
    assert reason_key(one) != reason_key(other)


def test_a_reason_becomes_one_short_printable_line() -> None:
    assert clean_reason("a\n\tb \x1b[31m\ud800") == "a b ?[31m?"
    assert clean_reason(" \n") == "no reason given"
    long = clean_reason("word " * 10_000)
    assert len(long) == MAX_REASON_CHARS
    assert reason_key(clean_reason(long)) == reason_key(long)


def test_the_first_text_is_shown_with_the_count_of_all() -> None:
    counts = FailureCounts()
    for num in range(5):
        counts.add(f"timeout after {num} s")
    counts.add("out of memory", 2)
    assert counts.most_common() == {"timeout after 0 s": 5, "out of memory": 2}
    assert failure_line(counts.most_common()) == "7 failed: timeout after 0 s (5), out of memory (2)"
    assert failure_line({}) == ""


def word(num: int) -> str:
    """A different word without digits for each number."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(num))


def test_a_frequent_reason_is_kept_among_any_number_of_rare_ones() -> None:
    counts = FailureCounts(max_reasons=16)
    for num in range(5_000):
        counts.add(f"rare {word(num)}")
        if num % 5 == 0:
            counts.add("the retriever is gone")
    sent = counts.most_common()
    assert next(iter(sent.items())) == ("the retriever is gone", 1_000)
    assert len(sent) <= MAX_SENT_REASONS
    assert sum(sent.values()) == counts.total == 6_000
    assert sent[OTHER] > 4_000


def test_any_counts_fit_into_a_heartbeat() -> None:
    counts = FailureCounts()
    for num in range(200):
        counts.add(f"{word(num)} \ud800 \0 {'x' * 1_000}")
    Heartbeat(actor="a", incarnation="1", capacity=1, free_slots=1, held=[], failures=counts.most_common())
