"""What became of the received groups: failures by reason, and the groups in a row without an accepted one. Pure.

heartbeats: cumulative counts of each actor ─► reported ─► total, and the counts since the last accepted group
verdicts on groups ─► groups in a row that failed or were skipped; the first trajectories of the run
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from learner.leases.admission import Verdict
from learner.leases.first_samples import FirstSamples
from learner.leases.no_progress import ProgressLimits, why_failing, why_skipping
from protocol.failure_counts import OTHER, FailureCounts
from protocol.messages import SubmitGroup
from protocol.types import Status

# Reports of more actors than this are forgotten, the oldest first. A forgotten actor is counted again if it reports.
_MAX_ACTORS = 2_048
_MAX_REASONS_PER_ACTOR = 32
_MAX_FATAL_QUESTIONS = 4


@dataclass(slots=True)
class _Reported:
    """The counts of one incarnation of an actor. `total` includes the reasons that it does not name."""

    incarnation: str
    counts: dict[str, int] = field(default_factory=dict)
    total: int = 0


class GroupOutcomes:
    """Counts since the learner's start.

    total                  FAILED trajectories by reason, over all actors, also those that have ended
    since_accepted         the same since the last accepted group; in addition the reasons of refused groups
    num_failed_in_a_row    groups that failed or were refused since the last accepted or skipped one
    num_skipped_in_a_row   groups of equal rewards that were skipped since the last accepted one
    skipped_reward         the reward of all trajectories of these groups; None if it differs between groups
    fatal_questions        cursors of the last questions that were skipped because their actors died
    first_samples          the first trajectories, if `num_first_samples` > 0
    """

    def __init__(self, *, limits: ProgressLimits = ProgressLimits(), num_first_samples: int = 0) -> None:
        self._limits = limits
        self._is_over = False
        self.first_samples = FirstSamples(num_first_samples)
        self.total = FailureCounts()
        self.since_accepted = FailureCounts()
        self.num_failed_in_a_row = 0
        self.num_skipped_in_a_row = 0
        self.skipped_reward: float | None = None
        self.fatal_questions: deque[int] = deque(maxlen=_MAX_FATAL_QUESTIONS)
        self._actors: dict[str, _Reported] = {}

    def reported(self, actor: str, incarnation: str, failures: Mapping[str, int]) -> None:
        """Adds what is new in an actor's cumulative counts. `actor`, `incarnation`: as in its heartbeat.

        What the first report of an incarnation contains happened before: it is not counted in `since_accepted`.
        """
        known = self._actors.pop(actor, None)
        is_first = known is None or known.incarnation != incarnation
        if known is None or is_first:
            known = _Reported(incarnation)
        self._actors[actor] = known
        if len(self._actors) > _MAX_ACTORS:
            del self._actors[next(iter(self._actors))]
        for reason, num in _new_failures(known, failures).items():
            self.total.add(reason, num)
            if not is_first:
                self.since_accepted.add(reason, num)
        failed, skipped = self._limits.max_failed, self._limits.max_skipped
        self._is_over = 0 < failed <= self.num_failed_in_a_row or 0 < skipped <= self.num_skipped_in_a_row

    def why_over(self, *, step: int) -> str:
        """Why the run must end; empty if it continues. It is decided at a heartbeat, which states the last reasons."""
        if not self._is_over:
            return ""
        if self.num_failed_in_a_row >= self._limits.max_failed > 0:
            return why_failing(self.num_failed_in_a_row, self.since_accepted.most_common(), step=step)
        return why_skipping(self.num_skipped_in_a_row, self.skipped_reward, step=step)

    def judged(self, verdict: Verdict, header: SubmitGroup) -> None:
        """Counts a group that a lease allowed. The reasons of a failed one are in its actor's next heartbeat."""
        match verdict.kind:
            case "accept":
                self.num_failed_in_a_row = self.num_skipped_in_a_row = 0
                self._is_over = False
                self.since_accepted = FailureCounts()
            case "skip":
                self._count_skipped(header)
            case "retry":
                self.num_failed_in_a_row += 1
            case "refuse":
                self.num_failed_in_a_row += 1
                self.since_accepted.add(f"refused: {verdict.reason}", len(header.rewards))
        if verdict.kind != "refuse":
            self.first_samples.add(header)

    def _count_skipped(self, header: SubmitGroup) -> None:
        statuses = zip(header.rewards, header.statuses, strict=True)
        reward = next(reward for reward, status in statuses if status != Status.FAILED)
        is_same = self.num_skipped_in_a_row == 0 or self.skipped_reward == reward
        self.skipped_reward = reward if is_same else None
        self.num_skipped_in_a_row += 1
        self.num_failed_in_a_row = 0


def _new_failures(known: _Reported, failures: Mapping[str, int]) -> dict[str, int]:
    """Reason → how many more than in `known`, which is updated. The rest of the increase of the total is OTHER.

    A reason that an actor no longer names, because others are more frequent, keeps its last count. If the actor names
    it again, the failures that were counted as OTHER meanwhile are its own: OTHER is negative then.
    """
    new = {}
    for reason, count in failures.items():
        if reason != OTHER and (increase := count - known.counts.get(reason, 0)) > 0:
            new[reason] = increase
            known.counts[reason] = count
    while len(known.counts) > _MAX_REASONS_PER_ACTOR:
        del known.counts[min(known.counts, key=known.counts.__getitem__)]
    total = max(known.total, sum(failures.values()))
    unnamed = total - known.total - sum(new.values())
    known.total = total
    return {**new, OTHER: unnamed} if unnamed else new
