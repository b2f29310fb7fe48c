"""Running sums over samples. They are exact, so a report does not depend on the order in which samples finish."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

from actor.evaluation.samples import Sample
from protocol.evaluation import Estimate, EvaluationPlan, EvaluationReport
from protocol.failure_counts import FailureCounts
from protocol.types import Status


class _Mean:
    """The mean of finite numbers and its standard error, from exact sums."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = Fraction()
        self._sum_of_squares = Fraction()

    def add(self, value: Fraction) -> None:
        self._count += 1
        self._sum += value
        self._sum_of_squares += value * value

    def estimate(self) -> Estimate | None:
        if not self._count:
            return None
        mean = self._sum / self._count
        stderr = None
        if self._count > 1:
            variance = (self._sum_of_squares - self._sum * mean) / (self._count - 1)
            stderr = math.sqrt(variance / self._count)
        return Estimate(mean=float(mean), stderr=stderr, num_questions=self._count)


@dataclass(slots=True)
class _OpenQuestion:
    """The samples so far of a question that has not all of them. `values`: name → one value per valid sample."""

    num_done: int = 0
    values: defaultdict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))


class Tally:
    """Means, counts and best-of-k over samples, each added once.

    Memory: a fixed number of sums, and the values of questions that have some of their samples but not all.
    """

    def __init__(self, plan: EvaluationPlan, *, num_questions: int) -> None:
        self._plan = plan
        self._num_questions = num_questions
        self._open: defaultdict[int, _OpenQuestion] = defaultdict(_OpenQuestion)
        self._means: defaultdict[tuple[str, str], _Mean] = defaultdict(_Mean)
        self._best_of = {k: _Mean() for k in _best_of_sizes(plan.samples)}
        self._statuses: Counter[str] = Counter()
        self._failures = FailureCounts()
        self._versions: Counter[str] = Counter()
        self.num_done = 0

    @property
    def versions(self) -> frozenset[str]:
        """Every weight version that sampled tokens."""
        return frozenset(self._versions)

    def add(self, sample: Sample) -> None:
        self.num_done += 1
        self._statuses[sample.status.value] += 1
        self._versions.update(sample.versions)
        question = self._open[sample.cursor]
        question.num_done += 1
        if sample.reward is None:
            self._failures.add(sample.reason)
        else:
            for key, value in _values(sample, sample.reward):
                question.values[key].append(value)
        if question.num_done == self._plan.samples:
            self._close(self._open.pop(sample.cursor))

    def report(self, *, complete: bool) -> EvaluationReport:
        """Questions with some of their samples but not all are not in the means yet."""
        means = {key: estimate for key, mean in self._means.items() if (estimate := mean.estimate()) is not None}
        best_of = {k: estimate for k, mean in self._best_of.items() if (estimate := mean.estimate()) is not None}
        return EvaluationReport(
            complete=complete,
            policy=self._plan.policy,
            versions=dict(sorted(self._versions.items())),
            split=self._plan.split,
            temperature=self._plan.temperature,
            seed=self._plan.seed,
            num_questions=self._num_questions,
            samples_per_question=self._plan.samples,
            num_done=self.num_done,
            num_failed=self._failures.total,
            statuses=dict(sorted(self._statuses.items())),
            failures=self._failures.most_common(),
            reward=means.get(("reward", "")),
            parts={name: means[kind, name] for kind, name in sorted(means) if kind == "parts"},
            best_of=best_of,
            stats={name: means[kind, name] for kind, name in sorted(means) if kind == "stats"},
        )

    def _close(self, question: _OpenQuestion) -> None:
        for key, values in question.values.items():
            self._means[key].add(sum(map(Fraction, values), Fraction()) / len(values))
        rewards = question.values.get(("reward", ""), [])
        for k, mean in self._best_of.items():
            if k <= len(rewards):
                mean.add(expected_best(rewards, k))


def expected_best(rewards: list[float], k: int) -> Fraction:
    """The expected largest of k of the n rewards, drawn without replacement; 1 <= k <= n.

    The i-th smallest is the largest of C(i - 1, k - 1) of the C(n, k) subsets. If rewards are 0 or 1, this is the
    unbiased pass@k of Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    ascending = sorted(rewards)
    subsets = math.comb(len(ascending), k)
    return sum(
        (Fraction(math.comb(i, k - 1), subsets) * Fraction(reward) for i, reward in enumerate(ascending)), Fraction()
    )


def _values(sample: Sample, reward: float) -> list[tuple[tuple[str, str], float]]:
    """((kind, name), value) of everything that is averaged."""
    parts = [(("parts", name), value) for name, value in sample.parts.items()]
    stats = {
        **sample.stats,
        "answered": float(sample.status is Status.COMPLETED),
        "num_contexts": float(sample.num_contexts),
        "num_tokens": float(sample.num_tokens),
    }
    return [(("reward", ""), reward), *parts, *((("stats", name), value) for name, value in stats.items())]


def _best_of_sizes(num_samples: int) -> list[int]:
    """Powers of two from 2 below `num_samples`, then `num_samples`; none for one sample."""
    if num_samples == 1:
        return []
    powers = [2**i for i in range(1, num_samples.bit_length())]
    return sorted({*(each for each in powers if each < num_samples), num_samples})
