"""Summarises the first trajectories of a run, so that a wrong set-up is seen before an hour is spent. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protocol.failure_counts import failure_line
from protocol.messages import SubmitGroup
from protocol.types import Status

_MAX_DISTINCT_REWARDS = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """One trajectory.

    num_tokens, longest_context  tokens of all its contexts, and of the longest one
    is_format_correct            the reward part `format`; None if there is none
    """

    status: str
    reward: float
    num_contexts: int
    num_tokens: int
    longest_context: int
    is_format_correct: float | None


class FirstSamples:
    """Collects the first `num` trajectories; whole groups, so it may hold a few more."""

    def __init__(self, num: int) -> None:
        self._num = num
        self.samples: list[Sample] = []

    @property
    def is_complete(self) -> bool:
        """Whether `num` trajectories have arrived; false if `num` is 0."""
        return 0 < self._num <= len(self.samples)

    def add(self, header: SubmitGroup) -> None:
        """Adds the trajectories of a group, unless there are enough."""
        if len(self.samples) < self._num:
            self.samples.extend(_samples_of(header))


def _samples_of(header: SubmitGroup) -> list[Sample]:
    ends = np.cumsum(header.num_contexts)
    formats = header.reward_parts.get("format", [None] * len(header.rewards))
    return [
        Sample(
            status=status,
            reward=reward,
            num_contexts=num,
            num_tokens=sum(header.context_lengths[end - num : end]),
            longest_context=max(header.context_lengths[end - num : end], default=0),
            is_format_correct=is_format_correct,
        )
        for status, reward, num, end, is_format_correct in zip(
            header.statuses, header.rewards, header.num_contexts, ends.tolist(), formats, strict=True
        )
    ]


def summary_lines(samples: Sequence[Sample], *, failures: Mapping[str, int]) -> list[str]:
    """The summary, one line per topic. `failures`: reason → FAILED trajectories so far, also of later groups."""
    endings = Counter(sample.status for sample in samples)
    ended = ", ".join(f"{status} {count}" for status, count in endings.most_common())
    lines = [f"the first {len(samples)} trajectories:", f"  endings   {ended}"]
    if failures and endings[Status.FAILED]:
        lines.append(f"  reasons   so far {failure_line(failures)}")
    valid = [sample for sample in samples if sample.status != Status.FAILED]
    if not valid:
        return lines
    rewards = Counter(sample.reward for sample in valid)
    values = ", ".join(f"{reward:g} ({count})" for reward, count in rewards.most_common(_MAX_DISTINCT_REWARDS))
    more = len(rewards) - _MAX_DISTINCT_REWARDS
    mean = sum(sample.reward for sample in valid) / len(valid)
    lines.append(
        f"  rewards   mean {mean:.3f}, 0 in {rewards[0.0] / len(valid):.0%}, {len(rewards)} different: {values}"
        + (f" and {more} more" if more > 0 else "")
    )
    lines.append(f"  format    {_format_rate(valid):.0%} without a format error")
    tokens, contexts = (sorted(getattr(s, name) for s in valid) for name in ("num_tokens", "num_contexts"))
    lines.append(
        f"  tokens    median {tokens[len(tokens) // 2]:,}, largest {tokens[-1]:,} per trajectory; "
        f"contexts: median {contexts[len(contexts) // 2]}, most {contexts[-1]}"
    )
    return lines


def warnings(samples: Sequence[Sample], *, failures: Mapping[str, int]) -> list[str]:
    """What is wrong with the samples, one sentence each; empty if there is a signal to learn from."""
    valid = [sample for sample in samples if sample.status != Status.FAILED]
    if samples and not valid:
        reason = next(iter(failures), "see the actors' logs")
        return [f"every trajectory failed: {reason}"]
    found = []
    rewards = {sample.reward for sample in valid}
    if len(rewards) == 1:
        found.append(
            f"no signal: every reward is {rewards.pop():g}; nothing is learned unless later rewards differ: check "
            "the reward function, the prompt, and that the model can solve some of the questions"
        )
    if valid and _format_rate(valid) == 0:
        found.append(
            "every trajectory has format errors: read some under trajectories/ in TensorBoard; check that its "
            "rendering is the model's own, or warm-start the model"
        )
    if valid and all(sample.status == Status.OVER_BUDGET for sample in valid):
        longest = max(sample.longest_context for sample in valid)
        found.append(
            f"every trajectory ended over its budget, the longest context has {longest:,} tokens: if that is near "
            "workflow.context_tokens, raise it or shorten prompts and observations, else raise the limit of turns"
        )
    return found


def _format_rate(valid: Sequence[Sample]) -> float:
    """The fraction of trajectories without a format error, by the reward part `format` if there is one."""
    correct = [
        sample.status != Status.FORMAT_ERROR if sample.is_format_correct is None else sample.is_format_correct > 0
        for sample in valid
    ]
    return sum(correct) / len(correct)
