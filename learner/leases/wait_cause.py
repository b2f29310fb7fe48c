"""Why the learner waits for a batch: (state of the run) → one cause. Pure.

The first cause of this list that holds is given, because it explains the later ones:

    disk       a write failed because the disk is full
    engines    no engine serves, or all serve a version that is too old for the batch
    actors     no actor is connected
    failures   the last groups failed or were refused
    signal     the last groups were skipped, because their rewards are equal
    leases     groups of the batch are being rolled out, or wait for a free slot
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from learner.leases.first_samples import Sample
from protocol.failure_counts import clean_reason
from protocol.weight_messages import EngineReport

# So many groups in a row are a cause, fewer may be chance.
MIN_FAILED_IN_A_ROW = 4
MIN_SKIPPED_IN_A_ROW = 32

_MAX_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What the coordinator knows.

    step, num_ready       the current batch, and how many of its `groups_per_batch` groups are stored
    oldest_lease          (actor, age in seconds) of the oldest lease of a group that the batch lacks; None: no lease
    num_refused_actors    actors that tried to join with another config or other files
    engines, serving      the last report of each engine, and the names of those that serve
    failures              reason → FAILED trajectories since the learner's start
    recent_failures       the same since the last accepted group, and the reasons of refused groups
    num_..._in_a_row, skipped_reward, fatal_questions    see `learner.leases.group_outcomes`
    first_samples         the first trajectories of the run, when all have arrived
    """

    step: int
    groups_per_batch: int
    staleness_bound: int
    num_ready: int = 0
    oldest_lease: tuple[str, float] | None = None
    num_actors: int = 0
    num_refused_actors: int = 0
    engines: tuple[EngineReport, ...] = ()
    serving: frozenset[str] = frozenset()
    is_disk_full: bool = False
    failures: Mapping[str, int] = field(default_factory=dict)
    recent_failures: Mapping[str, int] = field(default_factory=dict)
    num_failed_in_a_row: int = 0
    num_skipped_in_a_row: int = 0
    skipped_reward: float | None = None
    fatal_questions: tuple[int, ...] = ()
    first_samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Cause:
    """`text` is a clause. It may change while `kind` stays the same."""

    kind: Literal["disk", "engines", "actors", "failures", "signal", "leases"]
    text: str


def wait_cause(state: RunState) -> Cause:
    """The cause why the batch of `state.step` is not complete."""
    if state.is_disk_full:
        return Cause("disk", "waiting for room on the disk")
    if problem := _engine_problem(state):
        return Cause("engines", problem)
    if not state.num_actors:
        refused = f"; {state.num_refused_actors} were refused, see the log" if state.num_refused_actors else ""
        return Cause("actors", f"no actor is connected{refused}")
    if state.num_failed_in_a_row >= MIN_FAILED_IN_A_ROW:
        reason = next(iter(state.recent_failures), "the actors have not reported it")
        return Cause("failures", f"the last {state.num_failed_in_a_row} groups failed, most frequent reason: {reason}")
    if state.num_skipped_in_a_row >= MIN_SKIPPED_IN_A_ROW:
        return Cause("signal", skipped_text(state.num_skipped_in_a_row, state.skipped_reward))
    if state.oldest_lease is None:
        return Cause("leases", "no actor has a free slot")
    actor, age_s = state.oldest_lease
    return Cause("leases", f"oldest lease {max(0.0, age_s):.0f} s at {clean_reason(actor)}")


def skipped_text(num: int, reward: float | None) -> str:
    """`reward`: the reward of every trajectory of the last `num` groups; None if it differs between groups."""
    which = f"every reward is {reward:g}" if reward is not None else "the rewards within each group are equal"
    return f"no signal: {which} in the last {num} groups, which were skipped (zero variance)"


def _engine_problem(state: RunState) -> str:
    """Why no engine can serve the batch; empty if one can."""
    if not state.engines:
        return "no engine is connected"
    needed = max(0, state.step - state.staleness_bound)
    serving = [report for report in state.engines if report.engine.name in state.serving]
    if not serving:
        return f"no engine serves: {_listed([_engine_state(report) for report in state.engines])}"
    if all(report.engine.version < needed for report in serving):
        versions = [f"{clean_reason(each.engine.name)} has version {each.engine.version}" for each in serving]
        return f"no engine has version {needed} or a newer one: {_listed(versions)}"
    return ""


def _engine_state(report: EngineReport) -> str:
    does_not_report = report.state in ("serving", "updating") and report.engine.version >= 0
    state = "does not report" if does_not_report else f"is {report.state}"
    error = f" ({clean_reason(report.error)})" if report.error else ""
    return f"{clean_reason(report.engine.name)} {state}{error}"


def _listed(items: list[str]) -> str:
    more = len(items) - _MAX_NAMED
    return "; ".join(items[:_MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
