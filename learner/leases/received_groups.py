"""Decides what happens to a received group: stored, refused, issued again or skipped. Pure.

SubmitGroup ─► leased by this run? ─► still needed? ─► judge() ─┬─► accept, skip: store it
                    │ no                  │ no                  └─► refuse, retry: issue again, or skip the question
                    ▼                     ▼                         after MAX_FAILURES
                 refused              duplicate
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from learner.leases.admission import Rules, Verdict, judge
from learner.leases.decisions import Decision, Ended, EntryChanged, GroupReceived
from learner.leases.entries import Entry
from learner.leases.group_outcomes import GroupOutcomes
from learner.leases.lease_table import LeaseTable
from protocol.codec import decode_group
from protocol.errors import ProtocolError
from protocol.framing import Buffer
from protocol.group_view import GroupView
from protocol.messages import SubmitGroup, SubmitReply

log = logging.getLogger(__name__)

# A question is skipped after this many failures: groups that failed or were refused, and leases whose actor died.
# Leases that ended otherwise (goodbye, lost message, restart of the learner) do not count.
MAX_FAILURES = 4


class ReceivedGroups:
    """Judges groups and applies the verdicts to a lease table.

    publications  publication → version, from the store; new ones are added by `add_publication`
    num_failures  cursor → number of its failures (see MAX_FAILURES)
    outcomes      counts the groups that a lease allowed

    `num_refused`: groups that were refused. `num_malformed`: those of them whose columns could not be decoded.
    """

    def __init__(
        self,
        *,
        rules: Rules,
        publications: Mapping[int, int],
        num_failures: Mapping[int, int],
        outcomes: GroupOutcomes,
    ) -> None:
        self.num_malformed = 0
        self.num_refused = 0
        self._rules = rules
        self._publications = dict(publications)
        self._failures = Counter(num_failures)
        self._outcomes = outcomes

    def restore(self, num_failures: Mapping[int, int]) -> None:
        """Replaces the counts of failures by the stored ones."""
        self._failures = Counter(num_failures)

    def add_publication(self, publication: int, *, version: int) -> None:
        """Groups sampled by this publication are admitted from now on."""
        self._publications[publication] = version

    def count_failure(self, cursor: int) -> bool:
        """Counts a failure of a question. Returns whether the question must be skipped: it has MAX_FAILURES."""
        self._failures[cursor] += 1
        return self._failures[cursor] >= MAX_FAILURES

    def forget_failures(self, cursor: int) -> None:
        """Call it if the question is decided without a group."""
        self._failures.pop(cursor, None)

    def decide(
        self, decision: Decision, lease_table: LeaseTable, message: SubmitGroup, frames: Sequence[Buffer]
    ) -> SubmitReply:
        """Adds the records of a received group to `decision`; returns the reply to its actor.

        `message`: its decoded header; `frames`: the frames of header and columns. The columns are decoded only if the
        question still needs a group.
        """
        cursor, lease_id, reason = message.cursor, message.lease_id, ""
        lease = lease_table.leases.get(lease_id)
        if cursor >= lease_table.next_cursor or message.run_id != self._rules.run_id:
            outcome, reason = "refused", f"question {cursor} of run {message.run_id} was never leased by this run"
        elif lease_id >= lease_table.next_lease_id or (lease is not None and lease.cursor != cursor):
            outcome, reason = "refused", f"lease {lease_id} was never granted for question {cursor}"
        elif (entry := lease_table.undecided(cursor)) is None:
            outcome = "duplicate"
            if lease_table.drop(lease_id) is not None:
                decision.records.append(Ended(lease_id, "duplicate"))
        else:
            verdict, group = self._judge(lease_table, entry, message, frames[1:])
            if lease is not None:
                self._outcomes.judged(verdict, message)
            if group is not None:
                outcome, reason = "accepted", verdict.reason
                self._store(decision, lease_table, entry, GroupReceived(lease_id, group, frames), verdict)
            else:
                outcome, reason = "refused", verdict.reason
                self._reissue_or_skip(decision, lease_table, entry, message, verdict)
        if outcome == "refused":
            self.num_refused += 1
            log.warning("refused group %d: %s", cursor, reason)
        return SubmitReply(lease_id=lease_id, outcome=outcome, reason=reason)

    def _judge(
        self, lease_table: LeaseTable, entry: Entry, header: SubmitGroup, data: Sequence[Buffer]
    ) -> tuple[Verdict, GroupView | None]:
        """Decodes and judges a group. Returns (verdict, the group if it must be stored, else None)."""
        try:
            group = decode_group(header, data)
        except ProtocolError as error:
            self.num_malformed += 1
            return Verdict("refuse", str(error)), None
        # An overtaken straggler may have any version that its lease allowed: training masks its over-age tokens.
        verdict = judge(
            group,
            rules=self._rules,
            publications=self._publications,
            step=lease_table.step,
            min_version=lease_table.min_version(min(entry.slot, entry.first_slot)),
        )
        return verdict, group if verdict.kind in ("accept", "skip") else None

    def _store(
        self, decision: Decision, lease_table: LeaseTable, entry: Entry, arrived: GroupReceived, verdict: Verdict
    ) -> None:
        accepted = verdict.kind == "accept"
        apply = lease_table.accept if accepted else lease_table.skip
        apply(lease_id=arrived.lease_id, cursor=entry.cursor)
        self._failures.pop(entry.cursor, None)
        ended = Ended(arrived.lease_id, "accepted" if accepted else "skipped")
        decision.records.extend([arrived, EntryChanged(replace(entry)), ended])

    def _reissue_or_skip(
        self, decision: Decision, lease_table: LeaseTable, entry: Entry, message: SubmitGroup, verdict: Verdict
    ) -> None:
        """Issues the question again, or skips it after MAX_FAILURES. A newer attempt that runs prevents the skip."""
        lease_id, cursor = message.lease_id, message.cursor
        if self.count_failure(cursor) and message.attempt == entry.attempt:
            log.warning("question %d is skipped: %d of its groups failed or were refused", cursor, MAX_FAILURES)
            lease_table.skip(lease_id=lease_id, cursor=cursor)
            self._failures.pop(cursor)
        else:
            lease_table.reissue(lease_id=lease_id, cursor=cursor)
        ended = Ended(lease_id, "failed" if verdict.kind == "retry" else "refused", verdict.reason)
        decision.records.extend([EntryChanged(replace(entry)), ended])
