"""Failures by reason over actors and their restarts; the groups in a row that end a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from learner.leases.admission import Verdict
from learner.leases.first_samples import Sample, summary_lines, warnings
from learner.leases.group_outcomes import GroupOutcomes
from learner.leases.no_progress import ProgressLimits
from protocol.codec import encode_group
from protocol.failure_counts import OTHER
from protocol.framing import decode
from protocol.messages import Lease, SubmitGroup
from protocol.types import Status
from tests.leases.groups import RUN, make_group

TIMEOUT = "SearchFailed: the retriever at tcp://127.0.0.1:1 did not answer in 30 s"
ACCEPT, SKIP, RETRY = Verdict("accept"), Verdict("skip", "zero variance"), Verdict("retry")


def header(*, rewards: tuple[float, ...] = (1.0, 0.0), failed: bool = False) -> SubmitGroup:
    lease = Lease(lease_id=1, run_id=RUN, cursor=0, attempt=0, group_size=2, min_version=0)
    group = make_group(lease)
    trajectories = tuple(
        replace(t, reward=reward, status=Status.FAILED if failed else t.status)
        for t, reward in zip(group.trajectories, rewards, strict=True)
    )
    message, _ = decode(encode_group(replace(group, trajectories=trajectories), lease_id=1))
    assert isinstance(message, SubmitGroup)
    return message


def test_cumulative_counts_are_summed_once_over_actors_and_their_restarts() -> None:
    outcomes = GroupOutcomes()
    for actor, incarnation, failures in (
        ("a", "1", {}),
        ("a", "1", {"x": 3}),
        ("a", "1", {"x": 3}),
        ("b", "1", {"x": 2, "y": 1}),
        ("a", "2", {}),
        ("a", "2", {"x": 1}),
        ("a", "2", {"x": 4}),
    ):
        outcomes.reported(actor, incarnation, failures)
    assert outcomes.total.most_common() == {"x": 9, "y": 1}


def test_a_reason_that_an_actor_stops_and_starts_to_name_is_counted_once() -> None:
    outcomes = GroupOutcomes()
    for failures in ({}, {"x": 5}, {"y": 9, OTHER: 5}, {"y": 9, OTHER: 6}, {"x": 11, "y": 9}):
        outcomes.reported("a", "1", failures)
    assert outcomes.total.total == 20
    assert outcomes.total.most_common()["y"] == 9


def test_the_first_report_of_an_actor_is_not_of_the_groups_since_the_last_accepted_one() -> None:
    outcomes = GroupOutcomes()
    outcomes.reported("a", "1", {"old": 100})
    outcomes.reported("a", "1", {"old": 100, TIMEOUT: 2})
    assert outcomes.total.total == 102
    assert outcomes.since_accepted.most_common() == {TIMEOUT: 2}


def test_failed_groups_in_a_row_end_the_run_at_a_heartbeat_with_the_most_frequent_reason() -> None:
    outcomes = GroupOutcomes(limits=ProgressLimits(max_failed=3))
    outcomes.reported("a", "1", {})
    outcomes.reported("a", "1", {"before": 50})
    outcomes.judged(ACCEPT, header())
    for _ in range(3):
        outcomes.judged(RETRY, header(failed=True))
        assert outcomes.why_over(step=12) == ""
    outcomes.reported("a", "1", {"before": 50, TIMEOUT: 5, "other cause": 1})
    assert outcomes.why_over(step=12) == (
        "the run ended: 3 groups in a row failed without a step; most frequent reason (5 of 6 trajectories): "
        f"{TIMEOUT}. Start the retriever (retriever.indexes, or retriever.port on network.host), then start the "
        "run again: it resumes at step 12"
    )


def test_an_accepted_group_begins_the_count_again() -> None:
    outcomes = GroupOutcomes(limits=ProgressLimits(max_failed=3, max_skipped=3))
    for verdict in (RETRY, RETRY, ACCEPT, RETRY, RETRY, SKIP, SKIP, RETRY, RETRY):
        outcomes.judged(verdict, header(rewards=(0.5, 0.5)))
        outcomes.reported("a", "1", {})
        assert outcomes.why_over(step=0) == ""


@pytest.mark.parametrize(("max_failed", "max_skipped"), [(0, 0), (0, 5), (5, 0)])
def test_a_limit_of_0_never_ends_the_run(max_failed: int, max_skipped: int) -> None:
    outcomes = GroupOutcomes(limits=ProgressLimits(max_failed=max_failed, max_skipped=max_skipped))
    for _ in range(100):
        outcomes.judged(SKIP if max_failed else RETRY, header(rewards=(0.0, 0.0)))
    outcomes.reported("a", "1", {})
    assert outcomes.why_over(step=0) == ""


@pytest.mark.parametrize(
    ("rewards", "text"),
    [((0.0, 0.0), "every reward is 0 in the last 4 groups"), ((0.0, 1.0), "within each group are equal in the last 4")],
)
def test_groups_without_signal_end_the_run(rewards: tuple[float, float], text: str) -> None:
    outcomes = GroupOutcomes(limits=ProgressLimits(max_skipped=4))
    for _ in range(2):
        for reward in rewards:
            outcomes.judged(SKIP, header(rewards=(reward, reward)))
    outcomes.reported("a", "1", {})
    assert text in outcomes.why_over(step=3)
    assert "it resumes at step 3" in outcomes.why_over(step=3)


def test_reasons_of_refused_groups_are_given_too() -> None:
    outcomes = GroupOutcomes(limits=ProgressLimits(max_failed=2))
    for version in range(2):
        outcomes.judged(Verdict("refuse", f"versions must be >= 4 for this lease, got {version}"), header())
    outcomes.reported("a", "1", {})
    assert "(4 of 4 trajectories): refused: versions must be >= 4 for this lease, got 0. Give all" in outcomes.why_over(
        step=4
    )


def test_the_first_trajectories_are_collected_whole_groups_at_a_time() -> None:
    outcomes = GroupOutcomes(num_first_samples=3)
    outcomes.judged(RETRY, header(failed=True))
    outcomes.judged(Verdict("refuse", "malformed"), header())
    assert not outcomes.first_samples.is_complete
    for verdict in (SKIP, ACCEPT):
        outcomes.judged(verdict, header())
    assert outcomes.first_samples.is_complete
    assert [sample.status for sample in outcomes.first_samples.samples] == ["failed", "failed", *["completed"] * 2]
    assert not GroupOutcomes().first_samples.is_complete


OK = Sample("completed", 1.0, num_contexts=2, num_tokens=300, longest_context=200, is_format_correct=None)


def test_the_summary_of_the_first_samples() -> None:
    samples = [OK, replace(OK, reward=0.0, status="format_error"), replace(OK, status="failed", reward=0.0)]
    assert summary_lines(samples, failures={TIMEOUT: 4}) == [
        "the first 3 trajectories:",
        "  endings   completed 1, format_error 1, failed 1",
        f"  reasons   so far 4 failed: {TIMEOUT} (4)",
        "  rewards   mean 0.500, 0 in 50%, 2 different: 1 (1), 0 (1)",
        "  format    50% without a format error",
        "  tokens    median 300, largest 300 per trajectory; contexts: median 2, most 2",
    ]
    assert warnings(samples, failures={}) == []


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (replace(OK, reward=0.0), ["no signal: every reward is 0;"]),
        (replace(OK, status="format_error"), ["no signal: every reward is 1;", "every trajectory has format errors:"]),
        (replace(OK, is_format_correct=0.0), ["no signal: every reward is 1;", "every trajectory has format errors:"]),
        (
            replace(OK, status="over_budget", longest_context=2048),
            ["no signal: every reward is 1;", "over its budget, the longest context has 2,048 tokens"],
        ),
        (replace(OK, status="failed"), [f"every trajectory failed: {TIMEOUT}"]),
    ],
)
def test_warnings_about_the_first_samples(sample: Sample, words: list[str]) -> None:
    found = warnings([sample] * 4, failures={TIMEOUT: 4})
    assert len(found) == len(words)
    assert all(word in warning for word, warning in zip(words, found, strict=True))
